"""Instants at which something is due, each for a key: deadlines, drains. The scheduler has no clock: it says when the
next is due, and looks whenever an event has brought the time."""

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from itertools import count

# What is due in a scheduler, and the id of whom it concerns: a call for roles, a request's deadline, a plan (0).
ROLES_CALL, LAST_TOKEN, FIRST_TOKEN, PLAN = "roles", "deadline", "first token deadline", "plan"
type Due = tuple[str, int]

_FEW = 64  # entries that are not worth clearing away


class Agenda[Key: Hashable]:
    """Keys and their instants, in seconds on the engine's clock. All takes O(log n), on the average."""

    def __init__(self) -> None:
        self._instants: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []  # those of `_instants`, and some that were: these are passed over
        self._entries = count()

    def set(self, key: Key, instant: float) -> None:
        """Let a key be due at this instant, and no more at an earlier one that was set."""
        self._instants[key] = instant
        heappush(self._heap, (instant, next(self._entries), key))
        if len(self._heap) > 2 * len(self._instants) + _FEW:  # most that were are far off, and would stay for long
            self._heap = [entry for entry in self._heap if self._instants.get(entry[2]) == entry[0]]
            heapify(self._heap)

    def drop(self, key: Key) -> None:
        """Take a key off; one that is not here is ignored."""
        self._instants.pop(key, None)

    @property
    def size(self) -> int:
        """Return how many entries are kept, with those that were taken off and not cleared away yet."""
        return len(self._heap)

    def next_due(self) -> float | None:
        """Return the next instant; None: nothing is to come."""
        while self._heap and self._instants.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> list[Key]:
        """Take off the keys whose instant has come, and list them, the earliest first."""
        due = []
        while (instant := self.next_due()) is not None and instant <= now:
            key = heappop(self._heap)[2]
            del self._instants[key]
            due.append(key)
        return due
