"""What the scheduler is told, each event with its time `t` in seconds on the engine's clock."""

from .message import Message, Row


class RequestFacts(Message, frozen=True):
    """A request as it arrives.

    `block_hashes`: one per full page of the prompt, of all tokens up to its end (`paging/block_hash.py`);
    empty: the request neither reads nor feeds the prefix cache. `fork_of`: the request whose prompt this one shares to
    the last token, submitted before it (`n > 1`).
    """

    id: int
    prompt_len: int
    max_tokens: int
    block_hashes: tuple[bytes, ...] = ()
    fork_of: int | None = None


class Arrived(Message, frozen=True):
    """A request that passed every check enters."""

    t: float
    facts: RequestFacts


class AbortRequested(Message, frozen=True):
    """The caller no longer wants this request. Unknown or finished requests are ignored."""

    t: float
    request_id: int


class PreemptRequested(Message, frozen=True):
    """Give up the KV of this request and compute it again later. Ignored unless it has a placement."""

    t: float
    request_id: int


class MigrateRequested(Message, frozen=True):
    """Move this request's KV to another decoding mesh: `destination`, or None for any. Ignored unless it is decoding
    and there is room."""

    t: float
    request_id: int
    destination: int | None = None


class Outcome(Row, frozen=True):
    """A token was sampled for this request, which still runs; `stopped` says whether the token ends it.

    `block_hash`: of the page that this token is the last one of, else None.
    """

    request_id: int
    stopped: bool
    block_hash: bytes | None = None


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


class MeshFailed(Message, frozen=True):
    """A step on this mesh raised; its KV pool is gone and has been made anew."""

    t: float
    mesh: int
    reason: str


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
    | StepDone
    | TransferReady
    | TransferFailed
    | MeshFailed
    | Hold
    | Resume
)
