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
    def is_empty(self) -> bool:
        """Return whether none waits."""
        return not self._placements

    def are_too_many(self, without: Set[Placement] = frozenset(), freed: Sequence[int] = ()) -> bool:
        """Return whether pages wait, and those that wait and that will, of prompts being computed, are over half of a
        group; `without` some placements, and the pages that those would free in each group."""
        if not self._placements or not self._placements.keys() - without:
            return False
        held = [pages.num_pages - pages.num_free for pages in self._groups]
        left = [count - less for count, less in zip(held, freed, strict=True)] if freed else held
        return any(2 * count > pages.num_pages for count, pages in zip(left, self._groups, strict=True))

    def check(self, placements: Sequence[Placement]) -> None:
        """Raise unless these are the placements that wait."""
        counts = [sum(len(x.tables[group].pages) for x in placements) for group in range(len(self._groups))]
        if self._counts != counts or self._placements.keys() != set(placements):
            raise RuntimeError(f"{len(placements)} requests wait for credit, {self._counts} pages are counted")
