"""The driver on a core that answers at once: who comes when, what a turn begins with, and what becomes of failures."""

from contextlib import closing

import pytest
from helpers.fake_core import FakeCore, make_fake
from twinmesh import LLM
from twinmesh.engine.api.client import EngineClient
from twinmesh.engine.benchmark.driver import drive
from twinmesh.engine.benchmark.target import Load
from twinmesh.engine.errors import Overloaded
from twinmesh.engine.simulation.workload import Workload, WorkRequest


def driven(core, *works, **load):
    """Run a load on a fake core; return what was driven, and the submissions in the order in which they came."""
    seen, submit = [], core.submit

    def watched(submissions, **more):
        seen.extend(submissions)
        submit(submissions, **more)

    core.submit = watched
    with closing(make_fake(LLM, core)) as llm:
        return drive(EngineClient(llm.engine, 0), Load(Workload("w", works, 4), **load), {}), seen


def test_a_closed_loop_sends_a_request_when_the_one_it_waits_for_has_ended():
    works = [WorkRequest(5, 3, 0.0), WorkRequest(6, 2, None, 0), WorkRequest(7, 4, None, 1, 2.0)]
    done, seen = driven(FakeCore(answers=True), *works)
    assert [len(one.prompt) for one in seen] == [5, 6, 7]
    assert [(one.number, one.prompt_len, one.output_len) for one in done.records] == [(0, 5, 3), (1, 6, 2), (2, 7, 4)]
    records = list(done.records)
    assert records[1].arrival >= records[0].finish
    assert records[2].arrival >= records[1].finish + 2
    assert len(done.late) == 3


def test_a_turn_begins_with_the_prompt_and_the_answer_before_it():
    works = [WorkRequest(5, 3, 0.0, session="a"), WorkRequest(12, 2, None, 0, session="a"), WorkRequest(12, 2, None, 1)]
    _, seen = driven(FakeCore(answers=True), *works)
    first, second, third = (one.prompt.tolist() for one in seen)
    assert second[:8] == first + first[:3]  # the fake core's answer repeats the prompt
    assert third[:5] != first
    assert [one.facts.service.session for one in seen] == ["a", "a", None]


def test_blocks_are_the_same_tokens_in_every_prompt_that_has_them():
    works = [
        WorkRequest(9, 1, 0.0, blocks=(1, 2, 3)),
        WorkRequest(10, 1, 0.0, blocks=(1, 2, 4)),
        WorkRequest(9, 1, 0.0),
    ]
    _, seen = driven(FakeCore(answers=True), *works)
    first, second, third = (one.prompt.tolist() for one in seen)
    assert first[:8] == second[:8]
    assert first[8] != second[8]
    assert third[:4] != first[:4]


def test_nobody_comes_after_the_end_of_the_load():
    works = [WorkRequest(5, 1, 0.0), WorkRequest(5, 1, None, 0, 1e6), WorkRequest(5, 1, 1e6)]
    done, _ = driven(FakeCore(answers=True), *works, stop_after=1e5)
    assert [one.number for one in done.records] == [0]


def test_a_refused_request_is_recorded_and_its_follower_comes():
    class Full(FakeCore):
        def submit(self, submissions, *, may_refuse=False):
            if len(self.batches) == 1:
                self.batches.append([])
                raise Overloaded(1.0)
            super().submit(submissions)

    works = [WorkRequest(5, 1, 0.0), WorkRequest(5, 1, None, 0), WorkRequest(5, 1, None, 1)]
    done, _ = driven(Full(answers=True), *works)
    assert [(one.number, one.reason) for one in done.records] == [(0, "length"), (1, "refused"), (2, "length")]


def test_a_request_that_does_not_fit_is_refused_before_any_is_sent():
    core = FakeCore(answers=True)
    with pytest.raises(ValueError, match=r"request 1 of w has 60 prompt and 10 output tokens"):
        driven(core, WorkRequest(5, 1, 0.0), WorkRequest(60, 10, 1.0))
    assert core.batches == []
