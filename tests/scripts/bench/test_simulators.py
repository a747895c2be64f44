"""What the comparison with other simulators asks of them and makes of their answers; they are not for tests."""

import argparse
import json

import pytest
from twinmesh.engine.simulation.workload import WorkRequest
from twinmesh.scripts.bench import simulator_runs as runs
from twinmesh.scripts.bench import simulators
from twinmesh.scripts.bench.published import PUBLISHED, Published

OURS = Published("meta-llama/Meta-Llama-3.1-8B", "h100", "bfloat16", 64, 4, 6, 2, 5.0, "TPOT, ms", "us")


@pytest.fixture
def trace(tmp_path):
    file = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{second:02},{100 + second},{10 + second}" for second in range(4)]
    file.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return file


def test_a_trace_is_written_with_blocks_that_no_prompts_share(tmp_path):
    runs.write_mooncake([WorkRequest(512, 7, 0.0), WorkRequest(513, 8, 1.5)], tmp_path / "trace.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert lines[1] == {"timestamp": 1500.0, "input_length": 513, "output_length": 8, "hash_ids": [1, 2]}
    assert lines[0]["hash_ids"] == [0]


@pytest.mark.parametrize(
    ("topology", "mode", "workers"),
    [
        ("both=4xtp2", "aggregated", {"aggregated": (4, 2)}),
        ("prefill=3,decode=1xtp2", "disaggregated", {"prefill": (3, 1), "decode": (1, 2)}),
    ],
)
def test_a_topology_becomes_workers(topology, mode, workers):
    engine = runs.engine_config("m", "h200", topology)
    assert (engine["mode"], engine["hardware"]) == (mode, "h200_sxm")
    sizes = {name: tuple(worker["parallelism"].values()) for name, worker in engine["workers"].items()}
    assert sizes == workers


def test_the_batch_of_the_estimate_keeps_up_with_the_trace(trace, monkeypatch, tmp_path):
    asked = []

    def ask(folder, questions, core):
        asked.extend(questions)
        return [{"ttft": 9.0, "tpot": question["batch_size"], "requests_per_second": question["batch_size"] / 10}
                for question in questions]  # fmt: skip

    monkeypatch.setattr(runs, "ask", ask)
    found = simulators.keeping_up(tmp_path, runs.Setting("m", "h100", "both=2", str(trace), 1), 0)
    assert [question["batch_size"] for question in asked] == [1, 2, 4, 8]  # twice 0.8 a second are enough for 4 in 3 s
    assert (asked[0]["isl"], asked[0]["osl"]) == (102, 12)
    assert found == {"ttft p50": 9.0, "tpot p50": 8}


def test_our_simulation_answers_for_a_trace_and_for_a_published_load(trace):
    figures = runs.simulate_trace(runs.Setting(OURS.model, "h100", "prefill=1,decode=1", str(trace), 2))
    assert figures["ttft p50"] > 1
    assert figures["requests_per_second"] > 0
    figures = runs.simulate_load(OURS)
    assert 4 < figures["tpot p50"] < 12  # what reading 16 GB takes at 3.35 TB/s, and what is around it


def test_our_steps_are_asked_for_in_the_least_bucket():
    steps = runs.our_steps(OURS.model, "h100", [300, 512], [(1, 1024), (9, 1024)])
    assert steps["prefill"][0] == pytest.approx(steps["prefill"][1], rel=0.01)
    assert steps["decode"][0] < steps["decode"][1]


def test_without_peers_the_tables_have_our_figures_alone(trace, tmp_path, capsys):
    file = tmp_path / "simulators.json"
    assert simulators.main(["--trace", str(trace), "--tables", "steps", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "aisimulate is left out: give a folder" in out
    assert {row["setting"].split()[0] for row in json.loads(file.read_text())["steps"]} == {"h100", "h200"}


def test_a_topology_that_is_none_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="is no topology with a number of copies"):
        simulators.topology_of("prefill=1*2")
    assert simulators.topology_of("prefill=16,decode=48*10") == ("prefill=16,decode=48", 10)


def test_published_figures_are_told_apart_by_their_names():
    assert len({published.name for published in PUBLISHED}) == len(PUBLISHED)
