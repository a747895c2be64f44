"""One mesh's slots and KV pages over all cache groups: places requests, grows, forks and releases their placements.

Invariants: a placement gets all of its pages at once or none; a page is written only by its only holder (a shared one
is copied first); a windowed group keeps only the pages that a later token can see, and while a prompt is prefilled it
reuses those that slide out. Pages of full blocks can be found again by their hashes. Changes of a page table go out as
actions. It decides nothing: the scheduler chooses which requests are placed, and which are preempted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import takewhile
from math import inf

import numpy as np

from ..config import EngineConfig
from ..protocol.actions import Action, AssignPages, CopyPage
from ..protocol.cache_report import MissReason
from .allocator import PageAllocator, SlotTable
from .block_table import BlockTable, Placement
from .prefix_cache import Run
from .prefix_index import PrefixIndex
from .room import RoomChanges


class MeshPages:
    """The slots and pages of one mesh."""

    def __init__(
        self,
        mesh: int,
        config: EngineConfig,
        pages: Sequence[int],
        emit: Callable[[Action], None],
        index: PrefixIndex,
        room: RoomChanges,
    ):
        """Make empty pools of `pages` pages, one per cache group; `emit` takes the actions that change page tables.

        `index` and `room` are told of what is cached, and of what is taken and freed.
        """
        self._mesh, self._config, self._emit, self._changes = mesh, config, emit, room
        self.slots = SlotTable(config.max_num_seqs)
        listed = config.windows.index(None) if None in config.windows else 0
        self.groups = [
            PageAllocator(count, index.listing(mesh) if group == listed else None) for group, count in enumerate(pages)
        ]
        self._index, self._listed = index, self.groups[listed].cached
        self.page_size = config.page_size
        # What `hit` was asked last, for a request that is ranked, and then placed: it changes with the caches alone.
        self._last_hit: tuple[Sequence[bytes] | None, int, int, int] = None, 0, 0, 0
        self._windows = list(zip(config.windows, self.groups, strict=True))
        self._whole = [group for window, group in self._windows if window is None]  # those that see all tokens
        self._most_pages = [(config.most_pages(window), group) for window, group in self._windows]
        self._windowed = [(window, group) for window, group in self._windows if window is not None]

    @property
    def room(self) -> float:
        """Return the share of pages that are free, 0 to 1, in the group with the smallest share."""
        return min([pages.num_free / pages.num_pages for pages in self.groups])

    @property
    def free_tokens(self) -> float:
        """Return how many tokens the free pages hold, those of windows apart."""
        return self.page_size * min([pages.num_free for pages in self._whole], default=inf)

    def longest(self, watermark: int) -> int:
        """Count the pages of the longest sequence that fits with nothing cached and `watermark` of each group left."""
        longest = self._config.max_pages
        for most, pages in self._most_pages:
            left = pages.num_free - watermark
            if left < most:
                longest = min(longest, left)
        return longest

    # ---- what is cached

    def hit(self, hashes: Sequence[bytes], tokens: int) -> int:
        """Count the first of `tokens` tokens that need not be computed: the longest run of cached full pages.

        Every group that sees all tokens needs all of the pages, a windowed one those that the next token sees. If all
        tokens are cached, the last one is computed again, for what follows it.
        """
        if not hashes:
            return 0
        changes = sum([pages.cached.changes for pages in self.groups])
        asked, asked_tokens, asked_at, cached = self._last_hit
        if asked is hashes and asked_tokens == tokens and asked_at == changes:
            return cached
        cached = self._find_hit(hashes, tokens)
        if len(hashes) >= tokens // self.page_size:  # no more will come that matter here
            self._last_hit = hashes, tokens, changes, cached
        return cached

    def _find_hit(self, hashes: Sequence[bytes], tokens: int) -> int:
        size = self.page_size
        count = min(len(hashes), tokens // size)
        for window, pages in self._windows:
            if window is None:
                count = pages.cached.run_length(hashes, count)
        if self._windowed:
            while count and not self._windows_are_cached(hashes, count, min(count * size, tokens - 1)):
                count -= 1
        return count * size

    def _windows_are_cached(self, hashes: Sequence[bytes], count: int, next_token: int) -> bool:
        return all(
            _count_cached(pages, hashes[first:count]) == count - first
            for window, pages in self._windowed
            if (first := self._first_page(window, next_token)) < count
        )

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
        for window, pages in self._windows:
            first, end = self._first_page(window, min(cached, tokens - 1)), cached // self._config.page_size
            shared.append((first, pages.cached.run(hashes[first:end])))
            to_write = self._config.pages_for(tokens) - end
            # Never more than a pool is sure to have; shared pages that slide out make room for fresh ones.
            most = to_write if window is None else self._config.most_pages(window) - (end - first)
            fresh.append(min(to_write, most))
        placement = self._place(request_id, shared, fresh, watermark)
        if placement is None:
            return None
        for group, (window, _) in enumerate(self._windows):
            table = placement.tables[group]
            if window is None:
                table.pages += table.spare
                table.spare = []
            self._assign(placement, group, table.first)
        placement.remembered = cached // self._config.page_size
        return placement, cached

    def reserve(
        self, request_id: int, hashes: Sequence[bytes], tokens: int, watermark: int
    ) -> tuple[Placement, list[int]] | None:
        """Place `tokens` tokens whose KV comes from another mesh, with `watermark` pages of each group left free.

        Return the placement, and for each group the first page that has to be sent: those before it are cached here.
        None: no room.
        """
        shared, fresh = [], []
        for window, pages in self._windows:
            first, end = self._first_page(window, tokens), self._config.pages_for(tokens)
            full = min(len(hashes), tokens // self._config.page_size)
            if window is None:
                stop = pages.cached.run_length(hashes, full)
            else:
                stop = first + _count_cached(pages, hashes[first:full])
            shared.append((first, pages.cached.run(hashes[first:stop])))
            fresh.append(end - stop)
        placement = self._place(request_id, shared, fresh, watermark)
        if placement is None:
            return None
        there = [table.end for table in placement.tables]
        for group, table in enumerate(placement.tables):
            table.pages += table.spare
            table.spare = []
            self._assign(placement, group, table.first)
        placement.remembered = min(there)
        return placement, there

    def _place(
        self, request_id: int, shared: Sequence[tuple[int, Run]], fresh: Sequence[int], watermark: int
    ) -> Placement | None:
        """Make a placement whose tables begin with shared pages, those of the sequence from a first one on, and have
        fresh ones to spare."""
        if not self.slots.num_free:
            return None
        for pages, (_, run), count in zip(self.groups, shared, fresh, strict=True):
            if count + pages.count_idle(run.array) + watermark > pages.num_free:
                return None
        tables = []
        for pages, (first, run), count in zip(self.groups, shared, fresh, strict=True):
            pages.hold(run.array)
            tables.append(BlockTable(first, run.pages.copy(), pages.allocate(count)))
        self._changes.touch(self._mesh)
        return Placement(self._mesh, self.slots.allocate(request_id), tables)

    def fork(self, request_id: int, placement: Placement) -> Placement | None:
        """Make a second placement over the same pages, which are copied before either writes to them; None: no slot."""
        if not self.slots.num_free:
            return None
        placement.writable = 0
        tables = [BlockTable(table.first, list(table.pages)) for table in placement.tables]
        for pages, table in zip(self.groups, tables, strict=True):
            pages.hold(np.array(table.pages, np.intp))
        self._changes.touch(self._mesh)
        twin = Placement(self._mesh, self.slots.allocate(request_id), tables, remembered=placement.remembered)
        for group, table in enumerate(tables):
            self._assign(twin, group, table.first)
        return twin

    def release(self, placement: Placement) -> None:
        """Free a placement. Its last pages are freed first: without them a cached prefix is only shorter."""
        for pages, table in zip(self.groups, placement.tables, strict=True):
            pages.release(table.spare)
            pages.release(reversed(table.pages))
        self.slots.release(placement.slot)
        self._changes.more(self._mesh)

    def remember(self, placement: Placement, hashes: Sequence[bytes], tokens: int) -> None:
        """Cache the full pages of the first `tokens` tokens, whose KV is in the placement's pages in device order."""
        stop, known = min(len(hashes), tokens // self._config.page_size), placement.remembered
        placement.remembered = max(known, stop)
        for pages, table in zip(self.groups, placement.tables, strict=True):
            start = known
            # A block may have been here in another page, which has been evicted since: the last ones go first.
            if self._windowed or (known and pages.cached.find(hashes[known - 1]) is None):
                start = max(table.first, pages.cached.run_length(hashes, stop))
            if start < stop:
                pages.cached.add(table.pages[start - table.first : stop - table.first], hashes[start:stop])
                self._changes.cached(hashes, start)

    def flush(self, reason: MissReason) -> None:
        """Empty the prefix cache, for this reason."""
        self._index.lost.note(self._listed.blocks, reason)
        for pages in self.groups:
            pages.flush()

    # ---- growth

    def place_chunk(self, placement: Placement, start: int, stop: int) -> bool:
        """Put pages in place for prefilling tokens `start` to `stop` - 1; False: too few are free.

        Fails only where other requests have meanwhile found pages of a windowed group that were to be reused.
        """
        for group, (window, pages) in enumerate(self._windows):
            if window is None:
                continue
            table = placement.tables[group]
            gone = self._slide(table, window, start)
            if gone:
                self._changes.more(self._mesh)
            for page in gone:
                only_holder = pages.holders(page) == 1
                pages.release((page,))
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
        if any(table.spare for table in placement.tables):
            self._changes.more(self._mesh)
        for pages, table in zip(self.groups, placement.tables, strict=True):
            pages.release(table.spare)
            table.spare = []

    def grow(self, placement: Placement, start: int, stop: int) -> bool:
        """Put pages in place that decoding may write tokens `start` to `stop` - 1 to; False: too few are free.

        Shared pages are copied.
        """
        if stop <= placement.writable:
            return True
        self._changes.touch(self._mesh)
        size = self._config.page_size
        plans = []
        for group, (window, pages) in enumerate(self._windows):
            table = placement.tables[group]
            if window is not None:
                gone = self._slide(table, window, start)
                if gone:
                    self._changes.more(self._mesh)
                    pages.release(gone)
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
        pages.release((old,))
        table.pages[index - table.first] = new
        self._emit(AssignPages(self._mesh, placement.slot, group, index, (new,)))

    def _assign(self, placement: Placement, group: int, first: int) -> None:
        """Tell the device about the placement's pages from page `first` of the sequence on."""
        if pages := tuple(placement.tables[group].pages[first - placement.tables[group].first :]):
            self._emit(AssignPages(self._mesh, placement.slot, group, first, pages))

    def check(self, placements: dict[int, Placement]) -> None:
        """Raise unless these placements, request -> placement, account for every slot and page."""
        if self.slots.holders != {placement.slot: request_id for request_id, placement in placements.items()}:
            raise RuntimeError(f"mesh {self._mesh}: slots {self.slots.holders}, placements of {list(placements)}")
        for group, pages in enumerate(self.groups):
            tables = [placement.tables[group] for placement in placements.values()]
            pages.check(Counter(page for table in tables for page in [*table.pages, *table.spare]))
        self._index.check(self._mesh, self._listed.blocks)


def _count_cached(pages: PageAllocator, hashes: Sequence[bytes]) -> int:
    """Count the first of these blocks that are cached, up to the first that is not."""
    return sum(1 for _ in takewhile(lambda page: page is not None, map(pages.cached.find, hashes)))
