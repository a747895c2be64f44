"""The benchmark of lost hosts: who is lost when, what counts as lost or repeated, and when TTFT is as before."""

import json

import numpy as np
import pytest
from twinmesh.engine.metrics.request_records import RequestRecord, RequestRecords
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.simulation.workload import WorkRequest
from twinmesh.scripts.bench import lost_hosts
from twinmesh.scripts.bench.lost_hosts import Times, judged, losses, recovery

TIMES = Times(warm=0.0, first_loss=10.0, last_back=30.0, end=50.0)


def test_of_256_hosts_13_are_lost_evenly_within_the_minute():
    found = losses(256, 0.05, 40.0, 60.0, 60.0, 5.0)
    assert len({loss.mesh for loss in found}) == len(found) == 13
    assert found[0].at == 40.0
    assert 95.0 < found[-1].at < 100.0
    assert {loss.mesh < 256 for loss in found} == {True}


def test_recovery_is_until_no_later_window_is_high():
    arrival = np.arange(0.0, 50.0, 0.5)
    ttft = np.where((arrival >= 12) & (arrival < 27), 2.0, 1.0)
    assert recovery(arrival, ttft, TIMES, 99) == 20.0  # the window from 25 to 30 is the last high one
    assert recovery(arrival, ttft, TIMES, 50) == 15.0  # of which more than half of the requests are as before
    assert recovery(arrival, np.ones(100), TIMES, 99) == 0.0
    assert recovery(arrival, np.where(arrival >= 12, 2.0, 1.0), TIMES, 99) is None
    with pytest.raises(ValueError, match="5 s above warm=0"):
        recovery(arrival, ttft, TIMES._replace(first_loss=4.0), 99)


def test_requests_that_do_not_end_are_lost_and_tokens_count_against_those_asked_for():
    def record(number, at, tokens, first, reason="length"):
        return RequestRecord(number, at, 10, tokens, 0, at + first, at + first + 1, at + first + 1, reason=reason)

    records = [
        record(3, 40.0, 10, 0.1), record(0, 5.0, 10, 0.1), record(1, 20.0, 12, 0.3, "error"), record(2, 25.0, 9, 0.1),
    ]  # fmt: skip
    asked = [WorkRequest(10, 10, 5.0), WorkRequest(10, 10, 20.0), WorkRequest(10, 10, 25.0), WorkRequest(10, 10, 40.0)]
    found = judged(RequestRecords(records), asked, TIMES, SLO(ttft_ms=200))
    assert (found["lost"], found["tokens_repeated"], found["tokens_missing"]) == (1, 2, 1)
    assert {name: part["goodput"] for name, part in found["parts"].items()} == {
        "before": 0.1, "during": 0.05, "after": 0.05,
    }  # fmt: skip
    assert found["parts"]["during"]["met"] == 0.5
    assert found["parts"]["during"]["ttft_max"] == pytest.approx(0.3)


def test_the_command_loses_no_request_of_a_small_engine(tmp_path, capsys):
    sizes = ["--hosts=2", "--lost=0.5", "--prompt=8192", "--output=64"]
    times = ["--within=5", "--restart=8", "--silent=2", "--warm=2", "--before=8", "--after=6"]
    assert lost_hosts.main([*sizes, *times, f"--json={tmp_path / 'x.json'}"]) == 0
    figures = json.loads((tmp_path / "x.json").read_text())["figures"]
    assert (figures["lost"], figures["tokens_repeated"], figures["tokens_missing"]) == (0, 0, 0)
    assert figures["hosts_lost"] == 1
    assert figures["displaced"] > 0
    capsys.readouterr()
    assert lost_hosts.main(["--hosts=4", "--lost=0"]) == 2
    assert capsys.readouterr().err == (
        "lost_hosts: a share of 0 of 4 hosts is 0: at least one has to be lost, and not all.\n"
    )
