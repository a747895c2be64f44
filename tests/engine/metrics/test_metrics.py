"""Timelines to figures: percentiles, rates, and what they are without any requests."""

import pytest
from twinmesh.engine.metrics.counters import Counters, HostTime
from twinmesh.engine.metrics.distribution import Distribution
from twinmesh.engine.metrics.histograms import Seen
from twinmesh.engine.metrics.metrics import RECENT, Latencies, RequestLog, Unfinished
from twinmesh.engine.protocol.results import Traffic
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.protocol.timeline import Timeline

RUNNING = Seen(Timeline(0.0, tokens=[1.0, 2.0]), 2, 7)


def ended(arrival=0.0, tokens=(1.0, 2.0, 4.0), finish=4.0, kv_ready=1.5):
    return Timeline(arrival, kv_ready=kv_ready, finish=finish, tokens=list(tokens))


def test_an_engine_without_requests_has_zeros_and_no_percentiles():
    metrics = RequestLog().metrics(Unfinished(), 0, Counters(), Traffic(), HostTime())
    assert metrics.requests == {}
    assert metrics.tokens_per_second == 0.0
    assert metrics.prefix_hit_rate == 0.0
    assert metrics.handoff_bandwidth is None
    assert metrics.latencies == Latencies(None, None, None, None, None)


def test_latencies_follow_their_definitions():
    latencies = Latencies.of([ended()])
    assert (latencies.ttft.p50, latencies.tpot.p50, latencies.e2e.p50) == (1.0, 1.5, 4.0)
    assert (latencies.itl.count, latencies.itl.p50, latencies.handoff.p50) == (2, 1.5, 0.5)


def test_a_request_of_one_token_has_no_time_per_further_token():
    assert Latencies.of([ended(tokens=(1.0,), kv_ready=None)]).tpot is None


def test_percentiles_are_linear_between_ranks():
    assert Distribution.of([0.0, 1.0]) == Distribution(2, 0.5, 0.5, 0.9, 0.99)


def test_counts_come_from_requests_counters_and_traffic():
    log = RequestLog()
    log.add(ended(arrival=0.0, finish=4.0), 3, "length")
    log.add(ended(arrival=2.0, finish=6.0), 3, "abort")
    counters = Counters(prompt_tokens=40, cached_tokens=10, preemptions=1, migrations=2, retries=3)
    metrics = log.metrics(
        Unfinished([RUNNING] * 5, 2, 0.5), 6, counters, Traffic(transfers=4, bytes=3000, seconds=1.5), HostTime()
    )
    assert metrics.requests == {"length": 1, "abort": 1}
    assert (metrics.running, metrics.waiting, metrics.oldest_waiting, metrics.running_tokens) == (5, 2, 0.5, 10)
    assert metrics.compiles == 6
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.prefix_hit_rate) == (40, 10, 0.25)
    assert (metrics.generated_tokens, metrics.tokens_per_second) == (6, 1.0)
    assert (metrics.preemptions, metrics.migrations, metrics.retries) == (1, 2, 3)
    assert (metrics.handoffs, metrics.handoff_bytes, metrics.handoff_seconds) == (4, 3000, 1.5)
    assert metrics.handoff_bandwidth == pytest.approx(2000.0)


def test_only_requests_that_finished_are_timed_and_only_the_latest():
    log = RequestLog()
    log.add(ended(), 3, "error")
    for _ in range(RECENT + 1):
        log.add(ended(), 3, "stop")
    metrics = log.metrics(Unfinished(), 0, Counters(), Traffic(), HostTime())
    assert metrics.latencies.ttft.count == RECENT
    assert metrics.requests == {"error": 1, "stop": RECENT + 1}


@pytest.mark.parametrize(
    ("slo", "reason", "is_met"),
    [
        (SLO(ttft_ms=1000, tpot_ms=1500), "stop", True),
        (SLO(ttft_ms=999), "stop", False),
        (SLO(tpot_ms=1499), "length", False),
        (SLO(ttft_ms=1e6), "error", False),
        (SLO(ttft_ms=1e6), "deadline", False),
    ],
)
def test_goodput_counts_the_requests_that_keep_to_their_slo(slo, reason, is_met):
    log = RequestLog()
    log.add(ended(), 3, reason, slo)
    log.add(ended(), 3, "stop")
    log.add(ended(), 3, "abort", slo)
    metrics = log.metrics(Unfinished(), 0, Counters(), Traffic(), HostTime())
    assert (metrics.with_slo, metrics.met_slo, metrics.slo_goodput) == (1, is_met, float(is_met))
    assert RequestLog().metrics(Unfinished(), 0, Counters(), Traffic(), HostTime()).slo_goodput is None


def test_a_snapshot_stays_as_it_is():
    log = RequestLog()
    log.add(ended(), 3, "stop")
    twin = log.snapshot()
    log.add(ended(), 3, "stop")
    assert twin.metrics(Unfinished(), 0, Counters(), Traffic(), HostTime()).requests == {"stop": 1}
    assert twin.metrics(Unfinished(), 0, Counters(), Traffic(), HostTime()).latencies.e2e.count == 1
