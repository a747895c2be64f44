"""`bench mlperf` on the tiny model with the real LoadGen, and what it refuses."""

import sys

import pytest
from twinmesh.engine.metrics.benchmark_file import read_benchmark
from twinmesh.engine.simulation.loads.load_spec import read_workload
from twinmesh.scripts.cli import main

ARGUMENTS = ["--as", "gpt-oss-120b-interactive", "--scenario", "Server"]


def test_a_run_of_loadgen_is_a_report_that_the_simulator_replays(tiny_path, tmp_path, capsys):
    """In this process, so no other test of it may have LoadGen read its configuration."""
    pytest.importorskip("mlperf_loadgen", reason="needs LoadGen: pip install 'twinmesh[loadgen]'")
    engine = ["--model", tiny_path, "--topology", "both=1", "--max-model-len", "64", "--page-size", "16"]
    sizes = ["--max-num-seqs", "4", "--prefill-buckets", "32", "--decode-buckets", "4", "--no-prefix-caching"]
    short = ["--scale", "0.001", "--rate", "20", "--data", "input=8-20,output=5", "--json", tmp_path / "run.json"]
    words = [*ARGUMENTS, *engine, *sizes, *short, "--logs", tmp_path / "logs"]
    assert main(["bench", "mlperf", *map(str, words)]) == 0
    said = capsys.readouterr().out
    assert "TTFT 2000 ms and TPOT 15 ms at P99, at least 0.6 s and 1 queries, 7 samples" in said
    about, (point,) = read_benchmark(tmp_path / "run.json")
    report, records, series = point.measured
    assert (about.preset, about.scale, point.rate) == ("mlperf", 0.001, 20.0)
    assert "not a valid run, whatever LoadGen says" in report.run.notes[0]
    assert report.run.notes[1].startswith("LoadGen 6.0.17")
    assert (report.goodput.slo.ttft_ms, report.goodput.slo.tpot_ms) == (2000, 15)
    assert report.tokens.cached == 0
    assert series is not None
    assert (tmp_path / "logs" / "mlperf_log_summary.txt").read_text().count("Result is : ") == 1
    replayed = list(read_workload(str(tmp_path / "run.json")).requests)
    since = sorted(one.arrival - min(records.column("arrival")) for one in records)
    assert [work.at for work in replayed] == pytest.approx(since)
    assert sorted(work.prompt_len for work in replayed) == sorted(records.column("prompt_len"))


@pytest.mark.parametrize("name", ["logs", "json"])
def test_what_exists_is_not_written_over(name, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir() if name == "logs" else taken.touch()
    assert main(["bench", "mlperf", "--model", "m", *ARGUMENTS, f"--{name}", str(taken)]) == 2
    assert f"{taken} exists: give another name" in capsys.readouterr().err


def test_without_loadgen_its_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    assert main(["bench", "mlperf", "--model", "m", *ARGUMENTS]) == 2
    assert "pip install 'twinmesh[loadgen]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
