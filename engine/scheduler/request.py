"""What the control plane knows of a request: counts, block hashes and times, never its tokens. No JAX, no clock here.

`Request.move_to` is the only way to change a state, and `TRANSITIONS` the only table of what may follow what.
States follow what has been *dispatched*: a request is in DECODE from the moment its KV is, in device order, in place.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from ..paging.block_table import Handoff, Seat
from ..protocol.events import RequestFacts
from ..protocol.timeline import Timeline


class State(StrEnum):
    """Where a request stands. HANDOFF includes waiting for decode pages (credit)."""

    WAITING = "waiting"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


FINAL = frozenset({State.FINISHED, State.ABORTED, State.FAILED})
TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PREFILL, State.ABORTED, State.FAILED}),
    State.PREFILL: frozenset({State.HANDOFF, State.DECODE, State.WAITING}) | FINAL,
    State.HANDOFF: frozenset({State.DECODE, State.WAITING}) | FINAL,
    State.DECODE: frozenset({State.HANDOFF, State.WAITING}) | FINAL,
} | dict.fromkeys(FINAL, frozenset())


@dataclass(eq=False)
class Request:
    """One request as the scheduler sees it.

    `number`: its place in the order of arrival. `run`: a number that no other start of any request has; results of an
    earlier run are void. `restarts`: how often it started over, `retries`: how many of these were for a failure.
    `to_prefill`: tokens that this run prefills, the prompt and after a preemption what it has generated. `prefilled`:
    of these, in the cache or dispatched. `dispatched`: output tokens whose step was dispatched. `confirmed`: output
    tokens read back. `forced`: output tokens that this run feeds as they were generated before. `hashes`: of its full
    pages, as far as their tokens are known. `home`: where its KV is; `handoff`: where it is going. `cached`: prompt
    tokens that the prefix cache spared its first run, None until that begins. `awaits`: the block that another request
    is computing for it. `lost_on`: the mesh whose failure it has survived last. `suspects`: a mesh from which a
    transfer failed, so that it may be lost.
    """

    facts: RequestFacts
    number: int
    timeline: Timeline
    state: State = State.WAITING
    run: int = 0
    restarts: int = 0
    retries: int = 0
    to_prefill: int = 0
    prefilled: int = 0
    dispatched: int = 0
    confirmed: int = 0
    forced: int = 0
    cached: int | None = None
    awaits: bytes | None = None
    lost_on: int | None = None
    suspects: int | None = None
    hashes: list[bytes] = field(default_factory=list)
    home: Seat | None = None
    handoff: Handoff | None = None

    def __post_init__(self) -> None:
        """What is looked at in every step lies at hand."""
        self.id, self.prompt_len, self.max_tokens = self.facts.id, self.facts.prompt_len, self.facts.max_tokens

    @property
    def can_decode(self) -> bool:
        """Whether another decode step may be dispatched: in DECODE, with tokens left to ask for."""
        return self.state is State.DECODE and self.dispatched < self.max_tokens

    @property
    def kv_len(self) -> int:
        """Tokens in the cache, those of dispatched steps included: all but the one sampled last."""
        return self.prompt_len + self.dispatched - 1 if self.dispatched else self.prefilled

    def move_to(self, state: State) -> None:
        """Change state; a transition that is not in the table is a bug in the scheduler, and raises."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id}: {self.state} cannot become {state}")
        self.state = state


def by_arrival(request: Request) -> int:
    """Sort key: first come, first served."""
    return request.number
