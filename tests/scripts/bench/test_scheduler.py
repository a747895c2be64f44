"""The benchmark of the scheduler: its engines come to be as busy as it says, and each decision has its kind."""

import pytest
from twinmesh.scripts.bench import scheduler as bench_scheduler
from twinmesh.scripts.bench.scheduler import Decision, Engine, measure


@pytest.mark.parametrize(
    ("decision", "name", "micros"),
    [
        (Decision("arrival", 1.0, 0, 0, 0), "arrival", 300),
        (Decision("arrival", 1.0, 0, 0, 1), "arrival+route", 300),
        (Decision("abort", 1.0, 0, 1, 0), "abort", 50),
        (Decision("abort", 1.0, 0, 1, 1), "abort+route", 350),
        (Decision("transfer", 1.0, 0, 0, 0), "transfer", 50),
        (Decision("flip", 1.0, 0, 0, 0), "flip", 50),
        (Decision("flip", 1.0, 0, 4, 2), "flip+route", 850),
        (Decision("tick", 1.0, 0, 0, 0), "tick", 50),
        (Decision("tick", 1.0, 0, 3, 0), "tick", 150),
        (Decision("step", 1.0, 10, 0, 0), "step", 32),
        (Decision("step", 1.0, 10, 2, 0), "end", 132),
        (Decision("step", 1.0, 10, 2, 1), "end+route", 432),
    ],
)
def test_a_decision_has_a_kind_and_what_it_may_take(decision, name, micros):
    assert decision.name == name
    assert decision.allowed == pytest.approx(1e-6 * micros)


def test_so_many_requests_wait_as_were_asked_for_and_stay_so():
    engine = Engine("both=2", waiting=40)
    assert engine.count_waiting() == 40
    assert engine.count_running() == 64
    for decision in engine.decisions(300):
        assert decision.seconds > 0
    assert 20 < engine.count_waiting() <= 60
    assert engine.count_running() >= 60


def test_every_kind_is_reported():
    rows = {row["kind"]: row for row in measure("prefill=2,decode=2", 20, 1500)}
    assert {"any", "abort", "arrival", "step", "step+route", "transfer"} <= rows.keys()
    assert sum(row["count"] for kind, row in rows.items() if kind != "any") == rows["any"]["count"] == 1500


def test_a_topology_that_nobody_knows_is_one_sentence(capsys):
    assert bench_scheduler.main(["--topologies", "neither=2", "--events", "10"]) == 2
    assert capsys.readouterr().err.startswith("scheduler: ")
