"""The events that the scheduler takes in, each with its time `t` in seconds on the engine's clock."""

from typing import Literal

from .message import Message, Row
from .service import DEFAULT, Service

# The roles that a mesh of a pool may have (`topology.py`).
RoleName = Literal["prefill", "decode", "both"]


class RequestFacts(Message, frozen=True):
    """A request as it arrives.

    A block hash is of all tokens up to the end of its page (`paging/block_hash.py`).
    """

    id: int
    prompt_len: int
    max_tokens: int
    block_hashes: tuple[bytes, ...] = ()  # of the prompt's full pages; empty: it neither reads nor feeds the cache
    fork_of: int | None = None  # an earlier request with the very same prompt, for n > 1
    service: Service = DEFAULT
    is_constrained: bool = False  # each of its tokens needs all before it on the host: no step of it runs ahead


class Arrived(Message, frozen=True):
    """A request that passed every check enters."""

    t: float
    facts: RequestFacts


class AbortRequested(Message, frozen=True):
    """The caller no longer wants this request. Unknown or finished requests are ignored."""

    t: float
    request_id: int


class PreemptRequested(Message, frozen=True):
    """Give up the KV of this request and compute it again later. Ignored while it waits in the queue."""

    t: float
    request_id: int


class MigrateRequested(Message, frozen=True):
    """Move this request's KV to another decoding mesh. Ignored unless it is decoding and there is room."""

    t: float
    request_id: int
    destination: int | None = None  # None: any


class Outcome(Row, frozen=True):
    """A token was sampled for this request, which still runs."""

    request_id: int
    stopped: bool  # whether the token ends the request
    block_hash: bytes | None = None  # of the page that this token fills; None: it fills none, or the page is not cached


class ServiceChanged(Message, frozen=True):
    """Serve this request, and those that fork it, in another way from here on: they start over at their new place in
    the order, with the tokens they have. Unknown or finished requests are ignored, and those that fork one that is
    here."""

    t: float
    request_id: int
    service: Service


class StepDone(Message, frozen=True):
    """A step was read back. Outcomes come in the order of the rows, and of the steps for several decode steps."""

    t: float
    mesh: int
    step: int
    outcomes: tuple[Outcome, ...]


class TransferReady(Message, frozen=True):
    """A transfer's KV has arrived in the destination's staging, ready to be scattered."""

    t: float
    transfer: int


class TransferFailed(Message, frozen=True):
    """A transfer raised on its way; the KV pools are whole."""

    t: float
    transfer: int
    reason: str


class RequestFailed(Message, frozen=True):
    """A request cannot go on, whatever its mesh does. Unknown or finished requests are ignored."""

    t: float
    request_id: int
    reason: str


class MeshFailed(Message, frozen=True):
    """A step on this mesh raised; its KV pool is gone and has been made anew."""

    t: float
    mesh: int
    reason: str


class SetRoles(Message, frozen=True):
    """Give so many meshes of a pool these roles (`counts`), or these meshes (`meshes`); the other is empty.

    `RolesSettled` answers. A later call supersedes this one, and when `due` comes without the roles it has failed.
    """

    t: float
    call: int  # its number
    due: float  # in seconds on the engine's clock
    counts: dict[RoleName, int]
    meshes: dict[int, RoleName]


class Tick(Message, frozen=True):
    """Nothing has happened but that time has passed: an instant that `Scheduler.next_due` named has come."""

    t: float


class Hold(Message, frozen=True):
    """Admit nothing from here on; what runs goes on to its end."""

    t: float


class Resume(Message, frozen=True):
    """Admit again. The parameters have changed: every cached page is void."""

    t: float


Event = (
    Arrived
    | AbortRequested
    | PreemptRequested
    | MigrateRequested
    | ServiceChanged
    | StepDone
    | TransferReady
    | TransferFailed
    | RequestFailed
    | MeshFailed
    | SetRoles
    | Tick
    | Hold
    | Resume
)
