"""The requests in WAITING, in the policy's order: those awake, and those that sleep until something is done for them.

Invariant: every request here is awake or asleep, never both. Those that sleep for the same are one group and cost
nothing, however many they are, until `done` names what they sleep for: from then on the first of them is looked at in
its turn with those awake, and sleeps on, it alone or with its whole group, or not. What there is to sleep for is
decided in `admission.py`. Nothing here takes longer than the logarithm of how many wait, except that of two groups that
come to sleep for the same the smaller is merged into the larger.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from .mesh_state import SortedRequests, sorted_requests
from .order import Order
from .request import Awaited, Request, Wait
from .size_classes import SizeClasses


@dataclass(eq=False)
class Group(Wait):
    """Requests that sleep for the same."""

    requests: SortedRequests = field(default_factory=sorted_requests)
    blocks: Sequence[bytes] = ()  # hashes of one of them
    common: int = 0  # how many of these blocks all of them have, at least

    def add(self, requests: Sequence[Request]) -> None:
        """Take in requests."""
        if not self.requests:
            self.blocks, self.common = requests[0].hashes, len(requests[0].hashes)
        for request in requests:
            self.common = _common(self.blocks, request.hashes, self.common)
            request.wait = self
        self.requests.update(requests)


class WaitingRequests:
    """A queue whose requests may sleep."""

    def __init__(self, page_size: int) -> None:
        """Begin empty; a page has `page_size` tokens."""
        self._awake, self._restarted = SizeClasses(page_size), sorted_requests()
        self._groups: dict[Awaited, Group] = {}
        self._done: dict[Awaited, None] = {}  # of the keys of `_groups`, those whose requests have to be asked again
        # The first request's order of every group in `_done`, and of some that were: those are passed over.
        self._heap: list[tuple[Any, int, Awaited]] = []
        self._entries = count()
        self.changes = 0  # how often one has come, gone, fallen asleep or had to be asked again
        self.count = self.tokens = 0  # interactive requests that wait, and the tokens that they are to prefill

    def add(self, request: Request) -> None:
        """Take a request in, awake."""
        self.changes += 1
        self._count(request, 1)
        self._awake.add(request)
        if request.restarts:
            self._restarted.add(request)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        if request.restarts:
            self._restarted.remove(request)
        self._count(request, -1)
        self._take(request)

    def _count(self, request: Request, sign: int) -> None:
        if not request.is_batch:
            self.count += sign
            self.tokens += sign * request.to_prefill

    @property
    def first_awake(self) -> Request | None:
        """Return the first in the order of those awake."""
        return self._awake.first

    def done(self, keys: Iterable[Awaited]) -> None:
        """Note that something of this that requests sleep for is done, or will not be."""
        for key in keys if self._groups else ():
            if key in self._groups and key not in self._done:
                self._done[key] = None
                self.changes += 1
                self._push(key)

    # ---- a pass over those that may be placed

    def first(self, is_under_way: Callable[[Awaited], bool]) -> Request | None:
        """Find the first request that is awake or has to be asked again: what it sleeps for is done, and not under way
        anew."""
        awake, sleeper = self._awake.first, self._first_sleeper(is_under_way) if self._heap else None
        return awake if sleeper is None or (awake is not None and awake.order < sleeper.order) else sleeper

    def _first_sleeper(self, is_under_way: Callable[[Awaited], bool]) -> Request | None:
        while self._heap:
            order, _, key = self._heap[0]
            if key in self._done and is_under_way(key):
                del self._done[key]
            if key in self._done and (sleeper := self._groups[key].requests[0]).order == order:
                return sleeper
            heappop(self._heap)
        return None

    def first_that_fits(
        self, pages: int, is_kept_for: Callable[[Request], bool], is_under_way: Callable[[Awaited], bool]
    ) -> Request | None:
        """Find, in place of the first, the next whose prompt takes at most so many pages; None: there is none, or
        before it comes one for which freed pages are kept.

        Of those awake the first of each size is looked at, of those that have to be asked again the first of all.
        """
        found, sleeper = self._awake.first_to_seat(pages, is_kept_for), self._first_sleeper(is_under_way)
        if sleeper is not None and (self._awake.pages(sleeper) <= pages or is_kept_for(sleeper)):
            found = sleeper if found is None or sleeper.order < found.order else found
        return found if found is not None and self._awake.pages(found) <= pages else None

    def urgency(self, key: Awaited) -> Order:
        """Return the order of the first of those that sleep for this."""
        order: Order = self._groups[key].requests[0].order
        return order

    def restarted(self) -> list[Request]:
        """List those that started over, in order, awake or not."""
        return list(self._restarted)

    def sleep(self, request: Request, key: Awaited, blocks: int) -> None:
        """Let a request sleep for `key`, which concerns its first `blocks` blocks: with its whole group, if `key` is a
        block that all in it have in common."""
        group = request.wait
        if isinstance(group, Group) and isinstance(key, bytes) and blocks <= group.common:
            self._forget(group)
            group.key = key
            self._groups[key] = self._merge(group, self._groups.get(key))
        else:
            self._take(request)
            if key not in self._groups:
                self._groups[key] = Group(key)
            self._groups[key].add([request, *self._take_followers(request, key, blocks)])
        self._done.pop(key, None)

    @staticmethod
    def _merge(group: Group, other: Group | None) -> Group:
        """Merge the smaller of two groups that sleep for the same into the larger."""
        if other is None:
            return group
        small, large = sorted((group, other), key=lambda g: len(g.requests))
        large.add(small.requests)
        return large

    def _take_followers(self, request: Request, key: Awaited, blocks: int) -> list[Request]:
        """Take out those awake of its size that come next and would be found to sleep for the same block."""
        if not isinstance(key, bytes):
            return []
        last = blocks - 1
        return self._awake.take_next(
            request, lambda r: last < len(r.hashes) and r.hashes[last] == key and r.facts.fork_of is None
        )

    def rouse(self, request: Request) -> None:
        """Have a request awake that may be asleep: it waits for nothing but room."""
        if request.wait is not None:
            self._take(request)
            self._awake.add(request)

    def _take(self, request: Request) -> None:
        """Take a request out of its group, or from those awake."""
        self.changes += 1
        group, request.wait = request.wait, None
        if not isinstance(group, Group):
            self._awake.remove(request)
            return
        _remove(group.requests, request)
        if not group.requests:
            self._forget(group)
        elif group.key in self._done:
            self._push(group.key)

    def _forget(self, group: Group) -> None:
        del self._groups[group.key]
        self._done.pop(group.key, None)

    def _push(self, key: Awaited) -> None:
        heappush(self._heap, (self._groups[key].requests[0].order, next(self._entries), key))

    def check(self, is_under_way: Callable[[Awaited], bool]) -> None:
        """Raise unless every request that sleeps does so for what is under way, or else is to be asked again."""
        for key, group in self._groups.items():
            if group.key != key or any(request.wait is not group for request in group.requests) or not group.requests:
                raise RuntimeError(f"requests sleep for {key!r} and do not say so")
            if any(request.hashes[: group.common] != list(group.blocks[: group.common]) for request in group.requests):
                raise RuntimeError(f"{len(group.requests)} requests have fewer than {group.common} blocks in common")
            if key not in self._done and not is_under_way(key):
                raise RuntimeError(f"{len(group.requests)} requests sleep for {key!r}, which is not under way")
            if key in self._done and (group.requests[0].order, key) not in [(order, k) for order, _, k in self._heap]:
                raise RuntimeError(f"{len(group.requests)} requests that sleep for {key!r} would not be asked again")
        if not self._done.keys() <= self._groups.keys() or any(request.wait is not None for request in self._awake):
            raise RuntimeError("something is done that no request sleeps for, or a request sleeps and is awake")
        self._awake.check()


def _remove(requests: SortedRequests, request: Request) -> None:
    """Take a request out, most often the first."""
    if requests[0] is request:
        del requests[0]
    else:
        requests.remove(request)


def _common(blocks: Sequence[bytes], others: Sequence[bytes], most: int) -> int:
    """Count the first blocks, at most so many, that two prompts have in common: a hash stands for all before it too."""
    most = min(len(blocks), len(others), most)
    if not most or blocks[most - 1] == others[most - 1]:
        return most
    return bisect_left(range(most), True, key=lambda i: blocks[i] != others[i])
