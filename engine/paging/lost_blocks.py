"""Which blocks were cached once and are no more, since when and why: what a prompt that misses them is told.

Bounded: of the blocks lost, at least the last `most` are known and at most twice as many, in two dicts of which the
older is dropped when the younger is full. So nothing is looked for to make room, and to note many blocks is one update
of a dict. It is told of losses, not of blocks that are cached again: who asks has looked in the caches first.
"""

from collections.abc import Collection
from itertools import repeat
from typing import NamedTuple

from ..protocol.cache_report import MissReason

# At about 160 bytes a block, 20 MB at most; with pages of 64 tokens, 4 million tokens at least.
MOST = 2**16


class Loss(NamedTuple):
    """What became of a block."""

    reason: MissReason
    at: float  # in seconds on the engine's clock


class LostBlocks:
    """The blocks that the prefix caches of an engine have lost. `now` is the time of the event under way."""

    def __init__(self, most: int = MOST):
        """Begin without any."""
        self.now = 0.0
        self.voided: Loss | None = None  # when all that was cached before became void last
        self.times_voided = 0
        self._most = most
        self._young: dict[bytes, Loss] = {}
        self._old: dict[bytes, Loss] = {}

    def note(self, blocks: Collection[bytes], reason: MissReason) -> None:
        """Note that a cache loses these blocks now."""
        loss = Loss(reason, self.now)
        if len(self._young) + len(blocks) > self._most and self._young:
            self._young, self._old = {}, self._young
        self._young.update(zip(blocks, repeat(loss, self._most), strict=False))

    def void(self) -> None:
        """Note that the weights change now: what any request has left behind so far is of no use."""
        self.voided = Loss(MissReason.WEIGHTS_CHANGED, self.now)
        self.times_voided += 1

    def find(self, block: bytes) -> Loss | None:
        """Find what became of a block when it was lost last; None: it is not known to have been lost."""
        return self._young.get(block) or self._old.get(block)

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())
