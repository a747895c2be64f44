"""Why the scheduler decided as it did: notes for the decision log, in the order in which things were decided.

To add a kind: a class here, in `Note`; and where it is decided

    if notes.are_kept:
        notes.add(Drained(...))

`notes` is `SharedState.notes`. A replay makes the same notes and compares them, so a note holds only what follows from
the events. Where no log is written none is made.
"""

from typing import Literal

from ..protocol.message import Message, Row

Phase = Literal["prefill", "decode"]
What = Literal["prefill", "decode", "transfer"]


class Measured(Message, frozen=True):
    """What work was found to cost so far: seconds = fixed + each x size. Written when `count` is a power of two, and
    every 64th time."""

    what: What
    mesh: int  # where it was measured; of a transfer, its source
    destination: int | None  # of a transfer
    count: int  # of measurements
    fixed: float  # of a step or transfer
    each: float  # of a token, row or byte


class Candidate(Row, frozen=True):
    """A mesh that was ranked for a request."""

    mesh: int
    cached: int  # tokens of the request that its prefix cache has
    terms: dict[str, float]  # seconds that it would cost to have the request there (`ranking.py`)


class Routed(Message, frozen=True):
    """A request was given a place on a mesh, the first of the ranked that had room. Only where there was a choice."""

    request_id: int
    phase: Phase
    mesh: int
    ranked: tuple[Candidate, ...]  # the short list, in the policy's order


class Conditional(Message, frozen=True):
    """A decode mesh was given a prompt to prefill (`conditional_prefill.py`)."""

    request_id: int
    mesh: int
    rows: int  # other requests there
    gap: float  # seconds between two tokens of these, with the prompts there computed between
    target: float | None  # the tightest target of these, in seconds; None: any time will do


class DrainChoice(Message, frozen=True):
    """What is to become of a request on a mesh that stops decoding: it is finished there, or moves."""

    request_id: int
    mesh: int
    moves: bool
    destination: int  # where it would go
    to_finish: float  # seconds until the mesh would be rid of it by its end
    to_move: float  # and by a transfer


class Planned(Message, frozen=True):
    """What the planner of a pool's roles found (`planner.py`): parts are of the requests that come, 0 to 1, ages and
    step times in seconds."""

    reason: str  # one of `planner.Reason`
    now: str  # roles at the time
    roles: str  # that it gave
    best: str | None  # that were predicted to be the best; None: nothing was predicted
    goodput_now: float | None  # predicted
    goodput_best: float | None
    requests: int  # that have come in the window
    tokens: float  # of these, to compute
    oldest_prompt: float  # that waits, its age
    oldest_credit: float  # likewise of KV that waits for credit
    prefill: tuple[float, float]  # of a prefill step, and of each token
    decode: tuple[float, float]  # of a decode step, and of each row


Note = Measured | Routed | Conditional | DrainChoice | Planned


class Notes:
    """The notes since they were last taken."""

    def __init__(self) -> None:
        self.are_kept = False
        self._notes: list[Note] = []

    def keep(self) -> None:
        """Have notes made from here on."""
        self.are_kept = True

    def add(self, note: Note) -> None:
        """Take in a note, which nobody should make unless `are_kept`."""
        self._notes.append(note)

    def take(self) -> list[Note]:
        """Return the notes in the order in which they were made, and keep them no longer."""
        notes, self._notes = self._notes, []
        return notes
