"""Inter-token latencies of a whole run, counted in buckets, so that a hundred million of them take no room.

Buckets are even in the logarithm, 1 % wide: a percentile is off by at most half of that. Gaps below a microsecond count
as one of a microsecond.
"""

from math import ceil, log

import numpy as np

from .distribution import Distribution

_LEAST = 1e-6  # seconds
_WIDTH = log(1.01)


class Gaps:
    """Gaps between tokens, counted."""

    def __init__(self) -> None:
        """Begin without any."""
        self._counts: dict[int, int] = {}  # bucket -> gaps
        self._sum = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a gap so many times: a decode step gives one to every row that it goes on with."""
        bucket = round(log(max(seconds, _LEAST) / _LEAST) / _WIDTH)
        self._counts[bucket] = self._counts.get(bucket, 0) + times
        self._sum += seconds * times

    def distribution(self) -> Distribution | None:
        """Return mean and percentiles; None where there are no gaps."""
        buckets = sorted(self._counts)
        ends = np.cumsum([self._counts[bucket] for bucket in buckets])
        if not buckets:
            return None
        count = int(ends[-1])
        p50, p90, p99 = (
            self._seconds(buckets[int(np.searchsorted(ends, ceil(share * count)))]) for share in (0.5, 0.9, 0.99)
        )
        return Distribution(count, self._sum / count, p50, p90, p99)

    def counts(self) -> tuple[tuple[float, int], ...]:
        """Return how many gaps there are of each length, in seconds and ascending: what a curve is drawn from."""
        return tuple((self._seconds(bucket), self._counts[bucket]) for bucket in sorted(self._counts))

    def _seconds(self, bucket: int) -> float:
        return _LEAST * float(np.exp(bucket * _WIDTH))
