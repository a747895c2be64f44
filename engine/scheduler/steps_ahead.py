"""When decode steps of one mesh will be read that go on by themselves, one after the other: two are in flight at any
time, and the next is dispatched when the one before the last is read. Facts only: `cost.py` counts them.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class InFlight(NamedTuple):
    """A decode step that is dispatched and not read."""

    number: int
    dispatched: float
    rows: int
    bucket: int


class StepsAhead:
    """The steps of one mesh, and how many of them are counted."""

    __slots__ = ("bucket", "counted", "ends", "in_flight", "last", "rows")

    def __init__(
        self,
        ends: Sequence[float],
        rows: int,
        bucket: int,
        in_flight: Sequence[InFlight],
        last: tuple[int, int] | None,
    ) -> None:
        """Begin with none counted; `ends` say when each will be read, first those two that are in flight. `last` are
        rows and bucket of the step that is dispatched on the last of them; None: there is none."""
        self.ends, self.rows, self.bucket, self.in_flight, self.last = ends, rows, bucket, in_flight, last
        self.counted = 0

    def __lt__(self, other: "StepsAhead") -> bool:
        """Order what is of one mesh and one instant: it makes no difference."""
        return False

    def read_by(self, now: float) -> int:
        """Return how many of them are read at `now`."""
        return bisect_right(self.ends, now)

    def end_after(self, results: int) -> None:
        """Foresee so many results and no more."""
        if results < len(self.ends):
            self.ends, self.last = self.ends[:results], (self.rows, self.bucket)

    def in_flight_now(self) -> list[InFlight]:
        """Return those in flight when `counted` were read. Their numbers are those of the first two, in turn."""
        steps = (self._step(self.counted), self._step(self.counted + 1))
        return [step for step in steps if step.rows]

    def running(self) -> tuple[float, int, int]:
        """Return when the first of these was dispatched, and the rows of both; 0: there is no second one."""
        counted = self.counted
        if 2 <= counted < len(self.ends):  # as most often
            return self.ends[counted - 2], self.rows, self.rows
        first, second = self._step(counted), self._step(counted + 1)
        return first.dispatched, first.rows, second.rows

    def _step(self, index: int) -> InFlight:
        if index < 2:
            return self.in_flight[index]
        rows, bucket = (self.rows, self.bucket) if index <= len(self.ends) else self.last or (0, 0)
        return InFlight(self.in_flight[index % 2].number, self.ends[index - 2], rows, bucket)


def next_of(count: int, each: int) -> int:
    """Return how many more it takes until one counts, if after `count` each of the first ones does and then one in
    `each`."""
    return 1 if count + 1 < each else each - count % each
