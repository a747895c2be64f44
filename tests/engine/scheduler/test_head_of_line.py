"""A prompt that finds no room is passed over by those that do, for so long and no longer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.protocol.events import AbortRequested, RequestFacts, Tick
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.scheduler.request import Request, State
from twinmesh.engine.scheduler.size_classes import SizeClasses

from .test_scheduler import arrive, make, step


def crowded(pages=14, **changes):
    """A mesh of so many pages of which one request holds 8, and more later."""
    scheduler, device = make("both=1", pages=pages, length=48, slots=8, **changes)
    arrive(scheduler, device, "running", prompt_len=32, max_tokens=9)
    step(scheduler, device)
    return scheduler, device


def is_seated(request):
    return request.state is not State.WAITING


def test_one_that_does_not_fit_is_passed_over_and_has_its_turn_first_when_there_is_room():
    scheduler, device = crowded()
    big = arrive(scheduler, device, "big", prompt_len=28, max_tokens=1)
    small = arrive(scheduler, device, "small", prompt_len=4, max_tokens=1)
    step(scheduler, device)
    assert is_seated(small)
    assert not is_seated(big)
    late = arrive(scheduler, device, "late", prompt_len=40, max_tokens=1)
    scheduler.on(AbortRequested(1.0, "running"))
    step(scheduler, device)
    assert is_seated(big)
    assert not is_seated(late)


def test_once_it_has_waited_long_enough_what_is_freed_is_kept_for_it():
    scheduler, device = crowded(age_seconds=10.0)
    big = arrive(scheduler, device, "big", prompt_len=28, max_tokens=1)
    before = arrive(scheduler, device, "before", prompt_len=4, max_tokens=1, t=9.9)
    step(scheduler, device)
    assert is_seated(before)
    after = arrive(scheduler, device, "after", prompt_len=4, max_tokens=1, t=10.0)
    step(scheduler, device)
    assert not is_seated(after)
    scheduler.on(AbortRequested(11.0, "before"))
    step(scheduler, device)
    assert not is_seated(after)
    scheduler.on(AbortRequested(12.0, "running"))
    step(scheduler, device)
    assert is_seated(big)
    assert is_seated(after)


def test_a_more_urgent_one_still_goes_before_one_that_pages_are_kept_for():
    scheduler, device = crowded(age_seconds=10.0)
    big = arrive(scheduler, device, "big", prompt_len=28, max_tokens=1)
    urgent = arrive(scheduler, device, "urgent", prompt_len=4, max_tokens=1, t=15.0, priority=-9)
    step(scheduler, device)
    assert is_seated(urgent)
    assert not is_seated(big)


def test_without_an_age_nothing_is_passed_over():
    scheduler, device = crowded(age_seconds=0)
    arrive(scheduler, device, "big", prompt_len=28, max_tokens=1)
    small = arrive(scheduler, device, "small", prompt_len=4, max_tokens=1)
    step(scheduler, device)
    assert not is_seated(small)


def test_those_that_were_woken_pass_over_too():
    scheduler, device = crowded(pages=15)
    leader = arrive(scheduler, device, "leader", prompt_len=5, prompt="p", max_tokens=1)
    big = arrive(scheduler, device, "big", prompt_len=28, max_tokens=1)
    asleep = arrive(scheduler, device, "asleep", prompt_len=7, prompt="p", max_tokens=1)
    step(scheduler, device)
    assert is_seated(leader)
    assert asleep.sleeps_for is not None
    for _ in range(6):
        device.complete_step(0, 1.0)
        step(scheduler, device)
    assert not is_seated(big)
    assert is_seated(asleep)


def test_however_many_do_not_fit_each_decision_asks_few():
    scheduler, device = crowded()
    for number in range(500):
        arrive(scheduler, device, number, prompt_len=28 + number % 9, max_tokens=1)
    step(scheduler, device)
    asked = []
    router = scheduler._router  # noqa: SLF001
    original = router.for_prompt
    router.for_prompt = lambda request: asked.append(request.id) or original(request)
    small = arrive(scheduler, device, "small", prompt_len=4, max_tokens=1)
    step(scheduler, device)
    assert is_seated(small)
    assert asked == ["small"]
    scheduler.on(Tick(30.0))
    step(scheduler, device)
    assert asked == ["small"]


def request(number, order, tokens):
    return Request(RequestFacts(number, tokens, 1), number, Timeline(0.0), order=(order, number), to_prefill=tokens)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("aaar"), st.integers(0, 20), st.integers(1, 300), st.integers(0, 80)), max_size=60
    )
)
def test_the_first_of_each_size_is_found(steps):
    waiting, requests = SizeClasses(4), []
    for number, (what, pick, tokens, pages) in enumerate(steps):
        if what == "a":
            requests.append(request(number, pick, tokens))
            waiting.add(requests[-1])
        elif requests:
            waiting.remove(requests.pop(pick % len(requests)))
        waiting.check()
        assert sorted(r.id for r in waiting) == sorted(r.id for r in requests)
        assert waiting.first is min(requests, key=lambda r: r.order, default=None)
        found = waiting.first_to_seat(pages, lambda r: False)
        fitting = [r for r in requests if waiting.pages(r) <= pages]
        if fitting and pages < 8:  # there each size is a class of its own
            assert found is min(fitting, key=lambda r: r.order)
        assert found is None or waiting.pages(found) <= pages


@pytest.mark.parametrize("kept", [True, False])
def test_one_that_pages_are_kept_for_holds_back_those_behind_it(kept):
    waiting = SizeClasses(4)
    big, small = request(0, 0, 100), request(1, 1, 4)
    waiting.add(big)
    waiting.add(small)
    assert waiting.first_to_seat(3, lambda r: kept and r is big) is (big if kept else small)
