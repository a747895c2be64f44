"""Which meshes have a block cached: one index over the prefix caches of an engine, so that nobody has to ask each.

Sets of meshes are ints: bit m stands for mesh m. The caches keep the index, each by a `Listing` of its own, whenever
they enter a block or strike one out. Invariant: a block is listed for exactly those meshes whose cache has it; of a
mesh's cache groups the first that sees all tokens is listed or, where all have windows, the first.

It says where to look, not what a prompt would find there: of a chain a mesh may have lost an earlier block, or the
pages of a window. `MeshPages.hit` knows. What blocks were struck out for is kept in `lost`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

from ..protocol.cache_report import MissReason
from .lost_blocks import LostBlocks


class PrefixIndex:
    """For every cached block, the meshes that have it."""

    def __init__(self) -> None:
        self._meshes: dict[bytes, int] = {}
        self.lost = LostBlocks()

    def listing(self, mesh: int) -> "CacheListing":
        """Return what the cache of this mesh reports to."""
        return CacheListing(self._meshes, 1 << mesh, self.lost)

    def meshes(self, block: bytes) -> int:
        """Return the meshes that have this block."""
        return self._meshes.get(block, 0)

    def depth(self, hashes: Sequence[bytes], stop: int, among: int) -> int:
        """Count the first blocks of a chain that one of these meshes has, `stop` at most.

        By doubling and then bisection: a chain is cached from its start, since its last pages are evicted first. Where
        they were not, the count may pass over blocks that are missing.
        """
        meshes, low, high = self._meshes, 0, 1
        while high <= stop and meshes.get(hashes[high - 1], 0) & among:
            low, high = high, 2 * high
        high = min(high, stop + 1)
        while high - low > 1:
            middle = (low + high) // 2
            if meshes.get(hashes[middle - 1], 0) & among:
                low = middle
            else:
                high = middle
        return low

    def check(self, mesh: int, blocks: Collection[bytes]) -> None:
        """Raise unless exactly these blocks are listed for the mesh."""
        listed = {block for block, meshes in self._meshes.items() if meshes >> mesh & 1}
        if listed != set(blocks):
            raise RuntimeError(f"mesh {mesh}: {len(listed ^ set(blocks))} blocks are listed and not cached, or reverse")


class Listing:
    """One mesh's part of an index: of what is cached, or of what else meshes have blocks for."""

    def __init__(self, meshes: dict[bytes, int], bit: int):
        self._meshes, self._bit = meshes, bit

    def enter(self, blocks: Iterable[bytes]) -> None:
        """List blocks that the mesh has now."""
        meshes, bit = self._meshes, self._bit
        for block in blocks:
            others = meshes.get(block)
            meshes[block] = bit if others is None else others | bit

    def strike(self, blocks: Iterable[bytes]) -> None:
        """Strike out blocks that it has no more."""
        meshes, bit = self._meshes, self._bit
        for block in blocks:
            if meshes[block] == bit:
                del meshes[block]
            else:
                meshes[block] ^= bit


class CacheListing(Listing):
    """One prefix cache's part of the index."""

    def __init__(self, meshes: dict[bytes, int], bit: int, lost: LostBlocks):
        super().__init__(meshes, bit)
        self._lost = lost

    def evict(self, blocks: Collection[bytes]) -> None:
        """Strike out blocks whose pages are given to others."""
        self.strike(blocks)
        self._lost.note(blocks, MissReason.EVICTED)


def members(meshes: int) -> Iterator[int]:
    """Yield the meshes of a set, in order."""
    while meshes:
        yield (meshes & -meshes).bit_length() - 1
        meshes &= meshes - 1
