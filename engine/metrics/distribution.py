"""Mean and percentiles of one quantity over many requests."""

from collections.abc import Iterable
from typing import Literal

import msgspec
import numpy as np


class Distribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of `count` values, in seconds; percentiles are linear between the two nearest ranks."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution | None":
        """Compute that of these values, without those that are NaN; None where none is left."""
        known = values if isinstance(values, np.ndarray) else np.fromiter(values, np.float64)
        known = known[~np.isnan(known)]
        if not len(known):
            return None
        p50, p90, p99 = np.percentile(known, (50, 90, 99)).tolist()
        return cls(len(known), float(known.mean()), p50, p90, p99)


def percentile(of: Distribution | None, percent: Literal[50, 90, 99]) -> float | None:
    """Return a percentile of what may be unknown; None: it is."""
    return None if of is None else {50: of.p50, 90: of.p90, 99: of.p99}[percent]
