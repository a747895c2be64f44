"""Counts the holders of each KV page of one cache group on one mesh, and of each slot.

A page is free, or it has holders: any number of requests, and the prefix cache, which finds full pages by the hash of
all tokens up to their end. A page that only the cache holds is idle: it counts as free, and the one used least recently
is the first to be given out. A page may be written by its only holder, so never while it is cached. `check` proves that
none is lost or counted twice.
"""

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

import numpy as np

from .prefix_cache import PrefixCache
from .prefix_index import CacheListing


class PageAllocator:
    """Pages 0 to num_pages - 1 of one cache group."""

    def __init__(self, num_pages: int, listing: CacheListing | None = None):
        """Begin with all pages free; `listing` is told of every block that is cached."""
        self.num_pages = num_pages
        self.num_free = num_pages  # that no request holds
        self._unused = 0  # the first page that was never given out: all are, in order, before any that has come back
        self._free = deque[int]()  # those that have come back
        self._holders = array("i", bytes(4 * num_pages))
        self._counts = np.frombuffer(self._holders, np.int32)  # the same memory, for many pages at once
        self.cached = PrefixCache(listing)
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Return the number of pages that the prefix cache alone holds."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` pages to one holder; the caller has checked `num_free`."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages cannot be allocated: {self.num_free} of {self.num_pages} are free.")
        free, holders = self._free, self._holders
        pages = list(range(self._unused, min(self._unused + count, self.num_pages)))
        self._unused += len(pages)
        if len(pages) < count:
            pages += [free.popleft() for _ in range(min(count - len(pages), len(free)))]
        if len(pages) < count:
            pages += self._evict(count - len(pages))
        for page in pages:
            holders[page] = 1
        self.num_free -= count
        return pages

    def hold(self, index: np.ndarray) -> None:
        """One more request holds these pages, no two alike, which are held or cached."""
        if self._idle:
            for page in index[self._counts[index] == 0].tolist():
                del self._idle[page]
                self.num_free -= 1
        self._counts[index] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One request less holds these pages; the last one leaves a page to the prefix cache or frees it."""
        holders, cached = self._holders, self.cached
        for page in pages:
            left = holders[page] = holders[page] - 1
            if left:
                continue
            self.num_free += 1
            if page in cached:
                self._idle[page] = None
            else:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """Return how many requests hold this page."""
        return self._holders[page]

    def is_writable(self, page: int) -> bool:
        """Whether this page has one holder and is not cached, so that its holder may write to it."""
        return self._holders[page] == 1 and page not in self.cached

    def count_idle(self, index: np.ndarray) -> int:
        """Count those of these pages that only the prefix cache holds."""
        return len(index) - int(np.count_nonzero(self._counts[index])) if self._idle else 0

    def flush(self) -> None:
        """Empty the prefix cache; requests keep what they hold."""
        self._free.extend(self._idle)
        self._idle.clear()
        self.cached.clear()

    def _evict(self, count: int) -> list[int]:
        pages = [self._idle.popitem(last=False)[0] for _ in range(count)]
        self.cached.evict(pages)
        return pages

    def check(self, held: Counter[int]) -> None:
        """Raise unless `held`, page -> requests that hold it, is what is counted here, and all else is free or idle."""
        counted = Counter({page: count for page, count in enumerate(self._holders) if count})
        if held != counted:
            raise RuntimeError(f"pages held {dict(held)}, counted {dict(counted)}")
        free = [*self._free, *range(self._unused, self.num_pages)]
        are_all = sorted([*free, *self._idle, *counted]) == list(range(self.num_pages))
        if not are_all or self.num_free != len(free) + len(self._idle):
            counts = f"{self.num_free} counted as free"
            raise RuntimeError(f"pages lost or doubled: {counts}, free {free}, idle {list(self._idle)}, held {held}")
        self.cached.check()
        if any(page not in self.cached for page in self._idle):
            raise RuntimeError("the prefix cache holds pages that it does not know")


class SlotTable:
    """Rows of a mesh's per-request device state."""

    def __init__(self, num_slots: int):
        self.num_free = num_slots  # that no request holds
        self._free = deque(range(num_slots))
        self._holders: dict[int, int] = {}

    @property
    def holders(self) -> dict[int, int]:
        """Map each slot in use to the id of the request that holds it."""
        return dict(self._holders)

    def allocate(self, request_id: int) -> int:
        """Allocate a free slot to a request; the caller has checked `num_free`."""
        slot = self._free.popleft()
        self.num_free -= 1
        self._holders[slot] = request_id
        return slot

    def release(self, slot: int) -> None:
        """Free a slot."""
        del self._holders[slot]
        self._free.append(slot)
        self.num_free += 1
