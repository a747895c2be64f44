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
    windows = int(since.max() // window)
    places = np.minimum(since // window, windows).astype(np.int64)
    counts = np.bincount(places, minlength=windows)[:windows]
    mean = counts.mean() if windows > 1 else 0.0
    return float(counts.var() / mean) if mean > 0 else None


def dispersion(times: Sequence[float] | np.ndarray) -> dict[int, float | None]:
    """Return the index of dispersion of these times, in seconds, at each of `WINDOWS`."""
    return {window: index_of_dispersion(times, window) for window in WINDOWS}
