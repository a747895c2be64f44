"""What an executor performs: the scheduler's actions, and the commands that the core adds to them.

Actions on one mesh must be dispatched in the order given: pages and slots are handed on in that order (a page freed by
one action may be written by the next). Actions hold no tokens. Those of a request cross in `Accept`; every other token
is on the device already.

"Pages per group" is a tuple with one entry per cache group (`EngineConfig.windows`), each a tuple of page ids.
"""

from typing import Literal

import numpy as np

from .message import Message, Row
from .sampling_plan import SamplingPlan

FinishReason = Literal["stop", "length", "abort", "error", "deadline"]
# How a call for roles ends: every mesh has its role and nothing else to do; a later call took its place; the roles
# would leave a phase without a mesh; or a mesh had work left when the time was over.
RolesOutcome = Literal["reached", "superseded", "refused", "late"]
PagesPerGroup = tuple[tuple[int, ...], ...]

# ---- the scheduler's actions


class AssignPages(Message, frozen=True):
    """Set entries `first`, `first` + 1, ... of this slot's page table of this cache group to `pages`."""

    mesh: int
    slot: int
    group: int
    first: int
    pages: tuple[int, ...]


class CopyPage(Message, frozen=True):
    """Copy a page of a cache group, for one of its holders; the others keep the source (copy on write)."""

    mesh: int
    group: int
    source: int
    destination: int


class Chunk(Row, frozen=True):
    """Prefill `length` tokens of a request, prompt first and then what it has generated, from position `start` on.

    The last chunk samples a token: output number start + length - prompt_len + 1.
    """

    request_id: int
    run: int
    slot: int
    start: int
    length: int
    write_from: int  # positions below it have their KV in the cache, and are not written
    is_last: bool

    @property
    def kv_len(self) -> int:
        """Return how many tokens are in the cache once the chunk is."""
        return self.start + self.length


class DecodeRow(Row, frozen=True):
    """Decode a request's next token, which is output number kv_len - prompt_len + 1."""

    request_id: int
    run: int
    slot: int
    kv_len: int  # the request's tokens in the cache, the one being fed included
    is_forced: bool = False  # feed the token that was generated at position kv_len - 1 before, not the device's own


class Prefill(Message, frozen=True):
    """Run one packed prefill step, padded to `bucket` tokens."""

    mesh: int
    step: int
    bucket: int
    chunks: tuple[Chunk, ...]


class Decode(Message, frozen=True):
    """Run `steps` decode steps in one dispatch, padded to `bucket` rows. Rows describe the first of them."""

    mesh: int
    step: int
    bucket: int
    steps: int
    rows: tuple[DecodeRow, ...]


class Fused(Message, frozen=True):
    """Run prompt chunks, padded to `bucket` tokens, and one decode step of `rows` in one dispatch."""

    mesh: int
    step: int
    bucket: int
    chunks: tuple[Chunk, ...]
    rows: tuple[DecodeRow, ...]


class StartTransfer(Message, frozen=True):
    """Gather pages on `source`, padded to `bucket` pages, and send them to `destination`'s staging.

    Some slot's request state always goes along; where `source_slot` is None it is dropped on arrival.
    """

    transfer: int
    bucket: int
    source: int
    source_slot: int | None  # the slot whose request state goes along; None: the state comes with a later transfer
    source_pages: PagesPerGroup
    destination: int


class Scatter(Message, frozen=True):
    """Write a staged transfer, which is ready, into the pages and, if state came along, the slot reserved for it."""

    transfer: int
    destination: int
    slot: int | None
    pages: PagesPerGroup


class DropTransfer(Message, frozen=True):
    """Free the staging of a transfer that is not needed any more."""

    transfer: int


class Finish(Message, frozen=True):
    """End a request."""

    request_id: int
    reason: FinishReason
    error: str | None = None  # why it failed, for the reason "error"


class RolesSettled(Message, frozen=True):
    """Answer a `SetRoles`. It is for the core alone: no device has a part in it."""

    call: int
    outcome: RolesOutcome
    why: str | None = None  # of those "refused" or "late", in one sentence


Action = (
    AssignPages | CopyPage | Prefill | Decode | Fused | StartTransfer | Scatter | DropTransfer | Finish | RolesSettled
)

# ---- what the core adds


class Accept(Message, frozen=True, eq=False):
    """Take in a request, in place of what was known of it: before the first chunk of each run, and before the first
    decode step where a hand-off has brought it, if it has a dense row, which no transfer carries.

    It holds all that is needed, so that an executor that has lost a request gets it whole with its next run.
    """

    request_id: int
    prompt: np.ndarray  # [n] int32
    plan: SamplingPlan
    generated: np.ndarray  # [k] int32: all tokens so far; k = 0 at the start of the first run


class AllowTokens(Message, frozen=True, eq=False):
    """Let rows of a mesh's next step, this one, draw only tokens whose bit is set: right before the step.

    A mask is of the row's next token alone, so that a `Decode` that has one is of one step.
    """

    mesh: int
    step: int
    request_ids: tuple[int, ...]  # of the rows
    masks: np.ndarray  # [n, w] int32, of each: token t is bit t % 32 of word t // 32; what has no word may not come


class ResetMesh(Message, frozen=True):
    """Make a mesh's KV pool anew, empty: a step that raised has taken the old one with it."""

    mesh: int


Command = Action | Accept | AllowTokens | ResetMesh
