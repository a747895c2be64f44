"""`bench guidellm`: what it refuses, and where GuideLLM is installed a run whose figures are ours too."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from twinmesh.engine.metrics.benchmark_file import read_benchmark
from twinmesh.scripts.cli import main

RUN = ["run", "--profile", "kind=synchronous"]


def test_without_guidellm_its_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "guidellm", None)
    assert main(["bench", "guidellm", "--model", "m", *RUN]) == 2
    assert "pip install 'twinmesh[guidellm]'" in capsys.readouterr().err


def test_the_backend_is_not_for_the_caller_to_name(capsys):
    assert main(["bench", "guidellm", "--model", "m", *RUN, "--backend=kind=openai_http"]) == 2
    assert "--backend is what this command gives to GuideLLM" in capsys.readouterr().err


def test_reports_go_into_a_new_folder(tmp_path, capsys):
    assert main(["bench", "guidellm", "--model", "m", "--reports", str(tmp_path), *RUN]) == 2
    assert capsys.readouterr().err.endswith(f"{tmp_path} exists: give another name, or move it away.\n")


@pytest.mark.skipif(
    find_spec("guidellm") is None,
    reason="needs GuideLLM, in an environment of its own: pip install 'twinmesh[guidellm]' pytest, and run this there",
)
def test_guidellms_figures_and_ours_on_one_run_agree(tiny_path, tmp_path):
    engine = ["--model", tiny_path, "--topology", "prefill=1,decode=1", "--max-model-len", "256", "--page-size", "16"]
    sizes = ["--max-num-seqs", "4", "--prefill-buckets", "64", "--decode-buckets", "4", "--reports", tmp_path / "ours"]
    load = ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=12"]
    data = ["--data", "kind=synthetic_text,prompt_tokens=48,output_tokens=24", "--disable-console"]
    output = ["--output", f"kind=json,path={tmp_path / 'theirs.json'}"]
    words = [*engine, *sizes, "run", *load, *data, *output]
    command = [sys.executable, "-m", "twinmesh", "bench", "guidellm", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (point,) = read_benchmark(tmp_path / "ours" / "1.json").points
    (theirs,) = json.loads((tmp_path / "theirs.json").read_text())["benchmarks"]
    report, metrics = point.measured.report, theirs["metrics"]
    assert report.finished == metrics["request_totals"]["successful"]
    mean = {name: metrics[name]["successful"]["mean"] for name in metrics if "successful" in metrics[name]}
    assert mean["output_token_count"] == 24
    # What the event loop takes until it has a token, theirs has and ours has not.
    assert mean["time_to_first_token_ms"] / 1000 == pytest.approx(report.ttft.mean, rel=0.2, abs=0.03)
    assert mean["inter_token_latency_ms"] / 1000 == pytest.approx(report.tpot.mean, rel=0.2, abs=0.005)
    assert mean["request_latency"] == pytest.approx(report.e2e.mean, rel=0.2, abs=0.05)
