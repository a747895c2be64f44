"""The engine's figures in the shape of vLLM's `LLM.get_metrics`: a list of counters, gauges and histograms.

Names are this engine's own (`engine/metrics/exposed.py`), which are those of the Prometheus page: what vLLM counts
otherwise, or not at all, has no name of vLLM's here. No JAX.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..metrics.exposed import EXPOSED, HISTOGRAMS
from ..metrics.metrics import Metrics

_PREFIX = "twinmesh:"


@dataclass(frozen=True)
class Metric:
    """One figure."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Counter(Metric):
    """A number that only grows."""

    value: float


@dataclass(frozen=True)
class Gauge(Metric):
    """A number that goes up and down."""

    value: float


@dataclass(frozen=True)
class Vector(Metric):
    """Counters in an order. The engine has none: programs ask whether a metric is one."""

    values: list[int]


@dataclass(frozen=True)
class Histogram(Metric):
    """Observations by upper bounds, each with how many are at most that; "+Inf" is the last."""

    count: int
    sum: float
    buckets: dict[str, int]


def listed(metrics: Metrics) -> list[Metric]:
    """Return every figure, one for each combination of labels."""
    found: list[Metric] = []
    for one in EXPOSED:
        value, kind = one.read(metrics), Counter if one.kind == "counter" else Gauge
        by_label = value if isinstance(value, Mapping) else {(): value}
        for values, figure in by_label.items():
            found.append(kind(_PREFIX + one.name, dict(zip(one.labels, values, strict=True)), figure))
    histograms = metrics.histograms
    for shown in HISTOGRAMS:
        histogram = histograms[shown.quantity]
        buckets, total = {}, 0
        for bound, count in zip((*map(str, shown.buckets), "+Inf"), histogram.counts, strict=True):
            total += int(count)
            buckets[bound] = total
        found.append(Histogram(_PREFIX + shown.name, {}, total, histogram.total, buckets))
    return found
