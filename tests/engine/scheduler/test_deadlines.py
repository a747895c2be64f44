"""Deadlines: each request ends at the very event that brings its time, wherever it stands, with what it has."""

import io

import pytest
from twinmesh.engine.config import PoolSize
from twinmesh.engine.protocol.actions import Finish
from twinmesh.engine.protocol.events import (
    Arrived,
    Hold,
    MeshFailed,
    PreemptRequested,
    RequestFacts,
    ServiceChanged,
    Tick,
)
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.scheduler.decision_log import DecisionLog, RecordingScheduler
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.simulation.logs.replay import replay

from .test_scheduler import arrive, make, only, step


def expire(scheduler, device, t):
    """Let a time come, and return which requests ended then."""
    assert scheduler.next_due() is not None
    scheduler.on(Tick(t))
    scheduler.check_integrity()
    return [action.request_id for action in only(step(scheduler, device), Finish) if action.reason == "deadline"]


def assert_nothing_is_held(scheduler):
    assert scheduler.next_due() is None
    for mesh in scheduler.meshes:
        assert all(pages.num_free == pages.num_pages for pages in mesh.pages.groups)
        assert not mesh.placed
        assert not mesh.computing
        assert not mesh.arriving


def test_the_next_instant_that_matters_is_the_earliest_deadline():
    scheduler, device = make("both=1", slots=1)
    arrive(scheduler, device, "a", t=1.0, deadline=9.0)
    arrive(scheduler, device, "b", t=2.0, deadline=20.0, first_token_deadline=3.0)
    arrive(scheduler, device, "c", t=3.0)
    assert scheduler.next_due() == 5.0


def test_a_waiting_request_ends_without_tokens_when_its_time_has_come_and_not_before():
    scheduler, device = make("both=1", slots=1)
    arrive(scheduler, device, "a", max_tokens=20)
    waiting = arrive(scheduler, device, "b", deadline=5.0)
    step(scheduler, device)
    assert expire(scheduler, device, 4.9) == []
    assert expire(scheduler, device, 5.0) == ["b"]
    assert waiting.state is State.EXPIRED
    assert waiting.timeline.finish == 5.0
    device.drain(6.0)
    assert device.finished == {"b": "deadline", "a": "length"}


def test_a_request_keeps_the_tokens_that_it_has_those_of_the_same_event_included():
    scheduler, device = make("both=1")
    request = arrive(scheduler, device, "a", max_tokens=20, deadline=5.0)
    step(scheduler, device)
    device.complete_step(0, 1.0)
    step(scheduler, device)
    device.complete_step(0, 5.0)
    assert only(step(scheduler, device), Finish) == [Finish("a", "deadline")]
    assert request.confirmed == 2
    device.drain(6.0)
    assert_nothing_is_held(scheduler)


def test_a_request_whose_last_token_comes_just_in_time_has_met_its_deadline():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", max_tokens=1, deadline=5.0, first_token_deadline=5.0)
    step(scheduler, device)
    device.complete_step(0, 5.0)
    step(scheduler, device)
    assert device.finished == {"a": "length"}
    assert scheduler.next_due() is None


def test_the_first_token_ends_the_deadline_for_it_and_a_preemption_does_not_bring_it_back():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", max_tokens=9, first_token_deadline=5.0)
    step(scheduler, device)
    device.complete_step(0, 4.0)
    assert scheduler.next_due() is None
    scheduler.on(PreemptRequested(4.5, "a"))
    assert scheduler.next_due() is None
    device.drain(9.0)
    assert device.finished == {"a": "length"}


def test_a_request_served_otherwise_has_met_its_deadline_for_the_first_token_already():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", max_tokens=9, is_batch=True)
    step(scheduler, device)
    device.complete_step(0, 4.0)
    scheduler.on(ServiceChanged(4.5, "a", Service(first_token_deadline=5.0)))
    assert scheduler.next_due() is None


def test_an_arrival_lets_what_is_due_end_and_is_there_itself_though_its_own_time_has_passed():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", deadline=5.0)
    late = arrive(scheduler, device, "b", t=6.0, deadline=1.0)
    later = arrive(scheduler, device, "c", t=2.0, deadline=1.0)  # tokenised for long
    assert [action.request_id for action in only(step(scheduler, device), Finish)] == ["a"]
    assert scheduler.requests["b"] is late
    assert scheduler.requests["c"] is later
    assert expire(scheduler, device, 6.0) == ["c"]


def in_prefill(scheduler, device):
    request = arrive(scheduler, device, "x", prompt_len=24, deadline=5.0)
    step(scheduler, device)
    return request


def in_handoff_without_credit(scheduler, device):
    slots = scheduler.meshes[1].pages.slots
    while slots.num_free:
        slots.allocate(-1)
    request = arrive(scheduler, device, "x", deadline=5.0)
    step(scheduler, device)
    assert request.handoff is None
    return request


def mid_transfer(scheduler, device):
    request = arrive(scheduler, device, "x", deadline=5.0)
    step(scheduler, device)
    assert device.transfers
    return request


def in_decode(scheduler, device):
    request = mid_transfer(scheduler, device)
    device.complete_step(0, 1.0)
    device.complete_transfer(0, 1.0)
    step(scheduler, device)
    return request


def asleep(scheduler, device):
    arrive(scheduler, device, "leader", prompt_len=24, prompt="p")
    request = arrive(scheduler, device, "x", prompt_len=24, prompt="p", deadline=5.0)
    step(scheduler, device)
    assert request.sleeps_for is not None
    return request


def held(scheduler, device):
    scheduler.on(Hold(0.0))
    request = arrive(scheduler, device, "x", deadline=5.0)
    step(scheduler, device)
    return request


@pytest.mark.parametrize(
    ("begin", "state"),
    [
        (in_prefill, State.PREFILL),
        (in_handoff_without_credit, State.HANDOFF),
        (mid_transfer, State.HANDOFF),
        (in_decode, State.DECODE),
        (asleep, State.WAITING),
        (held, State.WAITING),
    ],
)
def test_a_request_expires_wherever_it_stands(begin, state):
    scheduler, device = make("prefill=1,decode=1", prefill_buckets=(8,))
    request = begin(scheduler, device)
    assert request.state is state
    scheduler.on(Tick(5.0))
    assert [action.request_id for action in only(step(scheduler, device), Finish)] == ["x"]
    assert "x" not in scheduler.requests
    assert request.placement is request.handoff is None
    if begin is not in_handoff_without_credit:
        device.drain(6.0)
        assert_nothing_is_held(scheduler)


def test_forks_expire_together_with_the_prompt_that_they_wait_for():
    scheduler, device = make("both=1", slots=2)
    for index in range(4):
        arrive(scheduler, device, f"x{index}", prompt_len=24, fork_of="x0" if index else None, prompt="p", deadline=5.0)
    step(scheduler, device)
    assert expire(scheduler, device, 5.0) == ["x0", "x1", "x2", "x3"]
    device.drain(6.0)
    assert_nothing_is_held(scheduler)


@pytest.mark.parametrize("what", ["expires", "is lost"])
def test_a_leader_that_ends_wakes_its_waiters_at_that_event(what):
    scheduler, device = make("both=1", slots=2, max_retries=0)
    arrive(scheduler, device, "leader", prompt_len=24, prompt="p", deadline=5.0)
    waiter = arrive(scheduler, device, "waiter", prompt_len=24, prompt="p")
    step(scheduler, device)
    assert waiter.sleeps_for is not None
    if what == "expires":
        scheduler.on(Tick(5.0))
    else:
        device.lose(0)
        scheduler.on(MeshFailed(5.0, 0, "boom"))
    step(scheduler, device)
    assert waiter.state is State.PREFILL


def test_when_batch_work_is_due_ends_nothing():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", is_batch=True, due=1.0)
    assert scheduler.next_due() is None
    device.drain(2.0)
    assert device.finished == {"a": "length"}


def test_a_log_with_deadlines_replays_to_the_same_ends():
    scheduler, _ = make("both=1", slots=1)
    log = io.StringIO()
    recording = RecordingScheduler(scheduler.config, [pool_of(scheduler)], DecisionLog(log))
    for id_, service in enumerate((Service(), Service(deadline=2.0), Service(first_token_deadline=3.0))):
        recording.on(Arrived(0.0, RequestFacts(id_, 5, 9, service=service)))
    recording.actions()
    while (due := recording.next_due()) is not None:
        recording.on(Tick(due))
        recording.actions()
    log.seek(0)
    result = replay(log)
    assert result.finished == {1: "deadline", 2: "deadline"}
    assert [timeline.finish for timeline in result.ended.recent] == []
    assert result.ended.reasons == {"deadline": 2}
    assert list(result.scheduler.requests) == [0]


def pool_of(scheduler):
    return PoolSize(tuple(pages.num_pages for pages in scheduler.meshes[0].pages.groups), (1,), 0)


def test_deadlines_that_were_met_leave_nothing_on_the_agenda():
    scheduler, device = make("both=1")
    for number in range(300):
        arrive(scheduler, device, number, max_tokens=1, t=float(number), deadline=1e6, first_token_deadline=1e5)
        device.drain(float(number))
    assert scheduler.next_due() is None


def measured(seconds, **changes):
    """An engine that has measured so many seconds a chunk of eight tokens."""
    scheduler, device = make("both=1", prefill_buckets=(8,), length=64, pages=64, age_seconds=0, **changes)
    t = 0.0
    for number in range(6):
        arrive(scheduler, device, f"m{number}", prompt_len=8, max_tokens=3, t=t)
        while f"m{number}" in scheduler.requests:
            step(scheduler, device)
            t += seconds
            device.complete_step(0, t)
        step(scheduler, device)
    assert scheduler.costs.is_measured(0)
    return scheduler, device, t


def test_a_deadline_that_the_prompt_alone_would_miss_is_missed_at_once():
    scheduler, device, t = measured(seconds=1.0)
    left = scheduler.costs.prefill(0, 40)
    assert left > 3.0
    arrive(scheduler, device, "no", prompt_len=40, t=t, first_token_deadline=left - 0.5)
    arrive(scheduler, device, "yes", prompt_len=40, t=t, first_token_deadline=left + 0.5)
    assert expire(scheduler, device, t) == ["no"]
    assert "yes" in scheduler.requests


def test_what_is_left_is_looked_at_again_when_it_becomes_certain():
    scheduler, device, t = measured(seconds=1.0)
    left = scheduler.costs.prefill(0, 40)
    request = arrive(scheduler, device, "x", prompt_len=40, max_tokens=2, t=t, deadline=left + 2.0)
    assert scheduler.next_due() == pytest.approx(t + 2.0)
    step(scheduler, device)
    device.complete_step(0, t + 1.0)
    step(scheduler, device)
    assert expire(scheduler, device, scheduler.next_due()) == []
    assert scheduler.next_due() > t + 3.0
    while request.id in scheduler.requests and not request.dispatched:
        t += 1.0
        device.complete_step(0, t)
        step(scheduler, device)
    assert expire(scheduler, device, scheduler.next_due()) == []
    assert scheduler.next_due() == pytest.approx(request.timeline.arrival + left + 2.0)


def test_a_prompt_that_can_be_had_from_the_cache_is_not_given_up():
    scheduler, device, t = measured(seconds=1.0)
    arrive(scheduler, device, "before", prompt_len=40, prompt="p", max_tokens=1, t=t)
    device.drain(t)
    arrive(scheduler, device, "x", prompt_len=42, prompt="p", t=t, first_token_deadline=scheduler.costs.prefill(0, 9))
    assert expire(scheduler, device, t) == []
