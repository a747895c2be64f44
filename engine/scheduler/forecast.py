"""What comes next, from what came: since when demand is as it is now, and one factor for what follows. Simple and
stated, no model of anything."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_DAMPING = 0.25  # of a trend: so much of it is taken to go on
_MOST = 1.5  # times the window's mean, the most that is forecast
_FEWEST = 8  # intervals, below which nothing is read into a window
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


def steady_from(series: Sequence[Sequence[float]]) -> int:
    """Return the first interval from which on demand is as it is now; each of the series is one measure of it, oldest
    first.

    The newest 8 intervals are a part of it. It grows by half its length as long as the mean of the intervals before it
    is its own in every series: within three standard errors, by its own variance, or within 15 %. So bursts that come
    again and again are one demand, and one that doubles at a dozen requests an interval shows after 4 s.
    """
    amounts = np.array(series, float)  # [series, intervals]
    begin: int = max(0, amounts.shape[1] - _FEWEST)
    while begin > 0:
        before = max(0, begin - (amounts.shape[1] - begin) // 2)
        if _differ(amounts[:, before:begin], amounts[:, begin:]):
            break
        begin = before
    return begin


def _differ(older: npt.NDArray[np.float64], newer: npt.NDArray[np.float64]) -> bool:
    """Return whether in some series the means differ by more than chance, and by more than is of interest."""
    before, now = older.mean(axis=1), newer.mean(axis=1)
    error = np.sqrt(newer.var(axis=1) * (1 / older.shape[1] + 1 / newer.shape[1]))
    off = np.abs(before - now)
    return bool(((off > _ERRORS * error) & (off > _CHANGE * np.maximum(before, now))).any())
