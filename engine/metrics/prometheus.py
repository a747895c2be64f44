"""An engine's figures as Prometheus text, through prometheus-client: names, units and labels, in one table.

Names follow Prometheus' conventions: the prefix `twinmesh_`, base units (seconds, bytes; 0 to 1 for shares), `_total`
for what only grows. What has several kinds is one name with a label. A scrape reads `Metrics` once, on the thread of
whoever scrapes; nothing is counted for it besides.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from ..extras import need
from .metrics import Metrics


class Exposed(NamedTuple):
    """One metric: its name without prefix and `_total`."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[Metrics], float | Mapping[Any, float]]  # by label value, where there is a label
    label: str | None = None


EXPOSED: tuple[Exposed, ...] = (
    Exposed("requests", "counter", "Requests that have ended, by reason.", lambda m: dict(m.requests), "reason"),
    Exposed("requests_running", "gauge", "Requests that have not ended, waiting ones too.", lambda m: m.running),
    Exposed("prompt_tokens", "counter", "Prompt tokens of admitted requests.", lambda m: m.prompt_tokens),
    Exposed("cached_tokens", "counter", "Prompt tokens that the prefix cache spared.", lambda m: m.cached_tokens),
    Exposed(
        "missed_tokens", "counter", "Prompt tokens that the prefix cache did not spare, by reason.",
        lambda m: {reason.value: count for reason, count in m.missed_tokens.items()}, "reason",
    ),
    Exposed("generated_tokens", "counter", "Generated tokens of ended requests.", lambda m: m.generated_tokens),
    Exposed("preemptions", "counter", "Times that a request gave up its KV while it ran.", lambda m: m.preemptions),
    Exposed("migrations", "counter", "Times that a request moved its KV while it decoded.", lambda m: m.migrations),
    Exposed("role_flips", "counter", "Changes of the role of a pool's mesh.", lambda m: m.flips),
    Exposed("handoffs", "counter", "Transfers of KV between meshes that arrived.", lambda m: m.handoffs),
    Exposed("handoff_bytes", "counter", "Bytes of KV and state moved between meshes.", lambda m: m.handoff_bytes),
    Exposed("handoff_seconds", "counter", "Seconds from dispatch to arrival, summed.", lambda m: m.handoff_seconds),
    Exposed("steps", "counter", "Steps dispatched, on all meshes.", lambda m: m.steps),
    Exposed("host_seconds", "counter", "CPU seconds of the dispatching thread.", lambda m: m.host_seconds),
    Exposed("slo_requests", "counter", "Ended requests that had an SLO, aborted ones apart.", lambda m: m.with_slo),
    Exposed("slo_met_requests", "counter", "Those of them that have kept to it.", lambda m: m.met_slo),
    Exposed("compilations", "counter", "Compilations since all programs were there.", lambda m: m.compiles),
)  # fmt: skip


class EngineCollector:
    """Reads an engine whenever it is scraped, as prometheus-client's collectors do."""

    def __init__(self, read: Callable[[], Metrics]) -> None:
        """`read` gives the figures, as `llm.metrics` does.

        Raises:
            ValueError: prometheus-client is not installed.
        """
        self._read, self._core = read, _client("prometheus_client.core")

    def collect(self) -> Iterator[Any]:
        """Yield every metric of the table."""
        metrics = self._read()
        families = {"counter": self._core.CounterMetricFamily, "gauge": self._core.GaugeMetricFamily}
        for one in EXPOSED:
            labels = () if one.label is None else (one.label,)
            family = families[one.kind](f"twinmesh_{one.name}", one.help, labels=labels)
            value = one.read(metrics)
            for label, count in value.items() if isinstance(value, Mapping) else (("", value),):
                family.add_metric((label,) if labels else (), count)
            yield family


def as_prometheus(metrics: Metrics) -> str:
    """Return the figures as Prometheus text.

    Raises:
        ValueError: prometheus-client is not installed.
    """
    text: bytes = _client("prometheus_client").generate_latest(_registry(lambda: metrics))
    return text.decode()


def serve_metrics(port: int, read: Callable[[], Metrics]) -> Callable[[], None]:
    """Serve the figures on loopback; return what ends it.

    Raises:
        ValueError: the port is in use, or prometheus-client is not installed.
    """
    try:
        server, thread = _client("prometheus_client").start_http_server(port, "127.0.0.1", _registry(read))
    except OSError as error:
        raise ValueError(f"port {port} cannot be used for metrics ({error.strerror}): give another.") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _registry(read: Callable[[], Metrics]) -> Any:
    registry = _client("prometheus_client").CollectorRegistry()
    registry.register(EngineCollector(read))
    return registry


def _client(module: str) -> Any:
    return need(module, "prometheus", "Metrics for Prometheus")
