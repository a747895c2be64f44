"""Policies: what they order, what they promise, and what is said of one that cannot be used."""

import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.protocol.actions import Prefill
from twinmesh.engine.protocol.events import Hold, PreemptRequested, RequestFacts
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.scheduler.policy import (
    POLICIES,
    FirstComeFirstServed,
    ShortestPromptFirst,
    policy_named,
)
from twinmesh.engine.scheduler.request import Request

from .test_scheduler import arrive, make, only, step


class AtRandom(FirstComeFirstServed):
    """A static order that has nothing to do with arrival, and victims at random."""

    name = "random"

    def __init__(self, seed=0):
        self._seed = seed

    def key(self, request):
        return Random(f"{self._seed} {request.number}").random()

    def victim(self, candidates):
        return candidates[Random(f"{self._seed} {len(candidates)} {candidates[0].number}").randrange(len(candidates))]


def queue(policy, lengths):
    """Requests of these prompts, in order of arrival."""
    return [Request(RequestFacts(i, length, 1), i, Timeline(0.0), sum(lengths[:i])) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("name", ["fcfs", "spf"])
def test_a_policy_is_found_by_the_name_it_has(name):
    assert policy_named(name).name == name


@pytest.mark.parametrize(("name", "near"), [("fcsf", "fcfs"), ("SPF", "spf"), ("shortest", "spf")])
def test_an_unknown_policy_is_refused_with_the_nearest_name(name, near):
    text = f"policy={name!r} is unknown: the policies are fcfs, spf; the nearest is {near!r}."
    with pytest.raises(ValueError, match=re.escape(text)):
        policy_named(name)


def test_short_prompts_are_prefilled_first():
    for policy, order in ((FirstComeFirstServed(), [1, 2, 3]), (ShortestPromptFirst(), [3, 2, 1])):
        scheduler, device = make("both=1", policy=policy, slots=1)
        for number, length in ((1, 20), (2, 9), (3, 2)):
            arrive(scheduler, device, number, prompt_len=length, max_tokens=1)
        device.drain(1.0)
        assert list(device.finished) == order


def test_a_request_that_starts_over_keeps_its_place():
    scheduler, device = make("both=1", policy=ShortestPromptFirst(), slots=1)
    long = arrive(scheduler, device, 1, prompt_len=20)
    order = long.order
    step(scheduler, device)
    arrive(scheduler, device, 2, prompt_len=19)
    scheduler.on(PreemptRequested(1.0, 1))
    assert long.restarts == 1
    assert long.order == order


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_prompts_that_overtake_one_hold_no_more_tokens_than_promised(lengths):
    policy = ShortestPromptFirst()
    requests = queue(policy, lengths)
    for request in requests:
        later = requests[request.number + 1 :]
        overtaking = [other for other in later if policy.key(other) < policy.key(request)]
        assert all(other.prompt_len < request.prompt_len for other in overtaking)
        assert sum(other.prompt_len for other in overtaking) < max(1, request.prompt_len * (1 / policy.AGEING - 1))


def test_a_long_prompt_is_overtaken_up_to_its_bound_and_no_further():
    """One-token prompts go on arriving, and there is always one that waits."""

    class Quick(ShortestPromptFirst):
        AGEING = 0.25

    scheduler, device = make("both=1", policy=Quick(), slots=1)
    arrive(scheduler, device, 0, prompt_len=20, max_tokens=1)
    order = []
    for number in range(1, 100):
        arrive(scheduler, device, number, prompt_len=1, max_tokens=1)
        order += [chunk.request_id for action in only(step(scheduler, device), Prefill) for chunk in action.chunks]
        if device.steps[0]:
            device.complete_step(0, float(number))
    most = 20 * (1 / Quick.AGEING - 1)
    assert most - 5 < order.index(0) < most


@pytest.mark.parametrize("seed", range(10))
def test_the_first_in_any_order_is_never_a_victim(seed):
    scheduler, device = make("both=1", policy=AtRandom(seed), pages=8)
    requests = [arrive(scheduler, device, number, prompt_len=8, max_tokens=20) for number in range(4)]
    first = min(requests, key=lambda request: request.order)
    device.drain(1.0)
    assert first.restarts == 0
    assert sum(request.restarts for request in requests) > 0
    assert set(device.finished.values()) == {"length"}


def test_completions_of_one_prompt_follow_the_first_of_them_in_any_order():
    for seed in range(10):
        scheduler, device = make("both=1", policy=AtRandom(seed), slots=1)
        for number in range(6):
            arrive(scheduler, device, number, prompt="p", fork_of=0 if number else None)
        first, *others = (scheduler.requests[number] for number in range(6))
        assert all(first.order < other.order for other in others)
        device.drain(1.0)
        assert len(device.finished) == 6


def test_while_admission_is_held_a_request_that_starts_over_passes_any_number_that_wait():
    scheduler, device = make("both=1", policy=ShortestPromptFirst(), slots=1)
    arrive(scheduler, device, 0, prompt_len=20)
    step(scheduler, device)
    scheduler.on(Hold(1.0))
    for number in range(1, 9):
        arrive(scheduler, device, number, prompt_len=1)
    scheduler.on(PreemptRequested(2.0, 0))
    device.drain(3.0)
    assert device.finished == {0: "length"}
    assert scheduler.is_drained


def _without(method):
    return type("Odd", (), {name: getattr(FirstComeFirstServed, name) for name in (
        "name", "key", "prefill_rank", "decode_rank", "victim"
    ) if name != method})()  # fmt: skip


def _with(**methods):
    return type("Odd", (FirstComeFirstServed,), {"name": "odd"} | methods)()


@pytest.mark.parametrize("method", ["key", "prefill_rank", "decode_rank", "victim"])
def test_a_policy_without_one_of_its_methods_is_refused_at_start(method):
    with pytest.raises(ValueError, match=f"policy 'fcfs' has no method {method}: add it"):
        make(policy=_without(method))


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ({"key": lambda self, request: {"n": request.number}}, "values by key that cannot be ordered"),
        ({"key": lambda self, request: float("nan")}, "values by key that cannot be ordered"),
        ({"key": lambda self, request: None if request.number else 1}, "values by key that cannot be ordered"),
        ({"key": lambda self, request: request.priority}, r"fails in key \(AttributeError: .*priority.*\): let it"),
        ({"prefill_rank": lambda self, request, mesh: mesh}, "values by prefill_rank that cannot be ordered"),
        ({"decode_rank": lambda self, request: 0}, r"fails in decode_rank \(TypeError"),
        ({"victim": lambda self, candidates: None}, "chooses None by victim: let it return one of the candidates"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused_at_start(methods, text):
    with pytest.raises(ValueError, match=f"policy 'odd' .*{text}"):
        make("prefill=2,decode=2", policy=_with(**methods))


def test_a_policy_without_a_name_is_refused_at_start():
    with pytest.raises(ValueError, match="has no name: give it a `name`"):
        make(policy=_with(name=None))


def test_every_policy_serves_by_its_name():
    for name in POLICIES:
        scheduler, _ = make(policy=policy_named(name))
        assert scheduler.policy.name == name
