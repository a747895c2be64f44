"""What comes next, from what came: since when demand is as it is now, and one factor for what follows. Simple and
stated, no model of anything."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

type Array = npt.NDArray[np.float64]

_DAMPING = 0.25  # of a trend: so much of it is taken to go on
_MOST = 1.5  # times the window's mean, the most that is forecast
_FEWEST = 8  # intervals, below which nothing is read into a window
_NEWEST = 4  # intervals that are one demand, whatever they hold
_ERRORS = 3.0  # standard errors by which two means differ that are not of one demand
_CHANGE = 0.15  # of the larger mean: a difference that changes nothing, however sure


def forecast(amounts: Sequence[float], seconds: float) -> float:
    """Return by how much the demand of the next window is taken to exceed that of this one, which came in intervals of
    so many seconds, oldest first.

    It is the larger of the second half's mean and the window's own, with a quarter of the growth between the two halves
    on top, and at most 1.5 times the window's mean; never below 1, since what came may come again.
    """
    total, half = sum(amounts), len(amounts) // 2
    if len(amounts) < _FEWEST or not total or seconds <= 0:
        return 1.0
    mean, older, newer = total / len(amounts), sum(amounts[:half]) / half, sum(amounts[half:]) / (len(amounts) - half)
    return min(_MOST, max(1.0, (max(mean, newer) + _DAMPING * max(0.0, newer - older)) / mean))


def steady_from(series: Sequence[Sequence[float]], begin: int = 0, breaks: Sequence[int] = ()) -> int:
    """Return the first interval, `begin` or later, from which on demand is as it is now.

    The newest 4 intervals are a part of it. It grows by half its length as long as the mean of the intervals before it
    is its own in every series: within three standard errors, or within 15 %. The error is the larger of two: by the
    variance within both parts, and by how much means over as many intervals as the older part has differ from the next
    ones anywhere in the series (the Allan variance at that scale), so that bursts which come again and again are one
    demand however long each of them lasts.

    Args:
        series: measures of demand, each by interval, oldest first.
        begin: the interval since which it was found to be steady before.
        breaks: intervals at which it was found to change before; differences across them are no noise.
    """
    amounts = np.array(series, float)  # [series, intervals]
    count: int = amounts.shape[1]
    sums = np.concatenate([np.zeros((len(amounts), 1)), amounts.cumsum(axis=1)], axis=1)
    squares = np.concatenate([np.zeros((len(amounts), 1)), (amounts * amounts).cumsum(axis=1)], axis=1)
    is_break = np.zeros(count + 1)
    is_break[list(breaks)] = 1.0
    crossed = is_break.cumsum()
    first: int = max(begin, count - _NEWEST)
    while first > begin:
        before = max(begin, first - (count - first) // 2)
        if _differ(sums, squares, crossed, before, first):
            break
        first = before
    return first


def _differ(sums: Array, squares: Array, crossed: Array, before: int, first: int) -> bool:
    """Return whether in some series the means before and since `first` differ by more than chance, and by more than is
    of interest."""
    older, newer = first - before, sums.shape[1] - 1 - first
    then, now = (sums[:, first] - sums[:, before]) / older, (sums[:, -1] - sums[:, first]) / newer
    off = np.abs(then - now)
    is_off = off > _CHANGE * np.maximum(then, now)
    if not is_off.any():
        return False
    within = (squares[:, -1] - squares[:, first]) / newer - now * now  # the variance of the newer part
    error = np.maximum(within * (1 / older + 1 / newer), _allan(sums, crossed, older) * (1 + older / newer))
    return bool((is_off & (off * off > _ERRORS * _ERRORS * error)).any())


def _allan(sums: Array, crossed: Array, length: int) -> Array:
    """Return the variance of means over `length` intervals, by how much each differs from the next: [series]. A change
    once and for all adds little to it."""
    means = (sums[:, length:] - sums[:, :-length]) / length
    steps = means[:, length:] - means[:, :-length]
    is_whole = crossed[2 * length - 1 : -1] == crossed[: -2 * length]
    count = is_whole.sum()
    found: Array = (steps * steps * is_whole).sum(axis=1) / (2 * max(1, count))
    return found
