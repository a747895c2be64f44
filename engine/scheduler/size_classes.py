"""Waiting requests by how many pages their prompts take, so that where the first finds no room, the next that fits is
found without a look at those between.

Sizes are classes: each size its own up to seven pages, then four to a doubling, so that there are few of them however
many wait. Of a class only the first in the order is ever looked at. Invariant: `_heads` lists the first of every
class, in order.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import takewhile
from operator import itemgetter

from .mesh_state import SortedRequests, sorted_requests
from .order import Order
from .request import Request

_ORDER = itemgetter(0)


class SizeClasses:
    """Requests in order, by the size of their prompts, which does not change while they are here."""

    def __init__(self, page_size: int):
        """Begin empty; a page has `page_size` tokens."""
        self._page_size = page_size
        self._classes: dict[int, SortedRequests] = {}
        self._heads: list[tuple[Order, int, Request]] = []  # the order of the first of each class, the class, and it

    def __iter__(self) -> Iterator[Request]:
        for line in self._classes.values():
            yield from line

    @property
    def first(self) -> Request | None:
        """Return the first in the order."""
        return self._heads[0][2] if self._heads else None

    def pages(self, request: Request) -> int:
        """Return how many pages the request's prompt takes, with nothing cached."""
        return -(-request.to_prefill // self._page_size)

    def add(self, request: Request) -> None:
        """Take a request in."""
        size = self._size_class(request)
        line = self._classes.get(size)
        if line is None:
            line = self._classes[size] = sorted_requests()
        head = line[0].order if line else None
        line.add(request)
        if head is None or request.order < head:
            if head is not None:
                self._drop_head(head, size)
            insort(self._heads, (request.order, size, request))

    def remove(self, request: Request) -> None:
        """Take a request out."""
        size = self._size_class(request)
        line = self._classes[size]
        if line[0] is request:
            del line[0]
            self._change_head(request.order, size)
        else:
            line.remove(request)

    def take_next(self, request: Request, belongs: Callable[[Request], bool]) -> list[Request]:
        """Take out the first of this request's size, as far as all of them belong."""
        size = self._size_class(request)
        line = self._classes.get(size)
        taken = [] if line is None else list(takewhile(belongs, line))
        if line is not None and taken:
            del line[: len(taken)]
            self._change_head(taken[0].order, size)
        return taken

    def first_to_seat(self, pages: int, is_kept_for: Callable[[Request], bool]) -> Request | None:
        """Find the first whose prompt takes at most so many pages or for which freed pages are kept, among those that
        come first of their size."""
        for _, _, request in self._heads:
            if self.pages(request) <= pages or is_kept_for(request):
                return request
        return None

    def _size_class(self, request: Request) -> int:
        pages = self.pages(request)
        shift = max(0, pages.bit_length() - 3)
        return 4 * shift + (pages >> shift)

    def _change_head(self, order: Order, size: int) -> None:
        """Enter the first of a class in place of the one of this order."""
        self._drop_head(order, size)
        line = self._classes[size]
        if line:
            insort(self._heads, (line[0].order, size, line[0]))
        else:
            del self._classes[size]

    def _drop_head(self, order: Order, size: int) -> None:
        del self._heads[bisect_left(self._heads, order, key=_ORDER)]

    def check(self) -> None:
        """Raise unless the first of every size is known."""
        if self._heads != sorted(((line[0].order, size, line[0]) for size, line in self._classes.items()), key=_ORDER):
            raise RuntimeError(f"of {len(self._classes)} sizes of prompts {len(self._heads)} are known to have a first")
        for size, line in self._classes.items():
            if any(self._size_class(request) != size for request in line):
                raise RuntimeError(f"a prompt is listed among those of another size: {size}")
