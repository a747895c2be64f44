"""What benchmarks make of their figures; what they measure is not for tests."""

import os
import sys

import pytest
from twinmesh.scripts.bench import beside as bench_beside
from twinmesh.scripts.bench import first_token as bench_first_token
from twinmesh.scripts.bench import handoff as bench_handoff
from twinmesh.scripts.bench import offline as bench_offline


def test_a_workload_is_the_same_for_the_same_seed_and_within_its_bounds():
    work = bench_offline.workload(64, 0)
    assert work == bench_offline.workload(64, 0) != bench_offline.workload(64, 1)
    assert len(work["requests"]) == 64
    assert all(16 <= len(r["prompt"]) <= 512 and 16 <= r["tokens"] <= 128 for r in work["requests"])
    assert max(len(r["prompt"]) + r["tokens"] for r in work["requests"]) < work["max_model_len"]


def test_a_hand_off_is_held_against_a_copy():
    rounds = [
        {"bytes": 1000, "transfers": 1, "in_flight_seconds": 0.4, "exposed_seconds": 0.1 * i, "ttft": 1.0}
        for i in (1, 2, 9)
    ]
    row = bench_handoff.summarise(64, rounds)
    assert row["hidden"] == pytest.approx(0.5)
    assert row["exposed_bytes_per_second"] == pytest.approx(5000)
    assert row["exposed_over_copy"] == pytest.approx(0.2 / row["copy_seconds"])


def test_ratios_are_null_where_a_peer_is_absent():
    ours = {"seconds": 2.0, "outputs": [[1, 2], [3]], "alone": {}}
    peer = {"seconds": 3.0, "outputs": [[1, 2], [4]], "version": "x"}
    result = bench_offline.ratios({"twinmesh": ours, "transformers": peer, "vllm": None}, asked=30)
    assert result["ratio_vs_transformers"] == pytest.approx(1.5)
    assert result["ratio_vs_vllm"] is None
    assert result["vllm"] is None
    assert result["transformers"] == {"seconds": 3.0, "version": "x", "tokens_per_second": 10.0, "agreement": 0.5}
    assert result["twinmesh"]["agreement"] == 1.0


def test_ratios_of_first_tokens_are_of_the_same_pair_and_kind_of_start():
    pairs = [
        {"after": {"cold": 1.0, "warm": 0.5}, "before": {"cold": 10.0, "warm": 1.0}},
        {"after": {"cold": 3.0, "warm": 0.7}, "before": {"cold": 10.0, "warm": 2.0}},
        {"after": {"cold": 2.0, "warm": 0.6}, "before": {"cold": 40.0, "warm": 3.0}},
    ]
    cold, warm = bench_first_token.summarise(pairs)
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    assert cold["ratio to before"] == pytest.approx(0.1)
    assert warm["ratio to before"] == pytest.approx(0.35)
    assert cold["after"] == {"median": 2.0, "range": [1.0, 3.0]}


def test_a_first_token_is_the_first_byte_or_what_follows_a_marker():
    slow = "import sys, time; print('x', flush=True); time.sleep(0.2); print('@@ y', flush=True)"
    command = [sys.executable, "-c", slow]
    first, marked = (bench_first_token.first_byte(command, os.environ, marker) for marker in (b"", b"@@"))
    assert first > 0
    assert marked > 0.2


@pytest.mark.parametrize("script", ["raise SystemExit(3)", "print('x'); raise SystemExit(1)", "print()"])
def test_a_command_that_fails_or_never_says_it_is_no_figure(script):
    with pytest.raises(SystemExit, match="failed"):
        bench_first_token.first_byte([sys.executable, "-c", script], os.environ, b"x" if "x" not in script else b"")


def beside_round(ttft, tpot, alone_ttft, alone_tpot, kept):
    def figures(ttft, tpot):
        return {"ttft": {"p50": 0.0, "p99": ttft}, "tpot": {"p50": 0.0, "p99": tpot}}

    both = {**figures(ttft, tpot), "tokens_per_second": 100 * kept}
    return {"both": both, "interactive": figures(alone_ttft, alone_tpot), "batch": {"tokens_per_second": 100.0}}


def test_beside_a_batch_job_medians_are_held_against_a_chunk_more_and_a_share():
    rounds = [beside_round(*figures) for figures in ((1.0, 0.1, 0.5, 0.1, 0.8), (1.5, 0.11, 0.6, 0.1, 0.9))]
    rounds.append(beside_round(1.1, 0.2, 0.5, 0.1, 0.1))
    found = bench_beside.verdict(rounds, chunk=0.5)
    assert found["is_met"]
    assert found["ttft_p99_ratio"] == pytest.approx(2.2)
    assert found["ttft_p99_of_target"] == pytest.approx(1.0)
    assert found["tpot_p99_ratio"] == pytest.approx(1.1)
    assert found["batch_share"] == pytest.approx(0.8)
    assert not bench_beside.verdict(rounds, chunk=0.4)["is_met"]
