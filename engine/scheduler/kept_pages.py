"""The pages of a prefill mesh whose KV waits for credit elsewhere. Pages that several requests share count once."""

from collections import Counter
from collections.abc import Sequence

from ..paging.allocator import PageAllocator
from ..paging.block_table import Placement


class KeptPages:
    """Counts for one mesh."""

    def __init__(self, groups: Sequence[PageAllocator]):
        """Begin without any; `groups` are the mesh's pages of each cache group."""
        self._groups, self._waiting = groups, 0
        self._holders = [Counter[int]() for _ in groups]

    def add(self, placement: Placement) -> None:
        """Count the pages of a request that begins to wait."""
        self._waiting += 1
        for holders, table in zip(self._holders, placement.tables, strict=True):
            holders.update(table.pages)

    def remove(self, placement: Placement) -> None:
        """Count no more the pages of a request that waits no longer; they are those that it began with."""
        self._waiting -= 1
        for holders, table in zip(self._holders, placement.tables, strict=True):
            for page in table.pages:
                if holders[page] > 1:
                    holders[page] -= 1
                else:
                    del holders[page]

    @property
    def fill_half(self) -> bool:
        """Return whether they are over half of a group."""
        return self._waiting > 0 and any(
            2 * len(holders) > pages.num_pages for holders, pages in zip(self._holders, self._groups, strict=True)
        )

    def check(self, placements: Sequence[Placement]) -> None:
        """Raise unless these are the placements that wait."""
        for group, holders in enumerate(self._holders):
            if self._waiting != len(placements) or holders != Counter(
                page for placement in placements for page in placement.tables[group].pages
            ):
                raise RuntimeError(f"{len(placements)} requests wait for credit, and their pages are miscounted")
