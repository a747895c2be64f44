"""One mesh's slots and KV pages over all cache groups: seats are given, grown, shared and taken back here.

Invariants: a seat's pages are given all at once or not at all; a page is written only by its only holder (a shared one
is copied first); a windowed group keeps only the pages that a later token can see, and while a prompt is prefilled it
uses those that slide out again. Pages that full blocks
fill can be found again by their hashes. What changes in a page table goes out as actions. It decides nothing: which
request gets a seat, and who has to give his up, is the scheduler's business. Control-plane module: no JAX here.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from ..config import EngineConfig
from ..protocol.actions import Action, AssignPages, CopyPage
from .allocator import PageAllocator, SlotTable
from .block_table import BlockTable, Seat


class MeshCache:
    """The slots and pages of one mesh."""

    def __init__(self, mesh: int, config: EngineConfig, pages: Sequence[int], emit: Callable[[Action], None]):
        """`pages`: of each cache group. `emit` takes the actions that page tables on the device need."""
        self._mesh, self._config, self._emit = mesh, config, emit
        self.slots = SlotTable(config.max_num_seqs)
        self.groups = [PageAllocator(count) for count in pages]

    @property
    def room(self) -> float:
        """The share of pages that are free, in the group that has least; 0 to 1."""
        return min(pages.num_free / pages.num_pages for pages in self.groups)

    # ---- what is cached

    def hit(self, hashes: Sequence[bytes], tokens: int) -> int:
        """How many of the first `tokens` tokens need not be computed: the longest run of cached full pages.

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
        """The first page that the token at this position sees."""
        return 0 if window is None else max(0, token - window + 1) // self._config.page_size

    # ---- seats

    def seat_prompt(self, name: int, hashes: Sequence[bytes], tokens: int, watermark: int) -> tuple[Seat, int] | None:
        """Room for `tokens` tokens to be prefilled, and how many of them are cached; None: no room.

        `watermark`: pages of each group that have to stay free besides.
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
        seat = self._take(name, shared, fresh, watermark)
        if seat is None:
            return None
        for group, (window, table) in enumerate(zip(self._config.windows, seat.tables, strict=True)):
            if window is None:
                table.pages += table.spare
                table.spare = []
            self._assign(seat, group, table.first)
        return seat, cached

    def seat_arrival(
        self, name: int, hashes: Sequence[bytes], tokens: int, watermark: int
    ) -> tuple[Seat, list[int]] | None:
        """Room for `tokens` tokens whose KV comes from another mesh, and for each group the first page that has to
        come: those before it are cached here. None: no room.
        """
        shared, fresh = [], []
        for window, pages in self._windows():
            first, end = self._first_page(window, tokens), self._config.pages_for(tokens)
            run = _cached_run(pages, hashes[first : tokens // self._config.page_size])
            shared.append(BlockTable(first, run))
            fresh.append(end - first - len(run))
        seat = self._take(name, shared, fresh, watermark)
        if seat is None:
            return None
        there = [table.end for table in seat.tables]
        for group, table in enumerate(seat.tables):
            table.pages += table.spare
            table.spare = []
            self._assign(seat, group, table.first)
        return seat, there

    def _take(self, name: int, shared: list[BlockTable], fresh: list[int], watermark: int) -> Seat | None:
        """A seat whose tables begin with shared pages and have fresh ones to spare."""
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
        return Seat(self._mesh, self.slots.allocate(name), shared)

    def fork(self, name: int, seat: Seat) -> Seat | None:
        """A second seat over all of a seat's pages; None: no slot. Whoever writes first copies."""
        if not self.slots.num_free:
            return None
        seat.writable = 0
        tables = [BlockTable(table.first, list(table.pages)) for table in seat.tables]
        for pages, table in zip(self.groups, tables, strict=True):
            for page in table.pages:
                pages.hold(page)
        twin = Seat(self._mesh, self.slots.allocate(name), tables)
        for group, table in enumerate(tables):
            self._assign(twin, group, table.first)
        return twin

    def leave(self, seat: Seat) -> None:
        """Give a seat back. The last pages are freed first: without them a cached prefix is only shorter."""
        for pages, table in zip(self.groups, seat.tables, strict=True):
            for page in [*table.spare, *reversed(table.pages)]:
                pages.release(page)
        self.slots.release(seat.slot)

    def remember(self, seat: Seat, hashes: Sequence[bytes], tokens: int) -> None:
        """Cache the full pages among the first `tokens` tokens, whose KV is in the seat's pages in device order."""
        stop = min(len(hashes), tokens // self._config.page_size)
        for pages, table in zip(self.groups, seat.tables, strict=True):
            for i in range(table.first, min(stop, table.end)):
                pages.cache(table.pages[i - table.first], hashes[i])

    def flush(self) -> None:
        """Empty the prefix cache."""
        for pages in self.groups:
            pages.flush()

    # ---- growth

    def place_chunk(self, seat: Seat, start: int, stop: int) -> bool:
        """Have pages in place for prefilling tokens `start` to `stop` - 1; False: too few are free.

        That can only be where a windowed group's pages, meant to be used again, were meanwhile found by other requests.
        """
        for group, (window, pages) in enumerate(self._windows()):
            if window is None:
                continue
            table = seat.tables[group]
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
            self._append(seat, group, count)
        return True

    def end_prompt(self, seat: Seat) -> None:
        """Free what was reserved for the prompt and not needed."""
        for pages, table in zip(self.groups, seat.tables, strict=True):
            for page in table.spare:
                pages.release(page)
            table.spare = []

    def grow(self, seat: Seat, start: int, stop: int) -> bool:
        """Have pages that may be written for tokens `start` to `stop` - 1, which are decoded; False: too few are free.

        Shared pages are copied.
        """
        if stop <= seat.writable:
            return True
        size = self._config.page_size
        plans = []
        for group, (window, pages) in enumerate(self._windows()):
            table = seat.tables[group]
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
                self._copy(seat, group, i)
            if more > 0:
                seat.tables[group].spare += self.groups[group].allocate(more)
                self._append(seat, group, more)
        seat.writable = size * min(table.end for table in seat.tables)
        return True

    def _slide(self, table: BlockTable, window: int, token: int) -> list[int]:
        """Take out the pages that neither this token nor a later one sees."""
        count = min(len(table.pages), max(0, self._first_page(window, token) - table.first))
        gone, table.pages = table.pages[:count], table.pages[count:]
        table.first += count
        return gone

    def _append(self, seat: Seat, group: int, count: int) -> None:
        table = seat.tables[group]
        if count > 0:
            end = table.end
            table.pages += table.spare[:count]
            del table.spare[:count]
            self._assign(seat, group, end)

    def _copy(self, seat: Seat, group: int, index: int) -> None:
        table, pages = seat.tables[group], self.groups[group]
        old, (new,) = table.pages[index - table.first], pages.allocate(1)
        self._emit(CopyPage(self._mesh, group, old, new))
        pages.release(old)
        table.pages[index - table.first] = new
        self._emit(AssignPages(self._mesh, seat.slot, group, index, (new,)))

    def _assign(self, seat: Seat, group: int, first: int) -> None:
        """Tell the device about the seat's pages from page `first` of the sequence on."""
        table = seat.tables[group]
        if pages := table.between(first, table.end):
            self._emit(AssignPages(self._mesh, seat.slot, group, first, pages))

    def check(self, seats: dict[int, Seat]) -> None:
        """Raise unless these seats, request -> seat, account for every slot and page."""
        if self.slots.tenants != {seat.slot: name for name, seat in seats.items()}:
            raise RuntimeError(f"mesh {self._mesh}: slots {self.slots.tenants}, seats of {list(seats)}")
        for group, pages in enumerate(self.groups):
            tables = [seat.tables[group] for seat in seats.values()]
            pages.check(Counter(page for table in tables for page in [*table.pages, *table.spare]))


def _cached_run(pages: PageAllocator, hashes: Sequence[bytes]) -> list[int]:
    """The cached pages of these blocks, up to the first that is not cached."""
    return list(takewhile(lambda page: page is not None, map(pages.find, hashes)))  # type: ignore[arg-type]
