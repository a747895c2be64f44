"""The room of requests that wait: who is counted and until when, who is refused, and what they are told."""

import threading

import numpy as np
import pytest
from twinmesh import Overloaded
from twinmesh.engine.core.submission import Submission
from twinmesh.engine.core.waiting_room import WaitingRoom
from twinmesh.engine.protocol.events import RequestFacts
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.protocol.service import Service


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def request(id_, tokens=10, n=1, **service):
    facts = [RequestFacts(id_ + i, tokens, 1, fork_of=id_ if i else None, service=Service(**service)) for i in range(n)]
    plan, prompt = SamplingPlan(0.0, 1), np.zeros(tokens, np.int32)
    return [Submission(0.0, one, prompt, plan, frozenset(), None, None) for one in facts]


def refused(room, submissions):
    """For how long a request is sent away; None: it is let in."""
    try:
        room.enter_or_refuse(submissions)
    except Overloaded as error:
        return error.retry_after
    return None


def test_so_many_may_wait_and_each_that_begins_or_ends_makes_room():
    room = WaitingRoom(2, None, Clock())
    assert refused(room, request(0)) is None
    assert refused(room, request(1)) is None
    assert refused(room, request(2)) is not None
    room.leave([0, 99])
    assert refused(room, request(2)) is None
    assert refused(room, request(3)) is not None


def test_all_completions_of_a_request_come_in_or_none():
    room = WaitingRoom(3, None, Clock())
    assert refused(room, request(0, n=2)) is None
    assert refused(room, request(10, n=2)) is not None
    assert refused(room, request(20)) is None


def test_prompt_tokens_to_compute_count_those_cached_do_not_and_a_prompt_is_computed_once():
    room = WaitingRoom(None, 100, Clock())
    assert refused(room, request(0, tokens=60, n=4)) is None
    assert refused(room, request(10, tokens=40)) is not None
    room.shorten(0, 30)
    assert refused(room, request(10, tokens=40)) is None
    room.leave([0])
    assert refused(room, request(20, tokens=57)) is None
    assert refused(room, request(30, tokens=1)) is not None


def test_what_would_never_fit_comes_in_where_nobody_waits():
    room = WaitingRoom(1, 10, Clock())
    assert refused(room, request(0, tokens=60, n=4)) is None
    assert refused(room, request(10)) is not None


def test_batch_work_is_neither_counted_nor_refused():
    room = WaitingRoom(1, None, Clock())
    for id_ in range(5):
        assert refused(room, request(id_, is_batch=True)) is None
    assert refused(room, request(10)) is None
    assert refused(room, request(20, is_batch=True)) is None


def test_without_a_bound_nobody_is_refused():
    room = WaitingRoom(None, None, Clock())
    for id_ in range(1000):
        assert refused(room, request(id_)) is None


def test_those_who_bring_many_leave_half_of_the_room_and_wait():
    room = WaitingRoom(4, None, Clock())
    for id_ in range(2):
        room.enter_when_there_is_room(request(id_))
    entered = threading.Event()
    thread = threading.Thread(target=lambda: (room.enter_when_there_is_room(request(2)), entered.set()))
    thread.start()
    assert refused(room, request(10)) is None
    assert refused(room, request(11)) is None
    assert refused(room, request(12)) is not None
    room.leave([10, 11])
    assert not entered.is_set()
    room.leave([0])
    thread.join(60)
    assert entered.is_set()


def test_nobody_waits_for_room_in_an_engine_that_has_stopped():
    room = WaitingRoom(1, None, Clock())
    room.enter_when_there_is_room(request(0))
    thread = threading.Thread(target=lambda: room.enter_when_there_is_room(request(1)))
    thread.start()
    room.stop()
    thread.join(60)
    assert not thread.is_alive()


def full_room(rate, waiting=10, tokens=100):
    """A room that is full, in an engine that has computed so many prompt tokens a second for ten seconds."""
    clock = Clock()
    room = WaitingRoom(waiting, None, clock)
    for id_ in range(waiting):
        room.enter_or_refuse(request(id_, tokens=tokens))
    for _ in range(10):
        clock.now += 1.0
        room.computed(clock.now, rate)
    return room, clock


def test_one_who_is_refused_is_told_when_the_next_prompt_will_have_been_computed():
    room, _ = full_room(rate=200)
    assert refused(room, request(100)) == pytest.approx(0.5 * 1.25)


def test_those_refused_one_after_the_other_are_not_told_the_same():
    room, clock = full_room(rate=200)
    assert [refused(room, request(id_)) for id_ in (100, 101, 102)] == pytest.approx([0.625, 1.25, 1.875])
    clock.now += 1.3  # two of them have come back by now
    assert refused(room, request(103)) < 1.5


@pytest.mark.parametrize(("rate", "seconds"), [(10**9, 0.1), (0, 1.0)])
def test_what_is_told_stays_within_reason(rate, seconds):
    room, _ = full_room(rate=rate)
    assert refused(room, request(100)) == seconds


def test_a_stuck_engine_says_ten_minutes():
    room, clock = full_room(rate=200)
    clock.now += 100.0
    assert refused(room, request(100)) == 600.0


def test_time_in_which_nobody_waited_does_not_make_the_engine_look_slow():
    room, clock = full_room(rate=200)
    room.leave(range(10))
    clock.now += 20.0
    for id_ in range(10):
        room.enter_or_refuse(request(id_, tokens=100))
    clock.now += 2.0
    room.computed(clock.now, 400)
    assert refused(room, request(101)) == pytest.approx(0.5 * 1.25)


def test_in_a_spike_most_who_wait_as_long_as_they_are_told_are_let_in():
    """Callers come twice as fast as prompts are computed, for ten seconds."""
    clock, rate, tokens = Clock(), 1000, 100
    room = WaitingRoom(20, None, clock)
    waiting, comings = [], [(i * 0.05, i, 0) for i in range(200)]
    done, told, again = 0.0, [], []
    while comings:
        comings.sort()
        t, id_, tries = comings.pop(0)
        while waiting and max(done, waiting[0][1]) + tokens / rate <= t:
            done = max(done, waiting[0][1]) + tokens / rate
            clock.now = done
            room.computed(done, tokens)
            room.leave([waiting.pop(0)[0]])
        clock.now = t
        retry_after = refused(room, request(id_, tokens=tokens))
        if tries == 1:
            again.append(retry_after is None)
        if retry_after is None:
            waiting.append((id_, t))
        else:
            told.append(retry_after)
            comings.append((t + retry_after, id_, tries + 1))
    assert len(again) > 20
    assert sum(again) / len(again) >= 0.8
    assert np.median(told) <= 2 * (10.0 / 2)  # the last of all is computed ten seconds after the spike
