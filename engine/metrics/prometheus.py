"""An engine's figures for Prometheus, through prometheus-client: a collector, text, and a port on loopback.

Which metrics there are is in `exposed.py`. A scrape reads `Metrics` once, on the thread of whoever scrapes; it takes
the interpreter's lock from the dispatching thread as any other Python of the process does, and nothing else.
"""

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from ..host.extras import need
from .exposed import EXPOSED, HISTOGRAMS, Exposed, ExposedHistogram
from .histograms import Histogram
from .metrics import Metrics

PREFIX = "twinmesh_"
_UNITS = ("seconds", "bytes", "tokens")


class EngineCollector:
    """Reads an engine whenever it is scraped, as prometheus-client's collectors do: register it in a registry.

    A registry takes one; for several engines in a process take a registry each.
    """

    def __init__(self, read: Callable[[], Metrics]) -> None:
        """`read` gives the figures, as `llm.metrics` does.

        Raises:
            ValueError: prometheus-client is not installed.
        """
        self._read, self._core = read, _client("prometheus_client.core")
        self._as_text = _client("prometheus_client.utils").floatToGoString

    def collect(self) -> Iterator[Any]:
        """Yield every metric of the tables."""
        metrics = self._read()
        for one in EXPOSED:
            yield self._family(one, metrics)
        found = metrics.histograms
        for histogram in HISTOGRAMS:
            yield self._histogram(histogram, found[histogram.quantity])

    def _family(self, one: Exposed, metrics: Metrics) -> Any:
        kinds = {"counter": self._core.CounterMetricFamily, "gauge": self._core.GaugeMetricFamily}
        family = kinds[one.kind](PREFIX + one.name, one.help, labels=one.labels, unit=_unit(one.name))
        value = one.read(metrics)
        for labels, figure in value.items() if isinstance(value, Mapping) else (((), value),):
            family.add_metric(labels, figure)
        return family

    def _histogram(self, one: ExposedHistogram, histogram: Histogram) -> Any:
        family = self._core.HistogramMetricFamily(PREFIX + one.name, one.help, unit=_unit(one.name))
        buckets, count = [], 0
        for bound, more in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            count += more
            buckets.append((self._as_text(bound), count))
        family.add_metric((), buckets, histogram.total)
        return family


def as_prometheus(read: Callable[[], Metrics]) -> str:
    """Return the figures as Prometheus text.

    Raises:
        ValueError: prometheus-client is not installed.
    """
    client = _client("prometheus_client")
    registry = client.CollectorRegistry()
    registry.register(EngineCollector(read))
    text: bytes = client.generate_latest(registry)
    return text.decode()


class MetricsServer:
    """Serves an engine's figures on loopback, at /metrics; nothing until there is an engine to `show`."""

    def __init__(self, port: int) -> None:
        """Listen.

        Raises:
            ValueError: the port cannot be used, or prometheus-client is not installed.
        """
        client = _client("prometheus_client")
        self._registry = client.CollectorRegistry()
        try:
            self._server, self._thread = client.start_http_server(port, "127.0.0.1", self._registry)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"Port {port} cannot be used for metrics ({why}): give another.") from None

    @property
    def address(self) -> tuple[str, int]:
        """Return the address and the port that it listens at."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def show(self, read: Callable[[], Metrics]) -> None:
        """Serve what `read` gives from here on; once."""
        self._registry.register(EngineCollector(read))

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unit(name: str) -> str:
    """Return the unit that a name ends with, for formats that say it besides."""
    return next((unit for unit in _UNITS if name.endswith(f"_{unit}")), "")


def _client(module: str) -> Any:
    return need(module, "prometheus", "Metrics for Prometheus")
