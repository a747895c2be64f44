"""The language between the scheduler and whatever performs its decisions: events in, actions out.

Real executor and simulator speak it alike, so a remote worker could too. Actions on one mesh must be dispatched in the
order given: pages and slots are handed on in that order (a page freed by one action may be written by the next).
Control-plane module: no JAX here, no tokens, no arrays. Rows of steps are named tuples, which are cheap to make.

"Pages per group" is a tuple with one entry per cache group (`EngineConfig.windows`), each a tuple of page ids.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]
type PagesPerGroup = tuple[tuple[int, ...], ...]

# ---- events: each carries its time `t`, in seconds on the engine's clock


# ---- actions


@dataclass(frozen=True)
class AssignPages:
    """From here on entries `first`, `first` + 1, ... of this slot's page table of this cache group are `pages`."""

    mesh: int
    slot: int
    group: int
    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class CopyPage:
    """Copy a page of a cache group: its other holders keep the source (copy on write)."""

    mesh: int
    group: int
    source: int
    destination: int


class Chunk(NamedTuple):
    """`length` tokens of a request, prompt first and then what it has generated, from position `start` on.

    Positions below `write_from` have their KV in the cache and are not written. The last chunk samples a token: output
    number start + length - prompt_len + 1.
    """

    request_id: str
    run: int
    slot: int
    start: int
    length: int
    write_from: int
    is_last: bool

    @property
    def kv_len(self) -> int:
        """Tokens in the cache once the chunk is in."""
        return self.start + self.length


class DecodeRow(NamedTuple):
    """One request's row of a decode step; `kv_len` counts its tokens in the cache, the one being fed included.

    It samples output number kv_len - prompt_len + 1. `is_forced`: feed the token at position kv_len - 1 as it was
    generated before, not as the device has it.
    """

    request_id: str
    run: int
    slot: int
    kv_len: int
    is_forced: bool = False


@dataclass(frozen=True)
class Prefill:
    """One packed prefill step, padded to `bucket` tokens."""

    mesh: int
    step: int
    bucket: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Decode:
    """`steps` decode steps in one dispatch, padded to `bucket` rows. Rows describe the first of them."""

    mesh: int
    step: int
    bucket: int
    steps: int
    rows: tuple[DecodeRow, ...]


@dataclass(frozen=True)
class Fused:
    """Prompt chunks, padded to `bucket` tokens, and one decode step of `rows` in one dispatch."""

    mesh: int
    step: int
    bucket: int
    chunks: tuple[Chunk, ...]
    rows: tuple[DecodeRow, ...]


@dataclass(frozen=True)
class StartTransfer:
    """Gather pages on `source`, padded to `bucket` pages, and send them to `destination`'s staging.

    `source_slot`: whose request state goes along; None: the state comes with a later transfer, and what goes along with
    this one is dropped on arrival.
    """

    transfer: int
    bucket: int
    source: int
    source_slot: int | None
    source_pages: PagesPerGroup
    destination: int


@dataclass(frozen=True)
class Scatter:
    """Write a staged transfer, which is ready, into the pages and, if state came along, the slot reserved for it."""

    transfer: int
    destination: int
    slot: int | None
    pages: PagesPerGroup


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


Action = AssignPages | CopyPage | Prefill | Decode | Fused | StartTransfer | Scatter | DropTransfer | Finish
