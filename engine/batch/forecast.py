"""When a batch job will be done: what remains to be computed, against what interactive requests left over lately.

Pure functions of counts and instants; callers have the clock. Work is counted in tokens, those of prompts and generated
ones alike, because lines are too few to be a measure of a minute.
"""

from collections import deque
from dataclasses import dataclass
from math import inf

# Seconds that what is left over is measured in.
LATELY = 60.0
# A forecast needs so many seconds of a job with much time, or this part of those of one with little.
_LEAST_PART = 0.1


@dataclass(frozen=True)
class Standing:
    """How far a job has come."""

    tokens: int  # computed so far
    lines_left: int  # that have no result yet
    lines_done: int  # by this start
    tokens_done: int  # of these lines
    asked_a_line: float  # the most tokens that a line may come to, on average over those looked at

    @property
    def demand(self) -> float:
        """Return how many tokens remain: each line is taken for as long as the mean of those done, or for as long as it
        may be where none is."""
        mean = self.tokens_done / self.lines_done if self.lines_done else self.asked_a_line
        return max(float(self.lines_left > 0), self.lines_left * mean - (self.tokens - self.tokens_done))


class Forecast:
    """The forecast of one job that is wanted by an instant."""

    def __init__(self, start: float, due: float) -> None:
        """Begin without an observation; both in seconds on the same clock."""
        self._start, self._due = start, due
        self._seen = deque([(start, 0)])  # instants and tokens computed by then; the first is what the rate counts from

    def look(self, now: float, standing: Standing) -> float | None:
        """Take in how far the job has come; return by how many seconds it will be late, None if it will not be, or if
        that cannot be told yet. Infinite: at the rate of the last minute it never ends."""
        self._seen.append((now, standing.tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - LATELY:
            self._seen.popleft()
        if not standing.lines_left or (now < self._due and not self._has_seen_enough(now)):
            return None
        end = now + seconds_needed(standing.demand, self.rate)
        return end - self._due if end > self._due else None

    @property
    def rate(self) -> float:
        """Return the tokens per second that were left over lately."""
        (first, before), (last, tokens) = self._seen[0], self._seen[-1]
        return (tokens - before) / (last - first) if last > first else 0.0

    def _has_seen_enough(self, now: float) -> bool:
        return now - self._start >= min(LATELY, _LEAST_PART * (self._due - self._start))


def seconds_needed(demand: float, rate: float) -> float:
    """Return how long so many tokens take at so many a second."""
    if not demand:
        return 0.0
    return demand / rate if rate > 0 else inf
