"""Histograms of requests: what falls into which bucket, and that nothing that was read is ever less later."""

from array import array

import pytest
from twinmesh.engine.metrics.histograms import BUCKETS, Observed, Seen
from twinmesh.engine.protocol.timeline import Timeline


def seen(stamps=(0.5, 0.75, 1.5), *, arrival=0.0, finish=1.5, kv_ready=None, has_finished=True, prompt_len=100):
    line = Timeline(arrival, arrival + 0.25, stamps[0] if stamps else None, kv_ready, finish, array("d", stamps))
    return Seen(line, len(stamps), prompt_len, has_finished)


def histograms(*requests):
    observed = Observed()
    for request in requests:
        observed.add(request)
    return observed.histograms()


def count_at(histogram, bound):
    return histogram.counts[histogram.bounds.index(bound)]


def test_each_quantity_follows_its_definition():
    found = histograms(seen(kv_ready=0.625), seen((10.0, 10.001), arrival=9.0, finish=11.0))
    values = {
        "ttft": (0.5, 1.0), "itl": (0.25, 0.75, 0.001), "tpot": (0.5, 0.001), "e2e": (1.5, 2.0), "queue": (0.25, 0.25),
        "handoff": (0.125,), "prompt": (100, 100), "output": (3, 2),
    }  # fmt: skip
    for name, expected in values.items():
        assert sum(found[name].counts) == len(expected), name
        assert found[name].total == pytest.approx(sum(expected)), name


def test_a_value_falls_into_the_bucket_that_ends_with_it_and_one_above_all_into_the_last():
    found = histograms(seen((0.5, 0.625, 1000.0), finish=1000.0))
    assert count_at(found["ttft"], 0.5) == 1
    assert count_at(found["itl"], 0.25) == 1  # of 0.1 < 0.125 <= 0.25
    assert found["itl"].counts[-1] == 1
    assert count_at(found["output"], 4.0) == 1
    assert count_at(found["prompt"], 128.0) == 1


def test_gaps_are_within_requests_alone():
    found = histograms(seen((0.5,)), seen((700.0, 701.0), arrival=699.0), seen(()), seen((900.0,), arrival=899.5))
    assert (sum(found["itl"].counts), found["itl"].total) == (1, 1.0)
    assert sum(found["ttft"].counts) == 3


def test_a_request_that_failed_counts_for_what_its_caller_has_seen_and_not_as_short():
    found = histograms(seen(has_finished=False))
    assert [sum(found[name].counts) for name in ("ttft", "itl", "queue")] == [1, 2, 1]
    assert [sum(found[name].counts) for name in ("tpot", "e2e", "prompt", "output")] == [0, 0, 0, 0]


def test_counting_in_batches_or_at_once_is_the_same_to_the_last_bit():
    requests = [seen((n * 0.1, n * 0.1 + 0.3, n * 0.1 + 0.31), arrival=n * 0.1 - 0.05) for n in range(1, 200)]
    one = Observed()
    for request in requests:
        one.add(request)
    running = Observed().snapshot(requests[::-1])
    assert one.histograms() == running.histograms()


def test_a_request_that_runs_counts_up_to_the_tokens_it_had_and_the_rest_once_it_has_ended():
    request, observed = seen(), Observed()
    so_far = observed.snapshot([request._replace(tokens=2, has_finished=False)]).histograms()
    observed.add(request)
    at_end = observed.snapshot().histograms()
    assert [sum(one["itl"].counts) for one in (so_far, at_end)] == [1, 2]
    assert [sum(one["e2e"].counts) for one in (so_far, at_end)] == [0, 1]
    for name in BUCKETS:
        assert all(a <= b for a, b in zip(so_far[name].counts, at_end[name].counts, strict=True))
        assert so_far[name].total <= at_end[name].total


def test_a_snapshot_stays_as_it_is():
    observed = Observed()
    observed.add(seen())
    twin = observed.snapshot()
    for _ in range(100):
        observed.add(seen())
    assert sum(twin.histograms()["e2e"].counts) == 1
    assert sum(observed.histograms()["e2e"].counts) == 101


def test_buckets_ascend():
    for bounds in BUCKETS.values():
        assert list(bounds) == sorted(set(bounds))
