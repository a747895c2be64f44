"""The planner: what it makes of observations, with nothing running."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.scheduler.alike import are_alike
from twinmesh.engine.scheduler.candidates import candidates
from twinmesh.engine.scheduler.demand import DemandWindow
from twinmesh.engine.scheduler.forecast import forecast, steady_from
from twinmesh.engine.scheduler.line_fit import Terms
from twinmesh.engine.scheduler.observations import Demand, MeshSize, Observations, Pair, Queues, Split, StepTimes
from twinmesh.engine.scheduler.planner import RULES, SENTENCES, Plan, Reason, flips, plan
from twinmesh.engine.scheduler.prediction import predict

TARGET = SLO(ttft_ms=1000, tpot_ms=25, percentile=95)
IDLE = Queues(0.0, 0.0, 0, 0.0, 0)
TIMES = StepTimes(Terms(0.005, 0.00005), Terms(0.005, 0.00006), 0.01, is_measured=True)  # of 8B on one H100, roughly
SIZE = MeshSize(chunk=512, prompts=8, slots=48, tokens=4096 * 64)
BINS = 64


def observed(rate, roles, prompt=1155, output=211, bins=BINS, **changes):
    """So many requests a second, all alike and evenly spread."""
    counts = [int(rate * (k + 1) / 2) - int(rate * k / 2) for k in range(bins)]
    demand = Demand(0.5, counts, [count * prompt for count in counts], [Pair(prompt, prompt, output)] * 8, sum(counts))
    return Observations(**{"roles": roles, "demand": demand, "queues": IDLE, "times": TIMES, "size": SIZE} | changes)


@st.composite
def observations(draw):
    """Anything that may be seen of a pool of 2 to 12 meshes."""
    meshes = draw(st.integers(2, 12))
    prefill = draw(st.integers(0, meshes - 1))
    roles = Split(prefill, draw(st.integers(0 if prefill < meshes else 1, meshes - prefill)), 0)
    roles = roles._replace(both=meshes - prefill - roles.decode)
    if not roles.is_served:
        roles = Split(0, 0, meshes)
    bins = 12
    counts = draw(st.lists(st.integers(0, 60), min_size=bins, max_size=bins))
    lengths = draw(st.lists(st.tuples(st.integers(1, 8000), st.integers(1, 900)), min_size=1, max_size=6))
    pairs = [Pair(prompt, prompt, output) for prompt, output in lengths]
    mean = sum(pair.prompt for pair in pairs) / len(pairs)
    small = st.floats(1e-4, 2e-2)
    times = StepTimes(
        Terms(draw(small), draw(st.floats(1e-6, 2e-4))), Terms(draw(small), draw(st.floats(0, 1e-3))), 0.01,
        is_measured=True,
    )  # fmt: skip
    ages = draw(st.sampled_from((0.0, 3.0)))
    queues = Queues(draw(st.floats(0, 1e6)), ages, draw(st.integers(0, 50)), ages, draw(st.integers(0, 400)))
    size = MeshSize(
        draw(st.sampled_from((128, 512, 4096))), 8, draw(st.integers(1, 256)), draw(st.integers(4096, 10**6))
    )
    return Observations(roles, Demand(0.5, counts, [c * mean for c in counts], pairs, sum(counts)), queues, times, size)


@given(observations())
@settings(max_examples=25, deadline=None)
def test_both_phases_keep_a_mesh_and_no_mesh_is_lost(seen):
    found = plan(seen, TARGET)
    assert found.roles.is_served
    assert sum(found.roles) == sum(seen.roles)
    assert found.sentence.startswith(str(found.roles))


@given(observations())
@settings(max_examples=25, deadline=None)
def test_under_observations_that_stay_the_same_no_roles_come_back(seen):
    before = [seen.roles]
    for _ in range(12):
        roles = plan(replace(seen, roles=before[-1]), TARGET).roles
        if roles == before[-1]:
            return
        assert roles not in before
        before.append(roles)
    raise AssertionError(f"roles change for ever: {before}")


@given(observations())
@settings(max_examples=25, deadline=None)
def test_a_mesh_is_taken_from_a_phase_only_where_that_meets_the_target_with_more_demand_or_nothing_is_lost(seen):
    found = plan(seen, TARGET)
    if found.roles == seen.roles:
        return
    scale = RULES.headroom * (RULES.headroom if seen.queues.oldest_prompt else 1)
    now, then = predict(seen, TARGET, [seen.roles, found.roles], scale)
    assert then.value >= now.value
    target = TARGET.percentile / 100
    fewer_prefill = found.roles.prefill + found.roles.both < seen.roles.prefill + seen.roles.both
    fewer_decode = found.roles.decode + found.roles.both < seen.roles.decode + seen.roles.both
    is_met = (not fewer_prefill or then.ttft >= target) and (not fewer_decode or then.tpot >= target)
    assert is_met or (found.now.goodput < target and then.value >= now.value + RULES.gain)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_changing": True}, "changing"),
        ({"demand": Demand(0.5, [0] * 32, [0.0] * 32, [Pair(9, 9, 9)], 0)}, "few arrivals"),
        ({"demand": Demand(0.5, [9] * 32, [9.0] * 32, [], 288)}, "few arrivals"),
        ({"demand": Demand(0.5, [9] * 32, [9.0] * 32, [Pair(9, 9, 9)], 288, are_lengths_known=False)}, "few ended"),
        ({"times": replace(TIMES, is_measured=False)}, "not measured"),
    ],
)
def test_it_pauses_where_observations_are_missing(changes, reason):
    found = plan(observed(34, Split(3, 1, 0), **changes), TARGET)
    assert (found.roles, found.reason, found.now, found.best) == (Split(3, 1, 0), reason, None, None)


def test_near_saturation_it_ends_disaggregation_and_takes_it_up_again():
    assert plan(observed(16, Split(3, 1, 0)), TARGET).reason == "meets"
    ended = plan(observed(36, Split(3, 1, 0)), TARGET)
    assert (ended.roles, ended.reason) == (Split(0, 0, 4), "saturated")
    strict = SLO(ttft_ms=1000, tpot_ms=7, percentile=95)  # less than a chunk adds to the steps beside it
    again = plan(observed(16, ended.roles), strict)
    assert again.reason == "separate again"
    assert not again.roles.both
    assert again.best.goodput >= 0.95


def test_what_falls_short_is_named():
    assert plan(observed(14, Split(1, 3, 0), prompt=1800, output=20), TARGET).reason == "more prefill"
    assert plan(observed(20, Split(3, 1, 0), prompt=300, output=400), TARGET).reason == "more decode"


def test_out_of_reach_it_names_the_best_and_does_not_chase():
    found = plan(observed(60, Split(2, 2, 0)), TARGET)
    assert found.reason == "out of reach"
    assert not found.is_reachable
    assert "no roles meet the target" in found.sentence
    settled = plan(observed(60, found.roles), TARGET)
    assert settled.roles == found.roles


def test_roles_stay_for_the_dwell():
    seen = observed(36, Split(3, 1, 0), since_change=RULES.dwell / 2)
    assert plan(seen, TARGET).reason == "dwell"
    assert plan(replace(seen, since_change=RULES.dwell), TARGET).reason == "saturated"


def test_a_backlog_is_worth_a_mesh_that_demand_alone_is_not():
    seen = observed(14, Split(1, 3, 0))
    assert plan(seen, TARGET).roles == Split(1, 3, 0)
    late = plan(replace(seen, queues=replace(IDLE, to_prefill=400_000.0)), TARGET)
    assert late.roles.prefill + late.roles.both > 1


def test_a_queue_that_is_late_already_makes_it_plan_for_more_demand():
    seen = observed(30.5, Split(3, 1, 0))
    assert plan(seen, TARGET).reason == "meets"
    assert plan(replace(seen, queues=replace(IDLE, oldest_prompt=0.9)), TARGET).reason == "meets"
    for late in (replace(IDLE, oldest_prompt=1.1), replace(IDLE, oldest_credit=6.0)):  # 211 tokens of 25 ms are 5.3 s
        assert plan(replace(seen, queues=late), TARGET).roles != seen.roles


def test_more_time_for_a_step_never_helps():
    splits = candidates(Split(0, 0, 4))
    slower = replace(TIMES, prefill=Terms(0.006, 0.00007), decode=Terms(0.007, 0.00008))
    fast = predict(observed(30, Split(0, 0, 4)), TARGET, splits)
    slow = predict(observed(30, Split(0, 0, 4), times=slower), TARGET, splits)
    assert all(a.ttft >= b.ttft for a, b in zip(fast, slow, strict=True))
    assert max(o.goodput for o in fast) > max(o.goodput for o in slow)


@pytest.mark.parametrize("meshes", [2, 4, 8, 64, 256, 2048])
def test_the_splits_that_are_looked_at_are_few_and_each_serves_both_phases(meshes):
    splits = candidates(Split(meshes // 2, meshes - meshes // 2, 0))
    assert len(splits) == len(set(splits)) <= 120
    assert all(split.is_served and sum(split) == meshes and min(split) >= 0 for split in splits)
    assert Split(0, 0, meshes) in splits


def test_every_reason_has_a_sentence():
    assert set(get_args(Reason)) == set(SENTENCES)
    assert Plan(Split(1, 1, 0), "meets").sentence == "prefill=1,decode=1: the roles meet the target."
    assert flips(Split(3, 1, 0), Split(1, 1, 2)) == 2


def test_a_forecast_follows_growth_and_is_bounded():
    assert forecast([4] * 16, 0.5) == forecast([8] * 8 + [4] * 8, 0.5) == 1.0
    assert forecast([4] * 8 + [6] * 8, 0.5) == pytest.approx((6 + 0.25 * 2) / 5)
    assert forecast([0] * 8 + [9] * 8, 0.5) == 1.5
    assert forecast([], 0.5) == forecast([0] * 16, 0.5) == 1.0


def test_demand_is_counted_by_interval_and_forgotten():
    window = DemandWindow(bins=4, seconds=0.5, pairs=2)
    for t, tokens in ((10.1, 100), (10.2, 50), (11.4, 70)):
        window.arrived(t, tokens)
    window.ended(40, 80, 7)
    seen = window.demand(11.6)
    assert (seen.requests, seen.tokens, seen.seen) == ([2, 0, 1, 2], [75.0, 0.0, 35.0, 75.0], 3)  # half was cached
    assert seen.pairs == [Pair(25, 50, 7), Pair(40, 80, 7)]  # prompts of 50 are taken to be as those of 80
    assert window.demand(12.6).seen == 1
    assert window.demand(100.0).seen == 0


def test_of_many_that_end_a_sample_over_the_window_is_kept():
    window = DemandWindow(bins=4, seconds=0.5, pairs=8)
    for _ in range(400):
        window.ended(1, 1, 1)
    window.new_sample(1.0)  # 800 end in a window: one in 100 is kept
    for output in range(400):
        window.ended(1, 1, output)
    window.arrived(0.0, 1)
    assert [pair.output for pair in window.demand(0.0).pairs][-4:] == [99, 199, 299, 399]


def test_pairs_come_in_the_proportions_of_what_arrives_and_not_of_what_ends():
    window = DemandWindow(bins=64, seconds=0.5, pairs=40)
    for _ in range(100):
        window.ended(3000, 3000, 5)
    window.ended(200, 200, 900)  # long answers end late: this is the first of them
    for k in range(40):
        window.arrived(k / 2, 200 if k % 4 else 3000)
    outputs = [pair.output for pair in window.demand(20.0).pairs]
    assert (outputs.count(900), outputs.count(5)) == (30, 10)


def test_demand_since_its_last_change_is_taken_to_come_again_and_again():
    window = DemandWindow(bins=64, seconds=0.5, pairs=8)
    window.ended(100, 100, 10)
    window.ended(2000, 2000, 10)
    for k in range(240):
        window.arrived(k / 10, 100)
    for k in range(90):
        window.arrived(24.0 + k / 15, 2000)  # for 6 s
    seen = window.demand(30.0)
    assert len(seen.tokens) == 64
    assert sum(tokens > 10_000 for tokens in seen.tokens) >= 58  # an interval before the change may count yet
    assert sum(pair.prompt == 2000 for pair in seen.pairs) >= 7


def test_a_change_of_demand_is_told_from_bursts_and_from_chance():
    assert steady_from([[10.0] * 40 + [20.0] * 10]) in (40, 41, 42)
    assert steady_from([[10.0] * 50, [10.0] * 40 + [5.0] * 10]) >= 40
    assert steady_from([[0.0, 0.0, 40.0, 0.0] * 16]) == 0
    assert steady_from([[10.0] * 40 + [10.5] * 10]) == 0
    assert steady_from([[]]) == steady_from([[], []]) == 0


def test_bursts_that_come_again_are_one_demand_however_long_they_last():
    for length in (3, 10, 30):
        bursts = ([50.0] * length + [5.0] * 2 * length) * 12
        assert [steady_from([bursts[:end]]) for end in range(8 * length, len(bursts), length)][-9:] == [0] * 9
    assert steady_from([[5.0] * 200 + [50.0] * 8]) >= 199  # as many in one that never came before are another


def test_a_change_that_was_found_is_no_noise_afterwards():
    shifts = [10.0] * 60 + [40.0] * 60 + [10.0] * 60 + [40.0] * 5
    assert steady_from([shifts], 120, [60, 120]) >= 179


def test_a_gain_has_to_last_or_to_be_large():
    seen = observed(33, Split(3, 1, 0))
    first = plan(seen, TARGET)
    assert (first.roles, first.reason) == (Split(3, 1, 0), "not for long")
    then = plan(replace(seen, gains=first.gains), TARGET)
    assert then.roles != seen.roles
    assert plan(observed(36, Split(3, 1, 0)), TARGET).reason == "saturated"


def test_where_no_roles_meet_the_target_little_is_no_reason_to_change():
    seen = observed(60, Split(0, 0, 4))
    found = plan(seen, TARGET)
    assert not found.is_reachable
    assert found.best.value - found.now.value < RULES.gain_out_of_reach
    assert plan(replace(seen, gains=found.gains), TARGET).roles == seen.roles


def test_the_shortest_answers_alone_are_no_sample_of_lengths():
    window = DemandWindow(bins=64, seconds=1.0, pairs=8)
    for k in range(40):
        window.arrived(k / 10, 500)
    window.ended(500, 500, 3)
    assert not window.demand(4.0).are_lengths_known
    assert window.demand(31.0).are_lengths_known  # nobody waits for ever
    for k in range(10):
        window.ended(500, 500, 300 + k)
    assert window.demand(31.0).are_lengths_known


def test_a_plan_stands_while_what_is_seen_is_alike():
    seen, more = observed(20, Split(3, 1, 0)), observed(26, Split(3, 1, 0))
    assert are_alike(observed(21, Split(3, 1, 0)), seen, or_easier=False)
    assert not are_alike(more, seen, or_easier=True)
    assert are_alike(seen, more, or_easier=True)
    assert not are_alike(seen, more, or_easier=False)
    assert not are_alike(replace(seen, roles=Split(2, 2, 0)), seen, or_easier=True)
    assert not are_alike(replace(seen, queues=replace(IDLE, to_prefill=100_000.0)), seen, or_easier=True)
    assert not are_alike(replace(seen, is_changing=True), seen, or_easier=True)


def test_meshes_that_do_both_in_one_step_serve_more_than_those_that_take_turns():
    turns = observed(44, Split(0, 0, 4))
    fused = replace(turns, size=replace(SIZE, is_fused=True))
    splits = [Split(0, 0, 4), Split(3, 1, 0)]
    (both, apart), (both_fused, apart_fused) = predict(turns, TARGET, splits), predict(fused, TARGET, splits)
    assert apart_fused == apart
    assert both_fused.goodput > both.goodput


def test_what_changes_quickly_may_change_again_soon():
    seen = observed(36, Split(3, 1, 0), since_change=6.0)
    assert plan(seen, TARGET).reason == "dwell"
    assert plan(replace(seen, settling=1.0), TARGET).reason == "saturated"
    assert plan(replace(seen, settling=0.0, since_change=RULES.least_dwell / 2), TARGET).reason == "dwell"
    assert plan(replace(seen, settling=2.0), TARGET).reason == "dwell"
    assert plan(replace(seen, settling=100.0, since_change=RULES.dwell), TARGET).reason == "saturated"
