"""What a timeline is made of: tracks, and marks on them. What is drawn is in `timeline.py`, a viewer's format elsewhere
(`perfetto_file.py`).

Times are seconds on the engine's clock, those of the log. Invariants of what is drawn: marks of one track come in the
order of time; every `Begin` has its `End`, and of two that overlap on a track the later one ends first; every flow
begins once and ends once. Marks of two tracks come in no order.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

type Notes = tuple[tuple[str, int | float | str], ...]  # shown when a mark is looked at


@dataclass(frozen=True, eq=False)
class Track:
    """A row of the timeline, or a group of rows. Each is one object, whatever its name."""

    name: str
    parent: "Track | None" = None
    order: int = 0  # among those of its parent
    unit: str | None = None  # of a counter's values; None: it has slices


class Begin(NamedTuple):
    """A slice begins."""

    track: Track
    t: float
    name: str
    notes: Notes = ()
    flow_out: int | None = None  # the number of an arrow that leaves it
    flow_in: int | None = None  # and of one that reaches it


class End(NamedTuple):
    """The slice that began last on the track and is open ends."""

    track: Track
    t: float
    notes: Notes = ()


class Instant(NamedTuple):
    """Something happens at a time."""

    track: Track
    t: float
    name: str
    notes: Notes = ()


class Count(NamedTuple):
    """A counter has this value from here on."""

    track: Track
    t: float
    value: float


type Mark = Begin | End | Instant | Count


class Lane:
    """A track of those that share a name, for one thing at a time."""

    __slots__ = ("end", "number", "track")

    def __init__(self, track: Track, number: int) -> None:
        self.track, self.number, self.end = track, number, 0.0


class Lanes:
    """As many tracks of one name as there are things at once; a viewer shows them as one."""

    def __init__(self, name: str, parent: Track, order: int) -> None:
        """Begin without any."""
        self._name, self._parent, self._order = name, parent, order
        self._free: list[tuple[int, Lane]] = []  # a heap by number
        self._count = 0

    def take(self, t: float) -> Lane:
        """Return the first lane that is free from `t` on."""
        late = []
        found = None
        while self._free and found is None:
            entry = heapq.heappop(self._free)
            if entry[1].end <= t:
                found = entry[1]
            else:
                late.append(entry)
        for entry in late:
            heapq.heappush(self._free, entry)
        if found is None:
            found = Lane(Track(self._name, self._parent, self._order), self._count)
            self._count += 1
        return found

    def give_back(self, lane: Lane, t: float) -> None:
        """Let others have a lane from `t` on."""
        lane.end = max(lane.end, t)
        heapq.heappush(self._free, (lane.number, lane))
