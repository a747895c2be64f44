"""What Prometheus scrapes: read again by its own parser."""

import socket
import urllib.request

import pytest
from twinmesh.engine.metrics.counters import Counters, HostTime
from twinmesh.engine.metrics.metrics import RequestLog
from twinmesh.engine.metrics.prometheus import EXPOSED, as_prometheus, serve_metrics
from twinmesh.engine.protocol.results import Traffic
from twinmesh.engine.protocol.timeline import Timeline

parser = pytest.importorskip("prometheus_client.parser")


def metrics():
    log = RequestLog()
    log.add(Timeline(0.0, 0.1, 0.2, None, 0.3, [0.2, 0.3]), 2, "stop")
    return log.metrics(3, 0, Counters(prompt_tokens=40, cached_tokens=8), Traffic(1, 100, 0.5), HostTime(1.5, 9))


def samples(text):
    families = parser.text_string_to_metric_families(text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_every_figure_has_a_name_and_its_value():
    found = samples(as_prometheus(metrics()))
    assert found["twinmesh_requests_total", "stop"] == 1
    assert found["twinmesh_requests_running",] == 3
    assert found["twinmesh_handoff_bytes_total",] == 100
    assert found["twinmesh_missed_tokens_total", "evicted"] == 0
    assert {name for name, *_ in found} == {
        f"twinmesh_{one.name}{'_total' * (one.kind == 'counter')}" for one in EXPOSED
    }


def test_a_port_serves_what_is_read_and_one_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be used for metrics"):
            serve_metrics(port, metrics)
    stop = serve_metrics(port, metrics)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    finally:
        stop()
    assert samples(text)["twinmesh_prompt_tokens_total",] == 40
