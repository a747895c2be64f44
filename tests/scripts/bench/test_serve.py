"""`twinmesh bench serve` from its arguments to its files: on the simulator, on a tiny engine, and what it refuses."""

import json
import sys

import pytest
from twinmesh.engine.benchmark.presets import PRESETS
from twinmesh.engine.metrics.benchmark_file import read_benchmark
from twinmesh.engine.scheduler.cost_model import CostModel, LinkCost, ProgramCost
from twinmesh.engine.simulation.costs.profile import profile_of, write_profile
from twinmesh.scripts.bench import serve
from twinmesh.scripts.cli import main

SIMULATED = ["--model", "llama-3.1-8b", "--device", "h100"]
PRESET = ["--preset", "aa-load", "--scale", "0.01", "--max-concurrency", "2"]


def test_a_preset_on_the_simulator_gives_a_table_and_a_file(tmp_path, capsys):
    out = tmp_path / "run.json"
    arguments = [*SIMULATED, *PRESET, "--topology", "prefill=1,decode=1", "--json", str(out)]
    assert serve.main(arguments) == 0
    said = capsys.readouterr().out
    assert "Shaped like Artificial Analysis' load test, phases of 3 minutes, 1000/1000; unofficial." in said
    about, points = read_benchmark(out)
    assert (about.preset, about.scale, about.when) == ("aa-load", 0.01, None)
    assert [point.concurrency for point in points] == [1, 2]
    assert [line.split()[:3] for line in said.splitlines()[-2:]] == [
        ["concurrency", "1", "simulated"], ["concurrency", "2", "simulated"],
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"run\.json exists: give another name, or move it away"):
        serve.main(arguments)


def test_a_load_of_ones_own_runs_on_the_simulator(capsys):
    trace = "poisson:rate=5,input=100,output=5,requests=20"
    assert serve.main([*SIMULATED, "--trace", trace, "--slo", "ttft=1s,tpot=50ms"]) == 0
    said = capsys.readouterr().out
    assert "20 requests" in said
    assert "unofficial" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            [*SIMULATED, "--trace", "x.csv", "--scale", "0.5"],
            "--scale, --concurrency, --max-concurrency and --data are",
        ),
        ([*SIMULATED, *PRESET, "--accuracy"], "--accuracy would do nothing on the simulator alone"),
        ([*SIMULATED, *PRESET, "--dtype", "float32", "--power"], "--power, --dtype would do nothing"),
        ([*SIMULATED, *PRESET, "--decision-log", "x.log"], "--decision-log would do nothing"),
        ([*SIMULATED, *PRESET, "--data", "x.csv"], "has lengths of its own"),
        (["--model", "tiny", *PRESET, "--least-score", "0.5"], "--least-score needs a score: give --accuracy too"),
        (
            ["--model", "tiny", "--trace", "closed:concurrency=1,requests=1,input=1,output=1", "--seed", "3"],
            "--seed would",
        ),
        (["--model", "tiny", "--preset", "endpoints", "--max-concurrency", "5"], "there are no 7 points"),
        ([*SIMULATED[:2], *PRESET, "--device", "h9000"], "h9000"),
    ],
)
def test_what_cannot_be_or_would_do_nothing_is_refused_before_anything_runs(arguments, says):
    with pytest.raises(ValueError, match=says):
        serve.main(arguments)


@pytest.mark.parametrize(
    ("flag", "module", "extra"), [(["--html", "p.html"], "plotly", "report"), (["--power"], "pynvml", "power")]
)
def test_without_a_package_its_extra_is_named_before_a_model_loads(flag, module, extra, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["bench", "serve", "--model", "none.gguf", *PRESET, *flag]) == 2
    assert f"pip install 'twinmesh[{extra}]'" in capsys.readouterr().err


def test_a_price_of_ones_own_counts_on_the_simulator(tmp_path):
    out = tmp_path / "run.json"
    trace = "poisson:rate=5,input=100,output=5,requests=4"
    assert serve.main([*SIMULATED, "--trace", trace, "--gpu-hour-price", "7", "--json", str(out)]) == 0
    (point,) = read_benchmark(out).points
    assert point.measured.report.dollars_per_gpu_hour == 7


def test_a_real_engine_and_its_simulated_twin_run_the_same_preset(tiny_path, tmp_path, capsys):
    profile, out = tmp_path / "tiny.profile.json", tmp_path / "run.json"
    buckets = {"prefill_buckets": (16,), "decode_buckets": (4,)}
    flags = ["--max-model-len", "32", "--max-num-seqs", "4", "--page-size", "16", "--dtype", "float32"]
    flags += ["--prefill-buckets", "16", "--decode-buckets", "4"]
    arguments = ["--model", str(tiny_path), "--preset", "inferencex", "--scale", "0.002", "--concurrency", "1,2"]
    costs = CostModel(
        prefill={16: ProgramCost(0.01)}, decode={4: ProgramCost(0.005)}, fused={},
        link=LinkCost(0.001, 1e-9),
    )  # fmt: skip
    write_profile(_profile(tiny_path, costs, buckets), profile)
    assert serve.main([*arguments, *flags, "--simulate", "--profile", str(profile), "--json", str(out)]) == 0
    real, twin = read_benchmark(out), read_benchmark(tmp_path / "run.simulated.json")
    for ours, theirs in zip(real.points, twin.points, strict=True):
        assert (ours.measured.report.run.source, theirs.measured.report.run.source) == ("measured", "simulated")
        assert ours.measured.report.run.topology == theirs.measured.report.run.topology
        assert lengths(ours) == lengths(theirs)
        assert ours.measured.report.late.count == 10 * ours.concurrency
        assert ours.measured.report.tokens.cached == 0  # no prompt is one of another point or of the warm-up
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert rows == [["concurrency", str(n), name] for n in (1, 2) for name in ("measured", "simulated")]
    assert json.loads(out.read_text())["about"]["shaped_like"] == PRESETS["inferencex"].shaped_like


def lengths(point):
    records = sorted(point.measured.records, key=lambda record: record.number)
    return [(record.number, record.prompt_len, record.output_len) for record in records]


def _profile(path, costs, buckets):
    from types import SimpleNamespace

    from twinmesh.engine.sharding.mesh import find_devices
    from twinmesh.engine.topology import Topology
    from twinmesh.models.checkpoints.known_models import named_model

    like = SimpleNamespace(
        dtype="float32", formats=(), topology=Topology.parse("both=1"), page_size=16, kv=None, **buckets
    )
    kind = find_devices()[0].device_kind
    return profile_of(
        like, costs, model=named_model(path).name, device=kind, source="measured", date="2026-11-30", spread=0.1
    )
