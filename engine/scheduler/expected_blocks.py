"""Blocks that are not cached yet and will be: those that placements on one mesh are to bring, and which does.

They are to be computed there, or on their way there. Invariant: `anywhere` holds, for every block that any mesh
expects, the set of those meshes as an int (bit m is mesh m), so that nobody has to ask each of them.
"""

from collections.abc import Iterable

from ..paging.block_table import Placement
from ..paging.prefix_index import Listing


class ExpectedBlocks(dict[bytes, Placement]):
    """One mesh's expected blocks, each with the placement that was the first to be going to bring it."""

    def __init__(self, mesh: int, anywhere: dict[bytes, int]):
        """Begin without any; `anywhere` is the same for all meshes of an engine."""
        super().__init__()
        self._bit, self._anywhere = 1 << mesh, anywhere
        self._listing = Listing(anywhere, self._bit)

    def expect(self, blocks: Iterable[bytes], placement: Placement) -> None:
        """Expect blocks from this placement, unless another is to bring them first."""
        new = [block for block in blocks if block not in self]
        self.update(dict.fromkeys(new, placement))
        placement.underway += new
        self._listing.enter(new)

    def end(self, blocks: Iterable[bytes]) -> None:
        """Expect these blocks no more: they are here."""
        self._listing.strike([block for block in blocks if self.pop(block, None) is not None])

    def give_up(self, placement: Placement, blocks: Iterable[bytes]) -> None:
        """Expect these blocks no more, as far as they were to come from this placement."""
        gone = [block for block in blocks if self.get(block) is placement] if self else []
        for block in gone:
            del self[block]
        self._listing.strike(gone)

    def check(self) -> None:
        """Raise unless exactly the blocks that are expected here are known everywhere to be."""
        if {block for block, meshes in self._anywhere.items() if meshes & self._bit} != self.keys():
            raise RuntimeError("blocks are expected by a mesh that does not expect them, or reverse")
