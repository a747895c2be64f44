"""What Prometheus scrapes: read again by its own parser."""

import re
import socket
import urllib.request
from array import array
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, parser
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from twinmesh.engine.metrics.counters import Counters, HostTime
from twinmesh.engine.metrics.exposed import EXPOSED, HISTOGRAMS
from twinmesh.engine.metrics.histograms import Seen
from twinmesh.engine.metrics.mesh_figures import MeshFigures
from twinmesh.engine.metrics.metrics import RequestLog, Unfinished
from twinmesh.engine.metrics.prometheus import EngineCollector, MetricsServer, as_prometheus
from twinmesh.engine.protocol.cache_report import MissReason
from twinmesh.engine.protocol.results import Traffic
from twinmesh.engine.protocol.timeline import Timeline

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "metrics-and-timelines.md"


def metrics():
    log = RequestLog()
    log.add(Timeline(0.0, 0.1, 0.2, None, 0.3, array("d", [0.2, 0.3])), 2, "stop", None, 40)
    running = [Seen(Timeline(0.0, 0.1, 0.2, tokens=array("d", [0.2, 0.25, 0.3])), 3, 9), Seen(Timeline(1.0), 0, 5)]
    counters = Counters(prompt_tokens=40, cached_tokens=8, flips=5, planned_flips={"more decode": 3})
    counters.missed_tokens[MissReason.EVICTED] = 6
    traffic = Traffic()
    traffic.count(0, 1, 100, 0.5)
    traffic.count(0, 1, 20, 0.25)
    meshes = (
        MeshFigures("prefill", None, 2, 1, ({"used": 3, "cached": 2, "free": 5},), {"prefill": 4, "decode": 0}, 1.5),
        MeshFigures("decode", "prefill", 1, 4, ({"used": 1, "free": 9},), {"decode": 7}, 2.5),
    )  # fmt: skip
    return log.metrics(Unfinished(running, 1, 2.0), 0, counters, traffic, HostTime(1.5, 9), meshes=meshes)


def families():
    return list(parser.text_string_to_metric_families(as_prometheus(metrics)))


def samples(found):
    """By name and label values, in the order of the labels' names."""
    return {
        (one.name, *(one.labels[name] for name in sorted(one.labels))): one.value
        for family in found
        for one in family.samples
    }


def test_every_metric_of_the_tables_is_there_with_its_kind():
    found = {family.name: family.type for family in families()}
    assert found == {f"twinmesh_{one.name}": one.kind for one in EXPOSED} | {
        f"twinmesh_{one.name}": "histogram" for one in HISTOGRAMS
    }


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        (("twinmesh_requests_total", "stop"), 1),
        (("twinmesh_requests_waiting",), 1),
        (("twinmesh_requests_running",), 1),
        (("twinmesh_oldest_waiting_seconds",), 2.0),
        (("twinmesh_generated_tokens_total",), 5),  # of the one that runs, too
        (("twinmesh_missed_tokens_total", "evicted"), 6),
        (("twinmesh_role_flips_total", "more decode"), 3),
        (("twinmesh_role_flips_total", "called for"), 2),
        (("twinmesh_handoffs_total", "1", "0"), 2),
        (("twinmesh_handoff_bytes_total", "1", "0"), 120),
        (("twinmesh_handoff_seconds_total", "1", "0"), 0.75),
        (("twinmesh_mesh_role", "0", "prefill"), 1),
        (("twinmesh_mesh_role", "0", "decode"), 0),
        (("twinmesh_mesh_draining", "1"), 1),
        (("twinmesh_mesh_devices", "0"), 2),
        (("twinmesh_mesh_busy_seconds_total", "1"), 2.5),
        (("twinmesh_steps_total", "decode", "1"), 7),
        (("twinmesh_kv_pages", "0", "1", "free"), 9),
        (("twinmesh_host_cpu_seconds_total",), 1.5),
        (("twinmesh_time_to_first_token_seconds_count",), 2),
        (("twinmesh_time_to_first_token_seconds_bucket", "0.1"), 0),
        (("twinmesh_time_to_first_token_seconds_bucket", "0.25"), 2),
        (("twinmesh_inter_token_latency_seconds_bucket", "+Inf"), 3),
        (("twinmesh_request_prompt_tokens_sum",), 40),
    ],
)
def test_figures_come_with_their_labels(sample, value):
    assert samples(families())[sample] == pytest.approx(value)


def test_buckets_are_cumulative_and_the_last_is_the_count():
    for family in families():
        if family.type == "histogram":
            counts = [one.value for one in family.samples if one.name.endswith("_bucket")]
            assert counts == sorted(counts)
            assert counts[-1] == next(one.value for one in family.samples if one.name.endswith("_count"))


def test_names_follow_the_conventions_and_are_fit_for_openmetrics_with_their_units():
    registry = CollectorRegistry(auto_describe=True)
    registry.register(EngineCollector(metrics))
    text = openmetrics_text(registry).decode()
    found = {family.name: family.unit for family in read_openmetrics(text)}
    assert found["twinmesh_handoff_bytes"] == "bytes"
    assert found["twinmesh_generated_tokens"] == "tokens"
    assert found["twinmesh_time_to_first_token_seconds"] == "seconds"
    for name in found:
        assert re.fullmatch(r"twinmesh_[a-z0-9]+(_[a-z0-9]+)*", name)
        assert not re.search(r"_(ms|milliseconds|mb|kb|minutes|total)(_|$)", name)


def test_the_guide_lists_every_metric_with_its_labels_and_buckets():
    rows = re.findall(r"^\| `(twinmesh_\w+)` \| (\w+) \| ([^|]*) \|", GUIDE.read_text(), re.MULTILINE)
    documented = {name: (kind, labels.strip()) for name, kind, labels in rows}
    expected = {
        f"twinmesh_{one.name}{'_total' * (one.kind == 'counter')}": (one.kind, ", ".join(one.labels)) for one in EXPOSED
    }
    expected |= {f"twinmesh_{one.name}": ("histogram", _range(one.buckets)) for one in HISTOGRAMS}
    assert documented == expected


def _range(buckets):
    return f"{buckets[0]:,.10g} to {buckets[-1]:,.10g}"


def test_a_registry_takes_one_engine_and_says_so_of_a_second():
    registry = CollectorRegistry(auto_describe=True)
    registry.register(EngineCollector(metrics))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(EngineCollector(metrics))


def scrape(port):
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return samples(parser.text_string_to_metric_families(text))


def test_a_port_serves_nothing_until_there_is_an_engine_and_then_its_figures_on_loopback_alone():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"Port {port} cannot be used for metrics \(Address already in use\)"):
            MetricsServer(port)
    with MetricsServer(port) as server:
        assert scrape(port) == {}
        server.show(metrics)
        assert scrape(port)["twinmesh_prompt_tokens_total",] == 40
        assert server.address == ("127.0.0.1", port)
    with pytest.raises(OSError, match="refused"):
        scrape(port)
