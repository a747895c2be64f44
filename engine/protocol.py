"""The language between the scheduler and whatever performs its decisions: events in, actions out.

Real executor and simulator speak it alike, so a remote worker could too. Actions on one mesh must be dispatched in the
order given: pages and slots are handed on in that order (a page freed by one action may be written by the next).
Control-plane module: no JAX here, no tokens, no arrays.
"""

from dataclasses import dataclass
from typing import Literal

from .request import Request

FinishReason = Literal["stop", "length", "abort", "error"]

# ---- events: each carries its time `t`, in seconds on the engine's clock


@dataclass(frozen=True)
class Arrived:
    """A request that passed every check enters."""

    t: float
    request: Request


@dataclass(frozen=True)
class AbortRequested:
    """The caller no longer wants this request. Unknown or finished requests are ignored."""

    t: float
    request_id: str


@dataclass(frozen=True)
class Outcome:
    """A token was sampled for this request, which still runs; `stopped` says whether the token ends it."""

    request_id: str
    stopped: bool


@dataclass(frozen=True)
class StepDone:
    """A prefill or decode step was read back."""

    t: float
    mesh: int
    step: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class TransferReady:
    """A hand-off's KV has arrived in the destination's staging, ready to be scattered."""

    t: float
    transfer: int


@dataclass(frozen=True)
class TransferFailed:
    """A hand-off raised on its way; the KV pools are whole."""

    t: float
    transfer: int
    reason: str


@dataclass(frozen=True)
class MeshFailed:
    """A step on this mesh raised; its KV pool is gone and has been made anew."""

    t: float
    mesh: int
    reason: str


Event = Arrived | AbortRequested | StepDone | TransferReady | TransferFailed | MeshFailed

# ---- actions


@dataclass(frozen=True)
class AssignPages:
    """From here on this slot's page table is `pages`."""

    mesh: int
    slot: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """`length` prompt tokens from `start` on. The last chunk of a prompt samples the first token."""

    request_id: str
    slot: int
    epoch: int
    start: int
    length: int
    is_last: bool


@dataclass(frozen=True)
class Prefill:
    """One packed prefill step, padded to `bucket` tokens."""

    mesh: int
    step: int
    bucket: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DecodeRow:
    """One request's row of a decode step; `kv_len` counts its tokens in the cache, the one being fed included."""

    slot: int
    epoch: int
    kv_len: int


@dataclass(frozen=True)
class Decode:
    """One decode step, padded to `bucket` rows."""

    mesh: int
    step: int
    bucket: int
    rows: tuple[DecodeRow, ...]


@dataclass(frozen=True)
class StartTransfer:
    """Gather the prompt's pages and the request's state on `source`, padded to `bucket` pages, and send them to
    `destination`'s staging."""

    transfer: int
    bucket: int
    source: int
    source_slot: int
    source_pages: tuple[int, ...]
    destination: int


@dataclass(frozen=True)
class Scatter:
    """Write a staged transfer, which is ready, into the pages and the slot reserved for it."""

    transfer: int
    destination: int
    slot: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class DropTransfer:
    """Nobody needs this transfer any more: let go of its staging."""

    transfer: int


@dataclass(frozen=True)
class Finish:
    """The request is over; `error` says why it failed."""

    request_id: str
    reason: FinishReason
    error: str | None = None


Action = AssignPages | Prefill | Decode | StartTransfer | Scatter | DropTransfer | Finish
