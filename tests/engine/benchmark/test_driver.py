"""The driver on a core that answers at once: who comes when, what a turn begins with, and what becomes of failures."""

import sys
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
    core = FakeCore(answers=True)
    next(core.ids)  # ids are the engine's, not the places in the load
    done, seen = driven(core, *works)
    assert [len(one.prompt) for one in seen] == [5, 6, 7]
    assert [one.after for one in seen] == [None, seen[0].facts.id, seen[1].facts.id] == [None, 1, 2]
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


def test_a_recorded_turn_has_its_own_tokens_where_the_answer_was():
    """Its ids cover the prompt alone, so what the engine said is not what the next prompt goes on with."""
    works = [
        WorkRequest(8, 3, 0.0, blocks=(1, 2), session="a"),
        WorkRequest(12, 1, None, 0, blocks=(1, 2, 3), session="a"),
        WorkRequest(8, 1, None, 1, blocks=(1, 9), session="a"),
    ]
    _, seen = driven(FakeCore(answers=True), *works)
    first, second, third = (one.prompt.tolist() for one in seen)
    assert second[:8] == first
    assert second[8:11] != first[:3]
    assert third[:4] == first[:4]
    assert third[4:] != first[4:]


def test_ids_that_go_on_over_the_answer_stand_for_what_the_engine_said():
    works = [
        WorkRequest(6, 2, 0.0, blocks=(1, 2), session="a"),
        WorkRequest(12, 1, None, 0, blocks=(1, 2, 3), session="a"),
    ]
    _, seen = driven(FakeCore(answers=True), *works)
    first, second = (one.prompt.tolist() for one in seen)
    assert second[:8] == first + first[:2]


def test_a_failed_turn_is_recorded_and_the_next_one_comes_all_the_same():
    class Failing(FakeCore):
        def answer(self, submission):
            if submission.facts.id == 0:
                self.send(0, finish_reason="error", error="the mesh is lost")
            else:
                super().answer(submission)

    works = [WorkRequest(5, 3, 0.0, session="a"), WorkRequest(12, 2, None, 0, session="a")]
    done, seen = driven(Failing(answers=True), *works)
    assert [(one.number, one.reason, one.output_len) for one in done.records] == [(0, "error", 0), (1, "length", 2)]
    assert done.errors == {"the mesh is lost": 1}
    assert len(seen[1].prompt) == 12


def test_a_load_begins_when_it_is_said_to_and_each_request_arrives_at_its_time():
    with closing(make_fake(LLM, FakeCore(answers=True))) as llm:
        load = Load(Workload("w", [WorkRequest(5, 1, 0.0), WorkRequest(5, 1, 0.5)], 4))
        done = drive(EngineClient(llm.engine, 0), load, {}, start=2.0)
    first, second = sorted(done.records, key=lambda record: record.number)
    assert (first.arrival, second.arrival) == (2.0, 2.5)
    assert all(late >= 0 for late in done.late)


def test_threads_get_pythons_lock_sooner_while_a_load_runs():
    before = sys.getswitchinterval()
    seen = []

    class Looking(FakeCore):
        def submit(self, submissions, **more):
            seen.append(sys.getswitchinterval())
            super().submit(submissions)

    driven(Looking(answers=True), WorkRequest(5, 1, 0.0))
    assert seen[0] < before == sys.getswitchinterval()


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
