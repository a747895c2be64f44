"""The one order: classes, priorities that age, and when batch work is due."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.protocol.actions import Prefill
from twinmesh.engine.protocol.events import RequestFacts
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.scheduler.order import place_in_order, weigh
from twinmesh.engine.scheduler.policy import FCFS, ShortestPromptFirst
from twinmesh.engine.scheduler.request import Request
from twinmesh.engine.topology import Topology

from .test_policy import AtRandom
from .test_scheduler import arrive, make, only, step

CONFIG = EngineConfig(Topology.parse("both=1"), max_model_len=100, age_seconds=10.0)


def accepted(number, t, policy=FCFS, prompt_len=5, tokens_before=0, **service):
    facts = RequestFacts(number, prompt_len, 1, service=Service(**service))
    request = Request(facts, number, Timeline(t), tokens_before, accepted=t)
    weigh(request, CONFIG)
    request.order = place_in_order(request, policy, None)
    return request


def in_order(requests):
    return [request.id for request in sorted(requests, key=lambda request: request.order)]


def test_of_equal_priorities_the_earlier_arrival_is_first():
    assert in_order([accepted(0, 1.0), accepted(1, 0.5), accepted(2, 1.0)]) == [1, 0, 2]


def test_a_lower_priority_number_overtakes_those_that_wait_less_than_a_level_each():
    first = accepted(0, 0.0, priority=2)
    assert in_order([first, accepted(1, 19.9)]) == [1, 0]
    assert in_order([first, accepted(1, 20.0)]) == [0, 1]
    assert in_order([first, accepted(1, 100.0, priority=-9)]) == [1, 0]


def test_batch_work_comes_last_by_when_it_is_due_and_then_as_it_came():
    requests = [
        accepted(0, 0.0, is_batch=True),
        accepted(1, 1.0, is_batch=True, due=90.0, priority=-5),
        accepted(2, 2.0, is_batch=True, due=50.0),
        accepted(3, 3.0, is_batch=True, due=50.0),
        accepted(4, 1e6, priority=2**31 - 1),
    ]
    assert in_order(requests) == [4, 2, 3, 1, 0]


def test_a_level_is_worth_the_longest_prompt_where_short_ones_go_first():
    policy = ShortestPromptFirst()
    assert in_order([accepted(0, 0.0, policy, 1, priority=1), accepted(1, 0.0, policy, 100, 1)]) == [1, 0]
    assert in_order([accepted(0, 0.0, policy, 1, priority=1), accepted(1, 0.0, policy, 100, 64)]) == [0, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(-3, 3)), min_size=1, max_size=60))
def test_priorities_let_only_so_many_tokens_more_overtake_the_shortest_prompt_first(prompts):
    policy, requests, before = ShortestPromptFirst(), [], 0
    for number, (length, priority) in enumerate(prompts):
        requests.append(accepted(number, 0.0, policy, length, before, priority=priority))
        before += length
    for request in requests:
        for priority in range(-3, 4):
            later = [r for r in requests[request.number + 1 :] if r.facts.service.priority == priority]
            overtaking = [other for other in later if other.order < request.order]
            most = request.prompt_len + (request.facts.service.priority - priority) * CONFIG.max_model_len
            between = sum(r.prompt_len for r in requests[request.number : overtaking[-1].number]) if overtaking else 0
            assert policy.AGEING * between <= max(0, most)


def test_forks_never_come_before_the_first_of_them():
    for seed in range(10):
        leader = accepted(0, 0.0, AtRandom(seed))
        forks = [accepted(n, 0.0, AtRandom(seed)) for n in range(1, 6)]
        for fork in forks:
            fork.order = place_in_order(fork, AtRandom(seed), leader)
        assert min(in_order([leader, *forks])) == in_order([leader, *forks])[0] == 0


def test_a_policy_that_knows_no_priorities_keeps_its_order_inside_the_interactive_class():
    ordered = in_order([accepted(n, 0.0, AtRandom(3), priority=-n) for n in range(9)])
    assert ordered == in_order([accepted(n, 0.0, AtRandom(3)) for n in range(9)])
    assert ordered != sorted(ordered)


def test_prompts_are_computed_and_seated_in_the_order():
    scheduler, device = make("both=1", slots=1)
    for name, service in (
        ("batch", {"is_batch": True}), ("due", {"is_batch": True, "due": 9.0}), ("late", {"priority": 1}),
        ("normal", {}), ("urgent", {"priority": -1}),
    ):  # fmt: skip
        arrive(scheduler, device, name, max_tokens=1, **service)
    device.drain(1.0)
    assert list(device.finished) == ["urgent", "normal", "late", "due", "batch"]


def test_chunks_of_a_step_are_taken_in_the_order():
    scheduler, device = make("both=1")
    for name, service in (("batch", {"is_batch": True}), ("normal", {}), ("urgent", {"priority": -1})):
        arrive(scheduler, device, name, prompt_len=3, **service)
    (prefill, *_) = only(step(scheduler, device), Prefill)
    assert [chunk.request_id for chunk in prefill.chunks] == ["urgent", "normal", "batch"]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "60"])
def test_an_age_that_is_no_time_is_refused(value):
    with pytest.raises(ValueError, match=r"age_seconds=.* is not usable: it must be a number of seconds, 0 or more"):
        EngineConfig(Topology.parse("both=1"), max_model_len=100, age_seconds=value)
