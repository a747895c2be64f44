"""What comes next, from what came: one factor for a window of demand. Simple and stated, no model of anything."""

from collections.abc import Sequence

_DAMPING = 0.25  # of a trend: so much of it is taken to go on
_MOST = 1.5  # times the window's mean, the most that is forecast
_FEWEST = 8  # intervals, below which nothing is read into a window


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
