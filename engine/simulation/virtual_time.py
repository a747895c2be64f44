"""Virtual time: what is going to happen, in the order in which it does, and the instant that it is now.

Invariants: time never goes back; of two things of the same instant that which was planned first happens first, so that
a run is the same every time. It knows nothing of what happens.
"""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class VirtualTime:
    """A clock that goes from one thing that happens to the next."""

    def __init__(self) -> None:
        """Begin at 0 with nothing planned."""
        self.now = 0.0  # seconds
        self._planned: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._numbers = count()

    def __call__(self) -> float:
        """Return the seconds that it is now, as a clock does."""
        return self.now

    def at[T](self, t: float, happens: Callable[[T], None], what: T) -> None:
        """Have `happens(what)` called at `t`, which is not before now."""
        heapq.heappush(self._planned, (t, next(self._numbers), happens, what))

    def next(self) -> float | None:
        """Return when the next thing happens; None: nothing is planned."""
        return self._planned[0][0] if self._planned else None

    def advance(self, t: float) -> None:
        """Let happen all that is planned up to `t`, that included, and go on to `t`."""
        planned = self._planned
        while planned and planned[0][0] <= t:
            when, _, happens, what = heapq.heappop(planned)
            if when > self.now:
                self.now = when
            happens(what)
        self.now = max(self.now, t)
