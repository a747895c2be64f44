"""The planner's benchmark: what an oracle may choose, what is run again, and what recovery is. Nothing is simulated."""

import argparse
import json

import numpy as np
import pytest
from twinmesh.engine.simulation.workload import WorkRequest
from twinmesh.scripts.bench import planner
from twinmesh.scripts.bench.planner_loads import Load, Phase
from twinmesh.scripts.bench.planner_runs import Cell, recovery

ARGS = argparse.Namespace(chunk=2048, chunks=[512, 2048], device="h100", noise=0.1)
LOAD = Load("day", [WorkRequest(10, 10, 100.0)], [Phase("one", 0.0, 50.0), Phase("two", 50.0, 100.0)])


@pytest.fixture
def cell():
    return Cell("llama-3.1-8b", 8, LOAD, 1.0, ARGS)


def test_the_oracle_takes_the_best_roles_of_each_phase_before_it_begins(cell):
    known = {name: {"phases": [0.5, 0.5]} for name in cell.constant()}
    known["6P2D"] = {"phases": [0.9, 0.1]}
    known["mix decode=2,both=6"] = {"phases": [0.1, 0.8]}
    tries = list(cell.oracle(known))
    assert [run.roles for run in tries] == ["prefill=6,decode=2"] * 2
    assert [(call.at, call.roles) for run in tries for call in run.calls] == [
        (50.0, "decode=2,both=6"),
        (40.0, "decode=2,both=6"),
    ]


def test_an_oracle_whose_phases_want_the_same_has_nothing_to_call_for(cell):
    assert list(cell.oracle({name: {"phases": [0.5, 0.5]} for name in cell.constant()})) == []


def test_every_split_of_8_meshes_is_tried_and_of_more_the_eighths():
    for meshes, names in ((8, ["1P7D", "4P4D", "7P1D"]), (64, ["8P56D", "32P32D", "56P8D"]), (2, ["1P1D"])):
        found = [run.name for run in Cell("llama-3.1-8b", meshes, LOAD, 1.0, ARGS).splits()]
        assert [found[0], found[len(found) // 2], found[-1]] == (names * 3)[:3]
        assert len(found) == min(meshes, 8) - 1


def test_what_a_file_has_is_not_run_again_and_other_settings_are_refused(cell, tmp_path):
    path = tmp_path / "planner.json"
    results = planner.Results(str(path), {"share": 0.6})
    results.of(cell)["planner"] = {"goodput": 3.0, "met": 1.0, "phases": [1.0, 1.0]}
    results.write()
    again = planner.Results(str(path), {"share": 0.6}).of(cell)
    assert planner.line(cell, again) == "llama-3.1-8b 8 meshes day x1: planner 3.00/s (100%, 0 flips)"
    assert "date" in json.loads(path.read_text())
    with pytest.raises(ValueError, match="name another file"):
        planner.Results(str(path), {"share": 0.9})


def test_recovery_is_until_most_of_those_that_come_next_are_in_time():
    arrival = np.arange(0.0, 100.0, 0.5)
    met = ~((arrival >= 20) & (arrival < 45))
    assert recovery(arrival, met, 30.0) == 14.5  # one of 20 may miss
    assert recovery(arrival, np.zeros(len(arrival), bool), 30.0) is None
