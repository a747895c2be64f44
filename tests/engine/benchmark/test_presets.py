"""Presets as loads, what runs them, and the file that comes of it; on a simulated engine, and on one that says what it
gives."""

import pytest
from helpers import simulated
from twinmesh.engine.benchmark.accuracy import Item, is_right, read_items
from twinmesh.engine.benchmark.presets import PRESETS, scaled
from twinmesh.engine.benchmark.runner import run_load, run_sweep
from twinmesh.engine.benchmark.simulated_target import SimulatedTarget
from twinmesh.engine.metrics.benchmark_file import (
    About,
    Accuracy,
    benchmark_json,
    parse_benchmark,
)
from twinmesh.engine.metrics.load_report import LoadReport, Run
from twinmesh.engine.metrics.report_file import Measured, report_json
from twinmesh.engine.metrics.request_records import RequestRecord, RequestRecords
from twinmesh.engine.simulation.assemble import Source
from twinmesh.engine.simulation.workload import WorkRequest

RUN = Run(source="measured", workload="w", model="m", device="cpu", gpus=1, topology="both=1")


class Growing:
    """A target whose throughput is what it is told, load by load."""

    longest = 1 << 20

    def __init__(self, *rates):
        self.loads, self._rates = [], iter(rates)

    def run(self, load):
        self.loads.append(load)
        records = [RequestRecord(0, 0.0, 1, next(self._rates), 0, 0.5, 1.0, 1.0)]
        return Measured(LoadReport.of(records, RUN), RequestRecords(records))


def test_inferencex_sends_ten_requests_a_user_after_two_to_warm_up():
    target, seen = Growing(10, 20), []
    done = run_sweep(target, PRESETS["inferencex"], About(), seen.append, concurrencies=(1, 3))
    assert [point.concurrency for point in done.points] == [1, 3]
    assert seen == list(done.points)
    for load, users in zip(target.loads, (1, 3), strict=True):
        requests = list(load.workload.requests)
        assert len(requests) == 10 * users
        assert len(list(load.warmup.requests)) == 2 * users
        assert sum(one.at is not None for one in requests) == users
        assert all(6554 <= one.prompt_len <= 8192 and 819 <= one.output_len <= 1024 for one in requests)


def test_a_load_test_goes_on_until_throughput_is_flat():
    target = Growing(10, 20, 30, 31, 99)
    done = run_sweep(target, scaled(PRESETS["aa-load"], 0.5), About(), lambda _: None)
    assert [point.concurrency for point in done.points] == [1, 2, 4, 8]
    assert {load.stop_after for load in target.loads} == {90.0}
    assert next(iter(target.loads[0].workload.requests)).prompt_len == 500


def test_a_simulated_engine_runs_a_preset_and_its_file_reads_back():
    engine = simulated.engine("prefill=1,decode=1")
    target = SimulatedTarget(engine, Source("h100", None, None), "m")
    sweep = scaled(PRESETS["inferencex"], 0.01)
    done = run_sweep(target, sweep, About(preset="inferencex", scale=0.01), lambda _: None, concurrencies=(2,))
    (point,) = done.points
    assert point.measured.report.finished == 20
    series = point.measured.series
    assert series.t[0] == 0.0
    assert max(series.meshes[0].busy) <= point.measured.report.wall
    assert 0 < max(series.meshes[1].kv_used) <= 1
    assert series.prompt_tokens[-1] == point.measured.report.tokens.prompt
    (again,) = parse_benchmark(benchmark_json(done), "a.json").points
    assert again.measured.report == point.measured.report
    assert list(again.measured.records) == list(point.measured.records)
    assert again.measured.series == series


def test_a_load_report_reads_as_a_benchmark_of_one_point():
    target = Growing(10)
    done = run_load(target, simulated.load(WorkRequest(1, 1, 0.0), WorkRequest(1, 1, 0.5)), About(), lambda _: None)
    assert done.points[0].rate == pytest.approx(2.0)
    (point,) = parse_benchmark(report_json(*done.points[0].measured), "r.json").points
    assert point.measured.report == done.points[0].measured.report


@pytest.mark.parametrize("text", [b"{}", b"x", b'{"format":"twinmesh benchmark","version":99}'])
def test_what_is_no_benchmark_is_refused(text):
    with pytest.raises(ValueError, match=r"a\.json is (no benchmark|a benchmark of version 99)"):
        parse_benchmark(text, "a.json")


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 3 x 4 = 12. #### 12\n", True), ("It is 1,200", False), ("12 and 13", False), ("so 12", True), ("none", False),
     ("#### 12 and 13", True), ("11\n\nQuestion: 12", False), ("12.0", True)],
)  # fmt: skip
def test_an_answer_is_right_if_its_number_is(text, right):
    assert is_right(Item("?", 12), text) is right


def test_the_questions_are_read_and_scored():
    items = read_items()
    assert len({item.question for item in items}) == len(items) == 32
    assert Accuracy(name="a", asked=4, right=1).score == 0.25
