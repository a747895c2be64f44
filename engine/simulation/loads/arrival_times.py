"""When requests come in an open loop: a rate that changes with time, and how irregular the gaps are.

The rate is linear between knots. Gaps are drawn for a rate of 1 and time is rescaled by the integral of the rate, so
with exponential gaps this is the Poisson process of that rate. Gamma gaps with a coefficient of variation above 1 come
in bursts; far from each other counts then have an index of dispersion of its square.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, pi, sin

import numpy as np

_AT_ONCE = 4096  # gaps drawn together
_KNOTS = 288  # of a diurnal period: one in five minutes of a day


@dataclass(frozen=True)
class Rate:
    """Requests per second: linear between knots, and beyond the last as there."""

    knots: tuple[tuple[float, float], ...]  # seconds, which do not fall, and requests/s; the first at 0

    @classmethod
    def steady(cls, rate: float) -> "Rate":
        """Return a rate that stays."""
        return cls(((0.0, rate),))

    @classmethod
    def ramp(cls, begin: float, end: float, seconds: float) -> "Rate":
        """Return a rate that changes evenly within so many seconds, and then stays."""
        return cls(((0.0, begin), (seconds, end)))

    @classmethod
    def spike(cls, rate: float, factor: float, begin: float, length: float) -> "Rate":
        """Return a rate that is `factor` times as high for `length` seconds."""
        high, end = rate * factor, begin + length
        return cls(((0.0, rate), (begin, rate), (begin, high), (end, high), (end, rate)))

    @classmethod
    def diurnal(cls, mean: float, depth: float, period: float, seconds: float) -> "Rate":
        """Return mean x (1 - depth x cos(2 pi t / period)): lowest at the start and highest half a period later."""
        count = int(np.ceil(seconds / period * _KNOTS)) + 1
        places = [number / _KNOTS for number in range(count)]
        return cls(tuple((place * period, mean * (1 + depth * sin(2 * pi * (place - 0.25)))) for place in places))

    def total(self, seconds: float) -> float:
        """Return how many requests come within so many seconds, in the mean."""
        t, rate = (np.array(column) for column in zip(*self.knots, strict=True))
        if seconds == inf:
            return inf if rate[-1] > 0 else float(np.trapezoid(rate, t))
        last = float(np.interp(seconds, t, rate))
        ends, rates = np.append(t[t < seconds], seconds), np.append(rate[t < seconds], last)
        with np.errstate(invalid="ignore", over="ignore"):  # an infinite rate of no length
            return float(np.trapezoid(rates, ends))

    def times(self, totals: np.ndarray) -> np.ndarray:
        """Return when so many requests are to have come: the inverse of the integral of the rate, [n] -> [n]."""
        t, rate = (np.array(column) for column in zip(*self.knots, strict=True))
        widths, slopes = np.diff(t), np.zeros(len(t))
        np.divide(np.diff(rate), widths, out=slopes[:-1], where=widths > 0)
        reached = np.concatenate([[0.0], np.cumsum(widths * (rate[:-1] + rate[1:]) / 2)])
        piece = np.searchsorted(reached, totals, side="right") - 1
        left = totals - reached[piece]
        # rate x s + slope / 2 x s^2 = left, for s: in the form that has no difference of near numbers.
        below = rate[piece] + np.sqrt(np.maximum(rate[piece] ** 2 + 2 * slopes[piece] * left, 0.0))
        never = np.where(left > 0, inf, 0.0)  # where the rate is 0 and stays so
        found: np.ndarray = t[piece] + np.divide(2 * left, below, out=never, where=below > 0)
        return found


@dataclass(frozen=True)
class ArrivalTimes:
    """Times of requests, in seconds and in order; endless unless `seconds` or `count` ends them."""

    rate: Rate
    cv: float = 1.0  # coefficient of variation of the gaps: standard deviation / mean; 1: Poisson, 0: an even pace
    seconds: float = inf
    count: int | None = None

    @property
    def expected(self) -> float:
        """Return how many there are in the mean."""
        most = inf if self.count is None else self.count
        return min(most, self.rate.total(self.seconds))

    def draw(self, random: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield times, some thousands at once."""
        total, left = 0.0, self.count
        while left is None or left > 0:
            totals = total + np.cumsum(self._gaps(random))
            times = self.rate.times(totals)
            times = times[times < self.seconds][:left]
            yield times
            if len(times) < len(totals):
                return
            total, left = float(totals[-1]), None if left is None else left - len(times)

    def _gaps(self, random: np.random.Generator) -> np.ndarray:
        if self.cv == 0:
            return np.ones(_AT_ONCE)
        shape = 1 / self.cv**2
        return random.gamma(shape, 1 / shape, _AT_ONCE)
