"""Presets as loads, and what runs them; on a simulated engine, and on one that says what it gives."""

import json
from dataclasses import replace

import pytest
from helpers import simulated
from twinmesh.engine.benchmark.presets import PRESETS, region_points
from twinmesh.engine.benchmark.runner import run_load, run_preset
from twinmesh.engine.benchmark.simulated_target import SimulatedTarget
from twinmesh.engine.benchmark.summary import table
from twinmesh.engine.metrics.benchmark_file import About, Accuracy, benchmark_json, parse_benchmark
from twinmesh.engine.metrics.load_report import LoadReport, Run
from twinmesh.engine.metrics.report_file import Measured, report_json
from twinmesh.engine.metrics.request_records import RequestRecord, RequestRecords
from twinmesh.engine.simulation.assemble import Source
from twinmesh.engine.simulation.workload import WorkRequest

RUN = Run(source="measured", workload="w", model="m", device="cpu", gpus=2, topology="both=1")


class Growing:
    """A target whose throughput is what it is told, load by load."""

    longest = 1 << 20

    def __init__(self, *rates):
        self.loads, self._rates = [], iter(rates)

    def run(self, load):
        self.loads.append(load)
        return measured(RequestRecord(0, 0.0, 1, next(self._rates), 0, 0.5, 1.0, 1.0))


def measured(*records):
    return Measured(LoadReport.of(records, RUN), RequestRecords(records))


def at(name, *concurrencies):
    return replace(PRESETS[name], concurrencies=concurrencies)


def requests(target):
    return [list(load.workload.requests) for load in target.loads]


def nobody(point):
    pass


def test_inferencex_sends_ten_requests_a_user_after_two_to_warm_up():
    target, seen = Growing(10, 20), []
    done = run_preset(target, at("inferencex", 1, 3), About(), seen.append)
    assert [point.concurrency for point in done.points] == [1, 3]
    assert seen == list(done.points)
    for load, users in zip(target.loads, (1, 3), strict=True):
        sent = list(load.workload.requests)
        assert len(sent) == 10 * users
        assert len(list(load.warmup.requests)) == 2 * users
        assert sum(one.at is not None for one in sent) == users
        assert all(6554 <= one.prompt_len <= 8192 and 819 <= one.output_len <= 1024 for one in sent)
    assert load.warmup.requests != load.workload.requests


def test_a_load_test_goes_on_until_throughput_is_flat():
    target = Growing(10, 20, 30, 31, 99)
    done = run_preset(target, PRESETS["aa-load"], About(), nobody, scale=0.5)
    assert [point.concurrency for point in done.points] == [1, 2, 4, 8]
    assert {load.stop_after for load in target.loads} == {90.0}
    assert requests(target)[0][0].prompt_len == 500


def test_a_load_test_takes_sixty_four_more_from_sixty_four_on():
    steps = PRESETS["aa-load"].concurrencies
    assert steps[:10] == (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)


def test_endpoints_goes_through_its_data_once_at_each_point_and_asks_after_it():
    target = Growing(*[10] * 7)
    asked = []

    def ask():
        asked.append(len(target.loads))
        return Accuracy(name="a", asked=4, right=3)

    preset = PRESETS["endpoints"].up_to(64)
    done = run_preset(target, preset, About(), nobody, scale=0.01, ask=ask)
    assert [point.concurrency for point in done.points] == [1, 34, 35, 38, 42, 50, 64]
    assert asked == [1, 2, 3, 4, 5, 6, 7]
    assert {point.accuracy.score for point in done.points} == {0.75}
    first, *others = requests(target)
    lengths = [(one.prompt_len, one.output_len) for one in first]
    assert len(lengths) == 134
    assert all([(one.prompt_len, one.output_len) for one in other] == lengths for other in others)
    assert all(load.stop_after is None for load in target.loads)


@pytest.mark.parametrize("most", [7, 8, 16, 32, 40, 64, 100, 1024, 5000])
def test_there_are_seven_points_up_to_the_highest(most):
    points = region_points(most)
    assert len(set(points)) == len(points) == 7
    assert list(points) == sorted(points)
    assert (points[0], points[-1]) == (1, most)


def test_above_thirty_two_each_region_has_a_point_at_its_end_and_one_within():
    # Regions of C_max 1,024: 33-42, 43-131, 132-1,024 (mlcommons/endpoints-submission-cli, models/regions.py).
    assert region_points(1024) == (1, 35, 42, 63, 131, 346, 1024)


@pytest.mark.parametrize("most", [1, 6, 33, 35])
def test_fewer_than_seven_points_are_refused(most):
    with pytest.raises(ValueError, match=f"up to a concurrency of {most} there are no 7 points"):
        PRESETS["endpoints"].up_to(most)


def test_other_presets_leave_out_what_is_above_the_highest():
    assert PRESETS["inferencex"].up_to(9).concurrencies == (4, 8)
    with pytest.raises(ValueError, match="the preset inferencex begins with a concurrency of 4: give no less"):
        PRESETS["inferencex"].up_to(2)


def test_agents_are_so_many_sessions_at_once_whose_gaps_are_capped():
    target = Growing(10)
    target.longest = 2000
    run_preset(target, at("agents", 3), About(), nobody, scale=0.01)
    (sent,) = requests(target)
    assert sum(one.at is not None for one in sent) == 3
    assert {one.session for one in sent} == {f"s{index}" for index in range(12)}
    assert max(one.pause for one in sent) == pytest.approx(0.1)
    assert max(one.prompt_len + one.output_len for one in sent) <= 2000
    assert target.loads[0].stop_after == pytest.approx(18.0)


def test_agents_play_recorded_sessions_and_endpoints_takes_recorded_lengths(tmp_path):
    sessions = tmp_path / "sessions.jsonl"
    turns = [{"t": t, "in": 64, "out": 5, "hash_ids": [1], "api_time": 1.0} for t in (0.0, 3.0)]
    sessions.write_text(json.dumps({"requests": turns}))
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n2023-11-16 18:15:47,30,9\n")
    target = Growing(1, 1)
    for name, path in (("agents", sessions), ("endpoints", trace)):
        preset = at(name, 1)
        run_preset(target, replace(preset, shape=preset.shape.with_data(str(path))), About(), nobody)
    played, passed = requests(target)
    assert [(one.prompt_len, one.output_len, one.pause) for one in played[:2]] == [(64, 5, 0.0), (64, 5, 2.0)]
    assert len(passed) == 2
    assert {(one.prompt_len, one.output_len) for one in passed} <= {(374, 44), (30, 9)}
    with pytest.raises(ValueError, match="has lengths of its own: leave --data out"):
        PRESETS["inferencex"].shape.with_data(str(trace))


@pytest.mark.parametrize("name", PRESETS)
def test_a_simulated_engine_runs_every_preset_and_its_file_reads_back(name):
    engine = simulated.engine("prefill=1,decode=1", pages=4096)
    target = SimulatedTarget(engine, Source("h100", None, None), "m")
    done = run_preset(target, at(name, 2), About(preset=name, scale=0.01), nobody, scale=0.01)
    (point,) = done.points
    report = point.measured.report
    assert report.finished == report.requests > 1
    series = point.measured.series
    assert series.t[0] == 0.0
    assert max(series.meshes[0].busy) <= report.wall
    assert 0 < max(series.meshes[1].kv_used) <= 1
    (again,) = parse_benchmark(benchmark_json(done), "a.json").points
    assert again.measured.report == report
    assert list(again.measured.records) == list(point.measured.records)
    assert again.measured.series == series


def test_a_load_report_reads_as_a_benchmark_of_one_point():
    target = Growing(10)
    done = run_load(target, simulated.load(WorkRequest(1, 1, 0.0), WorkRequest(1, 1, 0.5)), About(), nobody)
    assert done.points[0].rate == pytest.approx(2.0)
    (point,) = parse_benchmark(report_json(*done.points[0].measured), "r.json").points
    assert point.measured.report == done.points[0].measured.report


@pytest.mark.parametrize("text", [b"{}", b"x", b'{"format":"twinmesh benchmark","version":99}'])
def test_what_is_no_benchmark_is_refused(text):
    with pytest.raises(ValueError, match=r"a\.json is (no benchmark|a benchmark of version 99)"):
        parse_benchmark(text, "a.json")


# Three requests of which one failed: TPOT 0.1 and 0.3 s, E2E 2 and 4 s for 11 tokens each, in 10 s on 2 GPUs.
THREE = measured(
    RequestRecord(0, 0.0, 100, 11, 50, 1.0, 2.0, 2.0),
    RequestRecord(1, 6.0, 100, 11, 0, 7.0, 10.0, 10.0),
    RequestRecord(2, 1.0, 100, 0, finish=1.5, reason="error"),
)
EXPECTED = {
    "output, tokens/s": 2.2,
    "in all, per GPU, tokens/s": 11.1,
    "responses, share": 2 / 3,  # what failed stays in the denominator
    "median speed, tokens/s": 1 / 0.2,
    "1 / TPOT P90, tokens/s": 1 / 0.28,
    "1 / P90(E2E/token), tokens/s": 1 / (3.8 / 11),
    "TTFT P90, ms": 1000.0,
    "TTFT median, ms": 1000.0,
    "E2E median, s": 3.0,
    "prefix hits, share": 0.25,
}


def test_figures_are_as_the_benchmarks_define_them():
    figures = {figure.name + ", " + figure.unit: figure for one in PRESETS.values() for figure in one.figures}
    assert {name: figure.of(THREE) for name, figure in figures.items()} == pytest.approx(EXPECTED)


def test_figures_that_are_not_known_are_none():
    failed = measured(RequestRecord(0, 0.0, 100, 0, finish=1.0, reason="error"))
    figures = [figure for one in PRESETS.values() for figure in one.figures]
    assert {figure.of(failed) for figure in figures} <= {None, 0.0}


def test_the_table_has_runs_of_one_point_below_each_other():
    target = Growing(10, 20, 30, 40)
    preset = at("endpoints", 1, 2)
    real = run_preset(target, preset, About(), nobody, scale=0.01, ask=lambda: Accuracy(name="a", asked=32, right=8))
    twin = run_preset(target, preset, About(), nobody, scale=0.01)
    lines = table({"measured": real, "simulated": twin}, preset.figures).splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [
        ["concurrency", "1", "measured"], ["concurrency", "1", "simulated"],
        ["concurrency", "2", "measured"], ["concurrency", "2", "simulated"],
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines] == ["right", "asked", "8/32", "-", "8/32", "-"]
    assert (lines[0].split()[0], lines[1].split()[0], lines[2].split()[3]) == ("output", "tokens/s", "10")
    assert max(map(len, lines)) < 100
