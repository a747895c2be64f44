"""A running mean of what was measured that knows how it depends on a size: seconds = fixed + each x size.

A least-squares line whose old measurements fade. Invariants: neither part is ever negative; at the mean of the sizes
the line passes through the mean of what was measured, so it stays within that; where all sizes were about the same, the
slope, of which they say nothing, is a given share of the mean. All is O(1), and a pure function of what was added.
"""

from collections.abc import Iterable
from typing import NamedTuple

WINDOW = 64  # measurements after which one counts for 1/e of a new one
_RIDGE = 0.01  # how far sizes have to spread, as a variance in units of their squared mean, to say more than the share
_OUTLIER = 4.0  # times the expected; what took longer (a cold cache, a stalled host) counts as so much
_USUAL = 0.99 * _OUTLIER  # times the least that the line may say; up to so much nobody has to ask what it does say


class Terms(NamedTuple):
    """Seconds as a function of a size."""

    fixed: float
    each: float

    def at(self, size: float) -> float:
        """Return the seconds for this size."""
        return self.fixed + self.each * size


_NOTHING = Terms(0.0, 0.0)


class LineFit:
    """One fading line: `fixed` + `each` x size."""

    __slots__ = ("_cov", "_share", "_value", "_var", "count", "each", "fixed", "mean_size")

    def __init__(self, share: float, prior: Terms = _NOTHING):
        """Begin with `prior`, until something is measured; `share`, 0 to 1, is how much of the mean grows with the size
        if nobody knows."""
        self._share = share
        self.count = 0  # of measurements
        self.fixed, self.each = prior
        self.mean_size = self._value = self._var = self._cov = 0.0  # the means of sizes and of what they took, fading

    def add(self, size: float, value: float) -> None:
        """Take in that this size, above 0, has taken this value, 0 or more."""
        self.add_run(size, 0.0, (value,))

    def add_run(self, size: float, begin: float, ends: Iterable[float]) -> None:
        """Take in what as many of the same size have taken one after the other, from `begin` on, each up to its end. It
        runs for every step of every mesh, hence in one piece."""
        count, mean_size, mean, var, cov = self.count, self.mean_size, self._value, self._var, self._cov
        weight, kept = 1 / WINDOW, 1 - 1 / WINDOW
        for end in ends:
            value, begin = end - begin, end
            usual = _USUAL * mean  # the line says no less than `mean` at sizes above `mean_size`, and its share below
            if (value > usual or value * mean_size > usual * size) and count:
                fixed, each = self._line(mean_size, mean, var, cov)
                most = _OUTLIER * (fixed + each * size)
                if value > most > 0 and value > mean:  # an expectation of 0 would let nothing count any more
                    value = most if most > mean else mean  # less than was ever measured would be no measurement
            count += 1
            if count <= WINDOW:
                weight = 1 / count
                kept = 1 - weight
            off, change = size - mean_size, value - mean
            mean_size = mean_size + weight * off
            mean = mean + weight * change
            var = kept * (var + weight * off * off)
            cov = kept * (cov + weight * off * change)
        if count > self.count:
            self.fixed, self.each = self._line(mean_size, mean, var, cov)
        self.count, self.mean_size, self._value, self._var, self._cov = count, mean_size, mean, var, cov

    def _line(self, mean_size: float, mean: float, var: float, cov: float) -> tuple[float, float]:
        """Return what is fixed, and what each size adds, of the line with these means, variance and covariance."""
        steepest, ridge = mean / mean_size, _RIDGE * mean_size * mean_size  # steepest: nothing is fixed
        each = (cov + ridge * self._share * steepest) / (var + ridge)
        each = 0.0 if each < 0 else each if each < steepest else steepest
        fixed = mean - each * mean_size
        return fixed if fixed > 0 else 0.0, each

    def terms(self) -> Terms:
        """Return the line."""
        return Terms(self.fixed, self.each)
