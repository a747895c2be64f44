"""The requests in WAITING, in the policy's order: those awake, and those that sleep until something is done for them.

Invariant: every request here is awake or asleep, never both. Those that sleep for the same are one group and cost
nothing, however many they are, until `done` names what they sleep for: from then on they are asked again with those
awake, and sleep on or not as `apply` says. What there is to sleep for is decided in `admission.py`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice

from .mesh_state import SortedRequests, in_order, sorted_requests
from .request import Request

# A block that is being computed, or the id of a request that is to be forked.
type Awaited = bytes | int
type Group = dict[Request, None]  # an ordered set


class WaitingRequests:
    """A queue whose requests may sleep."""

    def __init__(self) -> None:
        self._all, self._awake = sorted_requests(), sorted_requests()
        self._asleep: dict[Awaited, Group] = {}
        self._done: dict[Awaited, None] = {}  # of the keys of `_asleep`, those whose requests have to be asked again

    def __iter__(self) -> Iterator[Request]:
        return iter(self._all)

    def add(self, request: Request) -> None:
        """Take a request in, awake."""
        self._all.add(request)
        self._awake.add(request)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        self._all.remove(request)
        if request.sleeps_for is None:
            self._awake.remove(request)
        else:
            self._rouse(request, request.sleeps_for)

    # ---- a pass over those that may be placed

    def done(self, keys: Iterable[Awaited]) -> None:
        """Note that something of this that requests sleep for is done, or will not be."""
        for key in self._asleep.keys() & keys:
            self._done[key] = None

    def groups_done(self, is_under_way: Callable[[Awaited], bool]) -> dict[Awaited, Group]:
        """List the groups that have to be asked again, by what they sleep for, unless that is under way elsewhere."""
        self._done = {key: None for key in self._done if not is_under_way(key)}
        return {key: self._asleep[key] for key in self._done}

    @property
    def has_awake(self) -> bool:
        """Whether any request is awake."""
        return bool(self._awake)

    def only(self, groups: Collection[Group], most: int) -> bool:
        """Whether none is awake, and all of these groups are among the first `most` of all."""
        return not self._awake and (len(self._all) <= most or len(self.first(most, groups)) == sum(map(len, groups)))

    def first(self, most: int, groups: Collection[Group]) -> list[Request]:
        """List those awake, and those of the groups that have to be asked again, among the first `most` of all."""
        last = self._all[most - 1].order if len(self._all) > most else None
        able = list(self._awake if last is None else self._awake.irange_key(max_key=last))
        if groups:
            roused = [request for group in groups for request in group]
            able += roused if last is None else [request for request in roused if request.order <= last]
            able.sort(key=in_order)
        return able

    def first_restarted(self, most: int, groups: Collection[Group]) -> list[Request]:
        """List likewise among the first `most` of those that started over."""
        first = islice((request for request in self._all if request.restarts), most)
        return [r for r in first if r.sleeps_for is None or any(r in group for group in groups)]

    def apply(self, placed: Collection[Request], asleep: Mapping[Request, Awaited], refused: Request | None) -> None:
        """Take requests out, let others sleep, and keep awake the one that found no room."""
        _take_out(self._all, placed)
        _take_out(self._awake, {r: None for r in (*placed, *asleep) if r.sleeps_for is None})
        for request in placed:
            if request.sleeps_for is not None:
                self._rouse(request, request.sleeps_for)
        for request, awaited in asleep.items():
            if request.sleeps_for is not None:
                self._rouse(request, request.sleeps_for)
            request.sleeps_for = awaited
            if awaited in self._asleep:
                self._asleep[awaited][request] = None
            else:
                self._asleep[awaited] = {request: None}
        if refused is not None and refused.sleeps_for is not None:
            self._rouse(refused, refused.sleeps_for)
            self._awake.add(refused)

    def sleep_on(self, key: Awaited, block: bytes) -> None:
        """Let a whole group sleep for this block instead."""
        group = self._asleep.pop(key)
        del self._done[key]
        for request in group:
            request.sleeps_for = request.awaits = block
        self._asleep[block] = self._asleep.get(block, {}) | group

    def _rouse(self, request: Request, key: Awaited) -> None:
        request.sleeps_for = None
        group = self._asleep[key]
        del group[request]
        if not group:
            del self._asleep[key]
            self._done.pop(key, None)

    def check(self, is_under_way: Callable[[Awaited], bool]) -> None:
        """Raise unless every request is awake, or sleeps for what is under way, or else is to be asked again."""
        asleep = [request for group in self._asleep.values() for request in group]
        if {*self._awake, *asleep} != {*self._all} or len(self._awake) + len(asleep) != len(self._all):
            raise RuntimeError(f"{len(self._all)} requests wait, {len(self._awake)} awake and {len(asleep)} asleep")
        for key, group in self._asleep.items():
            if any(request.sleeps_for != key for request in group) or not group:
                raise RuntimeError(f"requests sleep for {key!r} and do not say so")
            if key not in self._done and not is_under_way(key):
                raise RuntimeError(f"{len(group)} requests sleep for {key!r}, which is not under way")
        if not self._done.keys() <= self._asleep.keys():
            raise RuntimeError("something is done that no request sleeps for")


def _take_out(requests: SortedRequests, leaving: Collection[Request]) -> None:
    """Many at once cost as little as going through all: one by one each would be looked for."""
    if 8 * len(leaving) < len(requests):
        for request in leaving:
            requests.remove(request)
    elif leaving:
        rest = [request for request in requests if request not in leaving]
        requests.clear()
        requests.update(rest)
