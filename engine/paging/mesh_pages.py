"""One mesh's slots and KV pages over all cache groups: places requests, grows, forks and releases their placements.

Invariants: a placement gets all of its pages at once or none; a page is written only by its only holder (a shared one
is copied first); a windowed group keeps only the pages that a later token can see, and while a prompt is prefilled it
reuses those that slide out. Pages of full blocks can be found again by their hashes. Changes of a page table go out as
actions. It decides nothing: the scheduler chooses which requests are placed, and which are preempted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from ..config import EngineConfig
from ..protocol.actions import Action, AssignPages, CopyPage
from .allocator import PageAllocator, SlotTable
from .block_table import BlockTable, Placement


class MeshPages:
    """The slots and pages of one mesh."""

    def __init__(self, mesh: int, config: EngineConfig, pages: Sequence[int], emit: Callable[[Action], None]):
        """Make empty pools of `pages` pages, one per cache group; `emit` takes the actions that change page tables."""
        self._mesh, self._config, self._emit = mesh, config, emit
        self.slots = SlotTable(config.max_num_seqs)
        self.groups = [PageAllocator(count) for count in pages]

    @property
    def room(self) -> float:
        """Return the share of pages that are free, 0 to 1, in the group with the smallest share."""
        return min(pages.num_free / pages.num_pages for pages in self.groups)

    # ---- what is cached

    def hit(self, hashes: Sequence[bytes], tokens: int) -> int:
        """Count the first of `tokens` tokens that need not be computed: the longest run of cached full pages.

        Every group that sees all tokens needs all of the pages, a windowed one those that the next token sees. If all
        tokens are cached, the last one is computed again, for what follows it.
        """
        size = self._config.page_size
        count = min(len(hashes), tokens // size)
        for window, pages in self._windows():
            if window is None:
                count = len(_cached_run(pages, hashes[:count]))
        while count and not self._windows_are_cached(hashes, count, min(count * size, tokens - 1)):
            count -= 1
        return count * size

    def _windows_are_cached(self, hashes: Sequence[bytes], count: int, next_token: int) -> bool:
        return all(
            len(_cached_run(pages, hashes[first:count])) == count - first
            for window, pages in self._windows()
            if window is not None and (first := self._first_page(window, next_token)) < count
        )

    def _windows(self) -> Iterable[tuple[int | None, PageAllocator]]:
        return zip(self._config.windows, self.groups, strict=True)

    def _first_page(self, window: int | None, token: int) -> int:
        """Find the first page that the token at this position sees."""
        return 0 if window is None else max(0, token - window + 1) // self._config.page_size

    # ---- placements

    def place_prompt(
        self, request_id: int, hashes: Sequence[bytes], tokens: int, watermark: int
    ) -> tuple[Placement, int] | None:
        """Place `tokens` tokens to be prefilled; return the placement and how many of them are cached. None: no room.

        `watermark` pages of each group have to stay free besides.
        """
        cached = self.hit(hashes, tokens)
        shared, fresh = [], []
        for window, pages in self._windows():
            first, end = self._first_page(window, min(cached, tokens - 1)), cached // self._config.page_size
            shared.append(BlockTable(first, _cached_run(pages, hashes[first:end])))
            to_write = self._config.pages_for(tokens) - end
            # Never more than a pool is sure to have; shared pages that slide out make room for fresh ones.
            most = to_write if window is None else self._config.most_pages(window) - len(shared[-1].pages)
            fresh.append(min(to_write, most))
        placement = self._place(request_id, shared, fresh, watermark)
        if placement is None:
            return None
        for group, (window, table) in enumerate(zip(self._config.windows, placement.tables, strict=True)):
            if window is None:
                table.pages += table.spare
                table.spare = []
            self._assign(placement, group, table.first)
        return placement, cached

    def reserve(
        self, request_id: int, hashes: Sequence[bytes], tokens: int, watermark: int
    ) -> tuple[Placement, list[int]] | None:
        """Place `tokens` tokens whose KV comes from another mesh, with `watermark` pages of each group left free.

        Return the placement, and for each group the first page that has to be sent: those before it are cached here.
        None: no room.
        """
        shared, fresh = [], []
        for window, pages in self._windows():
            first, end = self._first_page(window, tokens), self._config.pages_for(tokens)
            run = _cached_run(pages, hashes[first : tokens // self._config.page_size])
            shared.append(BlockTable(first, run))
            fresh.append(end - first - len(run))
        placement = self._place(request_id, shared, fresh, watermark)
        if placement is None:
            return None
        there = [table.end for table in placement.tables]
        for group, table in enumerate(placement.tables):
            table.pages += table.spare
            table.spare = []
            self._assign(placement, group, table.first)
        return placement, there

    def _place(self, request_id: int, shared: list[BlockTable], fresh: list[int], watermark: int) -> Placement | None:
        """Make a placement whose tables begin with shared pages and have fresh ones to spare."""
        if not self.slots.num_free:
            return None
        for pages, table, count in zip(self.groups, shared, fresh, strict=True):
            idle = sum(pages.is_idle(page) for page in table.pages)
            if count + idle + watermark > pages.num_free:
                return None
        for pages, table, count in zip(self.groups, shared, fresh, strict=True):
            for page in table.pages:
                pages.hold(page)
            table.spare = pages.allocate(count)
        return Placement(self._mesh, self.slots.allocate(request_id), shared)

    def fork(self, request_id: int, placement: Placement) -> Placement | None:
        """Make a second placement over the same pages, which are copied before either writes to them; None: no slot."""
        if not self.slots.num_free:
            return None
        placement.writable = 0
        tables = [BlockTable(table.first, list(table.pages)) for table in placement.tables]
        for pages, table in zip(self.groups, tables, strict=True):
            for page in table.pages:
                pages.hold(page)
        twin = Placement(self._mesh, self.slots.allocate(request_id), tables)
        for group, table in enumerate(tables):
            self._assign(twin, group, table.first)
        return twin

    def release(self, placement: Placement) -> None:
        """Free a placement. Its last pages are freed first: without them a cached prefix is only shorter."""
        for pages, table in zip(self.groups, placement.tables, strict=True):
            for page in [*table.spare, *reversed(table.pages)]:
                pages.release(page)
        self.slots.release(placement.slot)

    def remember(self, placement: Placement, hashes: Sequence[bytes], tokens: int) -> None:
        """Cache the full pages of the first `tokens` tokens, whose KV is in the placement's pages in device order."""
        stop = min(len(hashes), tokens // self._config.page_size)
        for pages, table in zip(self.groups, placement.tables, strict=True):
            for i in range(table.first, min(stop, table.end)):
                pages.cache(table.pages[i - table.first], hashes[i])

    def flush(self) -> None:
        """Empty the prefix cache."""
        for pages in self.groups:
            pages.flush()

    # ---- growth

    def place_chunk(self, placement: Placement, start: int, stop: int) -> bool:
        """Put pages in place for prefilling tokens `start` to `stop` - 1; False: too few are free.

        Fails only where other requests have meanwhile found pages of a windowed group that were to be reused.
        """
        for group, (window, pages) in enumerate(self._windows()):
            if window is None:
                continue
            table = placement.tables[group]
            for page in self._slide(table, window, start):
                only_holder = pages.holders(page) == 1
                pages.release(page)
                if only_holder:
                    table.spare += pages.allocate(1)
            count = self._config.pages_for(stop) - table.end
            missing = max(0, count - len(table.spare))
            if missing > pages.num_free:
                return False
            table.spare += pages.allocate(missing)
            self._append(placement, group, count)
        return True

    def end_prompt(self, placement: Placement) -> None:
        """Free what was reserved for the prompt and not needed."""
        for pages, table in zip(self.groups, placement.tables, strict=True):
            for page in table.spare:
                pages.release(page)
            table.spare = []

    def grow(self, placement: Placement, start: int, stop: int) -> bool:
        """Put pages in place that decoding may write tokens `start` to `stop` - 1 to; False: too few are free.

        Shared pages are copied.
        """
        if stop <= placement.writable:
            return True
        size = self._config.page_size
        plans = []
        for group, (window, pages) in enumerate(self._windows()):
            table = placement.tables[group]
            if window is not None:
                for page in self._slide(table, window, start):
                    pages.release(page)
            written = range(start // size, min(table.end, self._config.pages_for(stop)))
            copies = [i for i in written if not pages.is_writable(table.pages[i - table.first])]
            more = self._config.pages_for(stop) - table.end
            if len(copies) + max(0, more) > pages.num_free:
                return False
            plans.append((group, copies, more))
        for group, copies, more in plans:
            for i in copies:
                self._copy(placement, group, i)
            if more > 0:
                placement.tables[group].spare += self.groups[group].allocate(more)
                self._append(placement, group, more)
        placement.writable = size * min(table.end for table in placement.tables)
        return True

    def _slide(self, table: BlockTable, window: int, token: int) -> list[int]:
        """Take the pages out of the table that neither this token nor a later one sees, and return them."""
        count = min(len(table.pages), max(0, self._first_page(window, token) - table.first))
        gone, table.pages = table.pages[:count], table.pages[count:]
        table.first += count
        return gone

    def _append(self, placement: Placement, group: int, count: int) -> None:
        table = placement.tables[group]
        if count > 0:
            end = table.end
            table.pages += table.spare[:count]
            del table.spare[:count]
            self._assign(placement, group, end)

    def _copy(self, placement: Placement, group: int, index: int) -> None:
        table, pages = placement.tables[group], self.groups[group]
        old, (new,) = table.pages[index - table.first], pages.allocate(1)
        self._emit(CopyPage(self._mesh, group, old, new))
        pages.release(old)
        table.pages[index - table.first] = new
        self._emit(AssignPages(self._mesh, placement.slot, group, index, (new,)))

    def _assign(self, placement: Placement, group: int, first: int) -> None:
        """Emit the change of the device's page table: the placement's pages from page `first` of the sequence on."""
        table = placement.tables[group]
        if pages := table.between(first, table.end):
            self._emit(AssignPages(self._mesh, placement.slot, group, first, pages))

    def check(self, placements: dict[int, Placement]) -> None:
        """Raise unless these placements, request -> placement, account for every slot and page."""
        if self.slots.holders != {placement.slot: request_id for request_id, placement in placements.items()}:
            raise RuntimeError(f"mesh {self._mesh}: slots {self.slots.holders}, placements of {list(placements)}")
        for group, pages in enumerate(self.groups):
            tables = [placement.tables[group] for placement in placements.values()]
            pages.check(Counter(page for table in tables for page in [*table.pages, *table.spare]))


def _cached_run(pages: PageAllocator, hashes: Sequence[bytes]) -> list[int]:
    """Find the cached pages of these blocks, up to the first that is not cached."""
    return list(takewhile(lambda page: page is not None, map(pages.find, hashes)))  # type: ignore[arg-type]
