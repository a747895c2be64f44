"""`twinmesh simulate`: a small trace from file to report, and every input that cannot be used in a sentence."""

import re
from contextlib import nullcontext

import pytest
from helpers.simulated import costs
from twinmesh.engine.metrics.report_file import read_report
from twinmesh.engine.simulation.costs.profile import Profile, write_profile
from twinmesh.engine.simulation.logs.replay import replay
from twinmesh.scripts.cli import main

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
H100 = ("--model", "llama-3.1-8b", "--device", "h100", "--topology", "pool=4", "--roles", "prefill=1,decode=3")


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:{second:02}.5,{100 + 37 * second},{5 + second % 7}\n" for second in range(20)]
    path.write_text(HEADER + "".join(lines))
    return str(path)


def profile(**changes):
    whole = dict(
        model="llama-3.1-8b", dtype="bfloat16", formats=(), tp=(1, 1), device="NVIDIA H100 80GB HBM3", page_size=64,
        prefill_buckets=(64, 256), decode_buckets=(8,), costs=costs(), source="measured", date="2026-11-30",
    )  # fmt: skip
    return Profile(**whole | changes)


def simulated(*arguments):
    return main(["simulate", *arguments])


def test_a_small_trace_becomes_a_report_and_a_log_that_replays(trace, tmp_path, capsys):
    out, log = tmp_path / "report.json", tmp_path / "run.log"
    arguments = ("--slo", "ttft=1s,tpot=50ms", "--json", str(out), "--decision-log", str(log))
    assert simulated("--trace", trace, *H100, *arguments) == 0
    text = capsys.readouterr().out
    assert "llama-3.1-8b on 4 x h100: pool=4, roles prefill=1,decode=3, fcfs" in text
    assert "roofline only" in text
    assert re.search(r"20 of 20 requests met it", text)
    report, records, _ = read_report(out)
    assert (len(records), report.requests, report.run.gpus) == (20, 20, 4)
    assert len(replay(str(log)).finished) == 20


def test_faster_shorter_and_at_another_rate(trace, tmp_path, capsys):
    walls = []
    for extra in ((), ("--speed", "4"), ("--rate", "10"), ("--requests", "5")):
        assert simulated("--trace", trace, *H100, *extra, "--json", str(tmp_path / "out.json")) == 0
        report, *_ = read_report(tmp_path / "out.json")
        walls.append((report.requests, round(report.wall)))
    assert walls == [(20, 19), (20, 5), (20, 2), (5, 4)]


def test_seed_and_noise(trace, tmp_path):
    means = []
    for extra in ((), ("--seed", "1"), ("--noise", "0.2"), ("--noise", "0.2", "--seed", "1")):
        assert simulated("--trace", trace, *H100, *extra, "--json", str(tmp_path / "out.json")) == 0
        means.append(read_report(tmp_path / "out.json")[0].ttft.mean)
    assert means[0] == means[1]
    assert len(set(means)) == 3


def test_costs_come_from_a_profile(trace, tmp_path, capsys):
    path = tmp_path / "profile.json"
    write_profile(profile(), path)
    rest = ("--trace", trace, "--model", "meta-llama/Meta-Llama-3.1-8B", "--topology", "both=1", "--profile", str(path))
    for device in ((), ("--device", "h100")):
        assert simulated(*rest, *device) == 0
        assert "step times measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "qwen3-8b"}, "is of another model: it has qwen3-8b, and llama-3.1-8b is asked for"),
        ({"device": "NVIDIA H200"}, "is of another device: it has NVIDIA H200, and h100 is asked for"),
        ({"tp": (2, 2)}, "is of another tp of prefill and decode"),
        ({"page_size": 16}, "is of another page size"),
    ],
)
def test_a_profile_of_something_else_is_refused(trace, tmp_path, capsys, changes, words):
    path = tmp_path / "profile.json"
    write_profile(profile(**changes), path)
    assert simulated("--trace", trace, *H100, "--profile", str(path)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--slo", "ttft=1000"), "ttft=1000 has no unit, ms or s: write ttft=1000ms"),
        (("--slo", "ttft=fast"), "ttft=fast is no number"),
        (("--slo", "ttf=1s"), "'ttf=1s' is none of ttft, tpot and percentile"),
        (("--slo", "ttft=1s,ttft=2s"), "'ttft=2s' is there twice"),
        (("--slo", "ttft=1s,percentile=99ms"), "percentile=99ms has a unit: write percentile=99"),
        (("--slo", "ttft=1s,percentile=100"), "it must be a number above 0 and below 100"),
        (("--slo", "ttft=0ms"), "must be a number of milliseconds above 0"),
        (("--rate", "0"), "'0' is not a number above 0"),
        (("--rate", "-1"), "'-1' is not a number above 0"),
        (("--speed", "nan"), "'nan' is not a number above 0"),
        (("--device", "h10"), "the devices are h100, h200, b200; the nearest is 'h100'"),
        (("--model", "llama-3.1-70b"), r"llama-3.1-70b does not fit at tp 1: .*GiB of weights"),
        (("--trace", "none.csv"), "none.csv"),
        (("--trace", "poisson:rate=0,seconds=5"), "rate"),
    ],
)
def test_what_cannot_be_used_is_a_sentence(trace, capsys, arguments, words):
    with pytest.raises(SystemExit) if arguments[0] in ("--slo", "--rate", "--speed") else nullcontext():
        assert simulated("--trace", trace, *H100, *arguments) in (1, 2)
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        (HEADER, "trace.csv"),
        ("a,b\n1,2\n", "TIMESTAMP"),
        (HEADER + "2023-11-16 18:15:00,x,3\n", "line 2"),
    ],
)
def test_a_trace_that_is_none_is_refused(tmp_path, capsys, content, words):
    path = tmp_path / "trace.csv"
    path.write_text(content)
    assert simulated("--trace", str(path), *H100) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_nobody_says_what_a_step_costs(trace, capsys):
    assert simulated("--trace", trace, "--model", "llama-3.1-8b", "--topology", "both=1") == 2
    assert "nobody says what a step costs: give a device, such as h100, or a profile." in capsys.readouterr().err


def test_a_simulated_log_says_what_ran_and_is_explained(trace, tmp_path, capsys):
    log = str(tmp_path / "run.log")
    assert simulated("--trace", trace, *H100, "--decision-log", log) == 0
    assert main(["explain", log, "--worst", "1"]) == 0
    assert main(["whatif", log, "--topology", "both=4"]) == 0
    assert "llama-3.1-8b" in capsys.readouterr().out


def test_times_that_no_clock_resolves_are_refused(trace, capsys):
    assert simulated("--trace", f"{trace}:faster=1e-12", *H100) == 2
    assert "only times up to 1e+09 s" in capsys.readouterr().err


def test_inputs_are_not_written_over(trace, tmp_path, capsys):
    assert simulated("--trace", trace, *H100, "--json", trace) == 2
    assert "is the load: give another name" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(command, trace, tmp_path, capsys):
    more = ("--devices", "2", "--slo", "ttft=1s") if command == "plan" else ()
    arguments = ("--trace", trace, "--model", "llama-3.1-8b", "--device", "h100", *more)
    assert main([command, *arguments, "--json", str(tmp_path / "no" / "report.json")]) == 2
    caught = capsys.readouterr()
    assert "does not exist: make it first" in caught.err
    assert "simulating" not in caught.err
    assert not caught.out


def test_auto_is_for_engines_on_devices_that_are_there(trace, capsys):
    assert simulated("--trace", trace, *H100[:4], "--topology", "auto") == 2
    assert "topology 'auto' is for an engine that starts" in capsys.readouterr().err


def test_more_devices_than_a_topology_may_have_are_named(trace, capsys):
    with pytest.raises(SystemExit):
        simulated("--trace", trace, *H100[:4], "--topology", "both=10000000")
    assert "use at most 65536" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["simulate", "--model", "llama-3.1-8b", "--trace", "x", "--profile"], ["explain"]])
def test_deeply_nested_json_is_no_profile_and_no_log(command, tmp_path, capsys):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    assert main([*command, str(path)]) == 2
    assert "deep.json is no " in capsys.readouterr().err
