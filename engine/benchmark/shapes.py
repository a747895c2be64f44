"""What the loads of a preset are like, as functions of how many there are at once, the seed and the scale.

All are closed loops: at any time so many requests, or sessions, are under way. A scale below 1 makes lengths and times
that much shorter, and the data of which one pass is made that much smaller. Everything is the same for a real engine
and a simulated one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from ..simulation.loads.agent_sessions import BLOCK, DrawnSessions, LanesOfSessions, LogNormal, Session, read_sessions
from ..simulation.loads.generators import ClosedLoop
from ..simulation.loads.lengths import Lengths, Pairs, Scaled
from ..simulation.loads.load_file import read_load_file
from ..simulation.workload import Workload
from .target import Load


class Shape(Protocol):
    """The loads of one preset."""

    def load(self, name: str, concurrency: int, longest: int, seed: int, scale: float) -> Load:
        """Return the load of one point.

        Args:
            name: for reports.
            concurrency: how many at once.
            longest: the most tokens that prompt and answer may have together.
            seed: of lengths and pauses.
            scale: above 0 and at most 1.
        """
        ...

    def with_data(self, path: str) -> "Shape":
        """Return the same with lengths from a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no such file, or these loads have none.
        """
        ...


@dataclass(frozen=True)
class Users:
    """So many users, each with one request at a time."""

    lengths: Lengths
    per_user: int  # requests; where `seconds` end it first, more than can be answered
    warmups_per_user: int = 0  # before, not counted
    seconds: float | None = None  # after which nobody comes any more; None: until all requests are answered

    def load(self, name: str, concurrency: int, longest: int, seed: int, scale: float) -> Load:
        """Return the load of one point."""
        warmup = None
        if self.warmups_per_user:
            warmup = _users(name, self.lengths, concurrency, self.warmups_per_user * concurrency, 2 * seed + 1, scale)
        load = _users(name, self.lengths, concurrency, self.per_user * concurrency, 2 * seed, scale)
        return Load(load, warmup, None if self.seconds is None else scale * self.seconds)

    def with_data(self, path: str) -> "Shape":
        """Refuse: the lengths are fixed."""
        raise ValueError("the preset has lengths of its own: leave --data out, or give a load of your own by --trace.")


@dataclass(frozen=True)
class OnePass:
    """So many users go once through a set of requests, the same at any concurrency."""

    lengths: Lengths
    count: int  # requests of the set

    def load(self, name: str, concurrency: int, longest: int, seed: int, scale: float) -> Load:
        """Return the load of one point."""
        return Load(_users(name, self.lengths, concurrency, max(1, round(scale * self.count)), seed, scale))

    def with_data(self, path: str) -> "Shape":
        """Take pairs of lengths from a trace, as many as it has."""
        pairs = Pairs.of(read_load_file(path).requests)
        return replace(self, lengths=pairs, count=len(pairs.pairs))


@dataclass(frozen=True)
class Lanes:
    """So many agents, each in one session after the other."""

    turns: LogNormal
    new: LogNormal  # tokens of a prompt that no turn before it had
    output: LogNormal
    gap: LogNormal  # seconds between turns
    cap: float  # seconds that such a gap lasts at most
    per_lane: int  # sessions, more than can be played within `seconds`
    seconds: float
    data: str | None = None  # a file of recorded sessions, instead of drawn ones

    def load(self, name: str, concurrency: int, longest: int, seed: int, scale: float) -> Load:
        """Return the load of one point."""
        sessions, cap = self._sessions(longest, seed, scale), scale * self.cap
        lanes = LanesOfSessions(sessions, concurrency, self.per_lane * concurrency, cap)
        return Load(Workload(name, lanes, BLOCK), None, scale * self.seconds)

    def with_data(self, path: str) -> "Shape":
        """Play recorded sessions."""
        return replace(self, data=path)

    def _sessions(self, longest: int, seed: int, scale: float) -> Callable[[int], Session]:
        if self.data is None:
            return DrawnSessions(self.turns, self.new, self.output, self.gap, longest, scale, seed)
        recorded = read_sessions(self.data, longest, scale)
        return lambda index: recorded[index % len(recorded)]


def _users(name: str, lengths: Lengths, concurrency: int, count: int, seed: int, scale: float) -> Workload:
    return Workload(name, ClosedLoop(concurrency, count, Scaled(lengths, scale), 0.0, seed))
