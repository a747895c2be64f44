"""Counts the holders of each KV page of one cache group on one mesh, and of each slot.

A page is free, or it has holders: any number of requests, and the prefix cache, which finds full pages by the hash of
all tokens up to their end. A page that only the cache holds is idle: it counts as free, and the one used least recently
is the first to be given out. A page may be written by its only holder, so never while it is cached. `check` proves that
none is lost or counted twice.
"""

from collections import Counter, OrderedDict, deque


class PageAllocator:
    """Pages 0 to num_pages - 1 of one cache group."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._holders = Counter[int]()
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Return the number of pages that no request holds."""
        return len(self._free) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Allocate `count` pages to one holder; the caller has checked `num_free`."""
        if count > self.num_free:
            raise RuntimeError(f"{count} pages cannot be allocated: {self.num_free} of {self.num_pages} are free.")
        pages = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def hold(self, page: int) -> None:
        """Count one more holder of this page, which is held or cached."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """Count one holder less of this page; without any it is left to the prefix cache or free."""
        self._holders[page] -= 1
        if self._holders[page]:
            return
        del self._holders[page]
        if page in self._hash_of:
            self._idle[page] = None
        else:
            self._free.append(page)

    def holders(self, page: int) -> int:
        """Return how many requests hold this page."""
        return self._holders[page]

    def is_writable(self, page: int) -> bool:
        """Return whether this page has one holder and is not cached, so that its holder may write to it."""
        return self._holders[page] == 1 and page not in self._hash_of

    def is_idle(self, page: int) -> bool:
        """Return whether only the prefix cache holds this page."""
        return page in self._idle

    def find(self, block_hash: bytes) -> int | None:
        """Find the cached page whose tokens have this hash; None: no page is cached for it."""
        return self._page_of.get(block_hash)

    def cache(self, page: int, block_hash: bytes) -> None:
        """Let later requests find this full page, which a request holds; an earlier page with the same hash stays."""
        if block_hash not in self._page_of and page not in self._hash_of:
            self._page_of[block_hash] = page
            self._hash_of[page] = block_hash

    def flush(self) -> None:
        """Empty the prefix cache; requests keep what they hold."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._hash_of.clear()

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._hash_of.pop(page)]
        return page

    def check(self, held: Counter[int]) -> None:
        """Raise unless `held`, page -> requests that hold it, is what is counted here, and all else is free or idle."""
        if held != self._holders:
            raise RuntimeError(f"pages held {dict(held)}, counted {dict(self._holders)}")
        if sorted([*self._free, *self._idle, *self._holders]) != list(range(self.num_pages)):
            raise RuntimeError(f"pages lost or doubled: free {list(self._free)}, idle {list(self._idle)}, held {held}")
        if {page: key for key, page in self._page_of.items()} != self._hash_of or set(self._idle) - set(self._hash_of):
            raise RuntimeError("the prefix cache and its pages do not match")


class SlotTable:
    """Rows of a mesh's per-request device state."""

    def __init__(self, num_slots: int):
        self._free = deque(range(num_slots))
        self._holders: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Return the number of slots that no request holds."""
        return len(self._free)

    @property
    def holders(self) -> dict[int, int]:
        """Map each slot in use to the id of the request that holds it."""
        return dict(self._holders)

    def allocate(self, request_id: int) -> int:
        """Allocate a free slot to a request; the caller has checked `num_free`."""
        slot = self._free.popleft()
        self._holders[slot] = request_id
        return slot

    def release(self, slot: int) -> None:
        """Free a slot."""
        del self._holders[slot]
        self._free.append(slot)
