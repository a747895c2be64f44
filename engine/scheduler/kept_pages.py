"""The pages of a prefill mesh whose KV waits for credit elsewhere. Pages that several requests share count once."""

from collections.abc import Sequence, Set

from ..paging.allocator import PageAllocator
from ..paging.block_table import Placement


class KeptPages:
    """The placements that wait on one mesh, whose pages do not change meanwhile."""

    def __init__(self, groups: Sequence[PageAllocator]):
        """Begin without any; `groups` are the mesh's pages of each cache group."""
        self._groups = groups
        self._placements: dict[Placement, None] = {}
        self._counts = [0] * len(groups)  # of their pages, shared ones as often as they are shared

    def add(self, placement: Placement) -> None:
        """Count the pages of a request that begins to wait."""
        self._placements[placement] = None
        for group, table in enumerate(placement.tables):
            self._counts[group] += len(table.pages)

    def remove(self, placement: Placement) -> None:
        """Count no more the pages of a request that waits no longer."""
        del self._placements[placement]
        for group, table in enumerate(placement.tables):
            self._counts[group] -= len(table.pages)

    @property
    def fill_half(self) -> bool:
        """Return whether they are over half of a group. Which are shared is asked only where it may matter."""
        return bool(self._placements) and any(
            2 * count > pages.num_pages and 2 * self._distinct(group) > pages.num_pages
            for group, (count, pages) in enumerate(zip(self._counts, self._groups, strict=True))
        )

    def would_fill_half(self, without: Set[Placement]) -> bool:
        """Return whether they would be over half of a group if some of them went."""
        return self.fill_half and any(
            2 * self._distinct(group, without) > pages.num_pages for group, pages in enumerate(self._groups)
        )

    def _distinct(self, group: int, without: Set[Placement] = frozenset()) -> int:
        left = [placement for placement in self._placements if placement not in without]
        return len(set().union(*(placement.tables[group].pages for placement in left)))

    def check(self, placements: Sequence[Placement]) -> None:
        """Raise unless these are the placements that wait."""
        counts = [sum(len(x.tables[group].pages) for x in placements) for group in range(len(self._groups))]
        if self._counts != counts or self._placements.keys() != set(placements):
            raise RuntimeError(f"{len(placements)} requests wait for credit, {self._counts} pages are counted")
