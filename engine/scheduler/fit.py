"""A running mean of what was measured that knows how it depends on a size: seconds = fixed + each x size.

A least-squares line whose old measurements fade. Invariants: neither part is ever negative; at the mean of the sizes
the line passes through the mean of what was measured, so it stays within that; where all sizes were about the same, the
slope, of which they say nothing, is a given share of the mean. All is O(1), and a pure function of what was added.
"""

from typing import NamedTuple

_WINDOW = 64  # measurements after which one counts for 1/e of a new one
_RIDGE = 0.01  # how far sizes have to spread, as a variance in units of their squared mean, to say more than the share
_OUTLIER = 4.0  # times the expected; what took longer (a cold cache, a stalled host) counts as so much


class Terms(NamedTuple):
    """Seconds as a function of a size."""

    fixed: float
    each: float

    def at(self, size: float) -> float:
        """Return the seconds for this size."""
        return self.fixed + self.each * size


class Fit:
    """One fading line."""

    __slots__ = ("_cov", "_share", "_size", "_value", "_var", "count")

    def __init__(self, share: float):
        """Begin without measurements; `share`, 0 to 1, is how much of the mean grows with the size if nobody knows."""
        self._share = share
        self.count = 0  # of measurements
        self._size = self._value = self._var = self._cov = 0.0

    def add(self, size: float, value: float) -> None:
        """Take in that this size, above 0, has taken this value, 0 or more."""
        self.count += 1
        count = self.count
        if count == 1:
            self._size, self._value = size, value
            return
        weight = 1 / count if count < _WINDOW else 1 / _WINDOW
        off = size - self._size
        most = _OUTLIER * (self._value + self._each() * off)
        # An expectation of 0 would let nothing count any more.
        change = (most if value > most > 0 else value) - self._value
        self._size += weight * off
        self._value += weight * change
        self._var = (1 - weight) * (self._var + weight * off * off)
        self._cov = (1 - weight) * (self._cov + weight * off * change)

    @property
    def mean_size(self) -> float:
        """Return the mean of the sizes measured, the recent ones above all."""
        return self._size

    def _each(self) -> float:
        """Return the slope, from 0, all is fixed, to value / size, nothing is."""
        most = self._value / self._size
        ridge = _RIDGE * self._size * self._size
        each = (self._cov + ridge * self._share * most) / (self._var + ridge)
        return 0.0 if each < 0 else min(each, most)

    def terms(self) -> Terms:
        """Return the line; there must be a measurement."""
        each = self._each()
        return Terms(max(0.0, self._value - each * self._size), each)
