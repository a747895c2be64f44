"""What the benchmark of the simulation makes of its runs, and that a real engine's requests get their records."""

import argparse
import json

import numpy as np
import pytest
from twinmesh import LLM
from twinmesh.scripts.bench import belief
from twinmesh.scripts.bench import belief_report as report
from twinmesh.scripts.bench.belief_points import Engine, Mix, Point, arrivals, flips, points
from twinmesh.scripts.bench.belief_run import Load, run

CHAT = Mix("chat", (4, 8), (2, 3))


def point(engine, predicted, measured, *, mix="chat", load=0.3, changes=0):
    """A point of which every figure is the same."""
    names = (*report.CRITERIA, "ttft p90", "tokens/s")
    return {
        "name": f"{engine} {mix} {load:g}", "engine": engine, "mix": mix, "load": load, "flips": changes,
        "figures": report.compare(dict.fromkeys(names, predicted), [dict.fromkeys(names, measured)]),
        "runs": [dict.fromkeys(names, measured)], "range": dict.fromkeys(names, (0.99 * predicted, 1.01 * predicted)),
    }  # fmt: skip


def test_an_error_is_of_the_median_run_and_stands_beside_their_spread():
    row = report.compare({"ttft p50": 1.1}, [{"ttft p50": value} for value in (0.9, 1.0, 1.3)])["ttft p50"]
    assert (row["measured"], row["error"], row["spread"]) == (1.0, pytest.approx(0.1), pytest.approx(0.4))


def test_regret_is_what_the_topology_loses_that_the_simulation_chose():
    rivals = [point("both=1", 1.0, 3.0), point("both=2", 2.0, 2.0), point("pool=2", 0.1, 0.1, changes=2)]
    (row, *_) = rows = report.regrets(rivals)
    assert {row["criterion"] for row in rows} == set(report.CRITERIA)
    assert (row["predicted_order"], row["measured_order"]) == (["both=1", "both=2"], ["both=2", "both=1"])
    assert row["regret"] == pytest.approx(0.5)
    assert report.regrets([rivals[0], point("both=2", 1.0, 1.0, load=0.6)]) == []  # each alone at its load


def test_measured_figures_are_covered_by_the_aim_or_by_the_range_of_simulations():
    covered = report.coverage([point("a", 1.0, 1.005), point("b", 1.0, 1.2)])
    assert covered["of_range"] == pytest.approx(0.5)
    assert covered["of_aim"] == pytest.approx(0.5 + 0.5 * 4 / 8)  # of the second one P90 and P99, within a quarter


@pytest.mark.parametrize(
    ("before", "now", "has_grown"),
    [(1.10, 1.14, True), (1.10, 1.11, False), (1.50, 1.54, False), (0.90, 0.80, True), (0.90, 1.05, False)],
)
def test_an_error_has_grown_if_it_did_by_two_points_and_a_tenth(before, now, has_grown):
    found = report.grown([point("a", now, 1.0)], [point("a", before, 1.0)])
    assert bool(found) is has_grown


def test_a_point_that_disappeared_is_named():
    assert report.grown([], [point("a", 1.0, 1.0)]) == ["a chat 0.3: the point has disappeared"]


def test_the_report_names_what_misses_its_aim():
    rows = [point("both=1", 1.0, 3.0), point("both=2", 2.0, 2.0)]
    for row in rows:
        row |= {"requests": 3, "rate": 1.0, "parts": {"queue": {"predicted": 0.1, "measured": 0.2}}}
    text = report.table(rows) + "\n" + report.summary(report.summarise(rows))
    assert "error  -66.7%  spread   0.0%  missed" in text
    assert "the best was chosen in 0 of 6" in text


def test_all_topologies_get_the_same_requests_at_the_same_times():
    first, again = (list(arrivals(CHAT, 20.0, 50, seed=1).requests) for _ in range(2))
    assert first == again
    assert all(4 <= work.prompt_len <= 8 and 2 <= work.output_len <= 3 for work in first)
    assert 50 / first[-1].time == pytest.approx(20, rel=0.3)
    assert first != list(arrivals(CHAT, 20.0, 50, seed=2).requests)


def test_roles_are_called_for_in_the_middle_of_the_load():
    engine = Engine.parse("pool=2:both=2:prefill=1,decode=1:both=2")
    assert flips(engine, 30.0) == [(10.0, "prefill=1,decode=1"), (20.0, "both=2")]
    assert flips(Engine.parse("both=1"), 30.0) == []


def test_points_have_names_of_their_own():
    found = points([Engine("both=1"), Engine("both=2")], [CHAT, Mix("long", (9, 9), (2, 2))], [0.3, 0.6])
    assert len({point.name for point in found}) == len(found) == 8


@pytest.mark.parametrize("text", ["chat", "chat=4-8", "chat=8-4/2-3", "chat=0-4/2-3"])
def test_a_mix_that_is_none_is_refused_with_one_that_is(text):
    with pytest.raises(argparse.ArgumentTypeError, match="chat=16-48/8-24"):
        Mix.parse(text)


def test_parts_of_other_arguments_do_not_go_into_one_file(tmp_path):
    file = tmp_path / "belief.json"
    file.write_text(json.dumps({"args": {"requests": 7}, "rates": {}, "points": []}))
    with pytest.raises(SystemExit, match="points of other arguments"):
        belief.main(["--json", str(file), "--add"])
    with pytest.raises(SystemExit, match=r"they are both=1 chat 0\.5; "):
        belief.main(["--only", "nothing like it"])


def test_requests_of_a_real_run_have_records_whose_parts_add_up(tiny_path):
    options = {"max_model_len": 32, "max_num_seqs": 4, "prefill_buckets": (16,), "decode_buckets": (4,)}
    load = Load(arrivals(CHAT, 500.0, 6, seed=0), ())
    with LLM(tiny_path, dtype="float32", **options) as llm:
        records, late = run(llm, load)
    assert [(record.prompt_len, record.output_len) for record in records] == [
        (work.prompt_len, work.output_len) for work in load.workload.requests
    ]
    assert late < 10
    for record in records:
        assert record.queue + record.prefill + record.host == pytest.approx(record.ttft)
        assert min(record.queue, record.prefill, record.host) >= 0
    found = belief.figures(records)
    assert found["ttft p50"] <= found["ttft p99"]
    assert np.isfinite(list(found.values())).all()


def test_a_point_holds_its_runs_against_a_simulation_of_the_same_load():
    class Twin:
        """Runs and simulates alike, with all times half of what they were."""

        served = argparse.Namespace(costs=None)

        def simulate(self, load, seed=0):
            return [record(n, 0.5) for n in range(4)]

    from twinmesh.engine.metrics.request_records import RequestRecord
    from twinmesh.scripts.bench.belief_run import Outcome

    def record(n, scale):
        return RequestRecord(n, float(n), 5, 3, 0, n + scale, n + 2 * scale, n + 2 * scale, 0.5 * scale, 0.5 * scale)

    args = argparse.Namespace(seeds=2)
    load = Load(arrivals(CHAT, 20.0, 4, seed=1), ((0.1, "both=2"),))
    runs = [Outcome([record(n, 1.0) for n in range(4)], [], 0.001)] * 2
    row = belief.row(Twin(), Point(Engine("both=1"), CHAT, 0.3), load, runs, args)
    assert row["flips"] == 1
    assert row["figures"]["ttft p50"]["error"] == pytest.approx(-0.5)
    assert row["parts"]["queue"] == {"predicted": pytest.approx(0.25), "measured": pytest.approx(0.5)}
