"""How bursty arrivals are: the index of dispersion of counts.

It is the variance of the number of arrivals in a window over its mean. A Poisson process has 1 at every width of the
window; bursts raise it, an even pace lowers it. Real traffic has more the wider the window, so a test with Poisson
arrivals of the same rate is too kind to a queue.
"""

from collections.abc import Sequence

import numpy as np

WINDOWS = (1, 10, 60)  # seconds


def index_of_dispersion(times: Sequence[float] | np.ndarray, window: float) -> float | None:
    """Return variance / mean of the counts of `times` [n], in seconds and in any order, in windows of so many seconds.

    Windows follow each other from the first arrival on; what is left at the end does not fill one and is not counted.
    The variance is that of the population. None: fewer than two windows, or nothing comes in them.
    """
    times = np.asarray(times, dtype=np.float64)
    if not len(times):
        return None
    since = times - times.min()
    windows = since.max() // window
    if windows < 2:
        return None
    # Counted where anything comes: a few requests in many years are no reason to count every second.
    places, counts = np.unique(since // window, return_counts=True)
    counts = counts[places < windows]
    mean = float(counts.sum() / windows)
    squares = float(((counts - mean) ** 2).sum()) + (windows - len(counts)) * mean**2
    return float(squares / windows / mean) if mean > 0 else None


def dispersion(times: Sequence[float] | np.ndarray) -> dict[int, float | None]:
    """Return the index of dispersion of these times, in seconds, at each of `WINDOWS`."""
    return {window: index_of_dispersion(times, window) for window in WINDOWS}
