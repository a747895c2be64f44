"""Workloads made of others: what is multiplied, and what stays together."""

import numpy as np
import pytest
from twinmesh.engine.metrics.dispersion import index_of_dispersion
from twinmesh.engine.simulation.loads.scaling import faster, first, longer, stretched, superimposed, thinned
from twinmesh.engine.simulation.workload import Workload, WorkRequest, page_hashes

TALK = Workload(
    "talk",
    [
        WorkRequest(100, 10, 0.0, blocks=(1, 2), session="a"),
        WorkRequest(200, 20, 4.0, blocks=(1, 3, 4, 5)),
        WorkRequest(130, 30, after=0, pause=6.0, blocks=(1, 2, 9), session="a"),
        WorkRequest(300, 40, 9.0),
        WorkRequest(500, 50, 10.0),
    ],
    64,
)


def bursts(seed=0, minutes=10):
    """Arrivals whose rate changes every 20 s."""
    random = np.random.default_rng(seed)
    rates = random.choice([1, 9], minutes * 3)
    times = np.concatenate([20 * n + 20 * random.random(random.poisson(20 * rate)) for n, rate in enumerate(rates)])
    return Workload("bursts", [WorkRequest(n % 7 + 1, n % 5 + 1, float(t)) for n, t in enumerate(np.sort(times))])


def test_faster_divides_times_and_pauses():
    found = list(faster(TALK, 2).requests)
    assert [request.at for request in found] == [0.0, 2.0, None, 4.5, 5.0]
    assert found[2].pause == 3.0
    assert [request.prompt_len for request in found] == [100, 200, 130, 300, 500]


def test_longer_multiplies_lengths_and_what_is_shared():
    for factor in (0.1, 0.5, 1.0, 3.0):
        workload = longer(TALK, factor)
        found = list(workload.requests)
        assert [request.prompt_len for request in found] == [
            max(1, round(n * factor)) for n in (100, 200, 130, 300, 500)
        ]
        assert found[0].output_len == max(1, round(10 * factor))
        hashes = [page_hashes(request.blocks, workload.block_tokens, request.prompt_len, 1) for request in found[:3]]
        shared = sum(a == b for a, b in zip(hashes[0], hashes[1], strict=False))
        assert abs(shared - 64 * factor) <= workload.block_tokens
        assert sum(a == b for a, b in zip(hashes[0], hashes[2], strict=False)) == len(hashes[0])


def test_first_takes_the_first():
    assert list(first(TALK, 2).requests) == list(TALK.requests)[:2]
    assert len(list(first(TALK, 99).requests)) == 5


def test_thinned_keeps_a_share_and_whole_chains():
    workload = bursts()
    requests = list(workload.requests)
    kept = list(thinned(workload, 0.25, seed=3).requests)
    assert len(kept) == pytest.approx(len(requests) / 4, rel=0.1)
    assert set(kept) <= set(requests)
    assert kept == list(thinned(workload, 0.25, seed=3).requests) != list(thinned(workload, 0.25, seed=4).requests)
    for seed in range(20):
        found = list(thinned(TALK, 0.5, seed).requests)
        for request in found:
            assert request.after is None or found[request.after].session == "a"
        assert sum(request.session == "a" for request in found) in (0, 2)


def test_superimposed_copies_have_all_that_one_has_in_the_time_of_one():
    found = list(superimposed(TALK, 3).requests)
    timed = [request for request in found if request.at is not None]
    assert sorted(request.prompt_len for request in found) == sorted(3 * [100, 200, 130, 300, 500])
    assert [request.at for request in timed] == sorted(request.at for request in timed)
    assert all(0 <= request.at <= 10 for request in timed)
    assert {(0.0, 100), (4.0, 200), (9.0, 300), (10.0, 500)} < {(request.at, request.prompt_len) for request in timed}
    later = [request for request in found if request.after is not None]
    assert sorted((request.session, found[request.after].session) for request in later) == [
        ("a/0", "a/0"), ("a/1", "a/1"), ("a/2", "a/2"),
    ]  # fmt: skip
    assert all(request.after < number for number, request in enumerate(found) if request.after is not None)
    ids = [{id_ for request in found if request.session == f"a/{copy}" for id_ in request.blocks} for copy in range(3)]
    assert [len(own) for own in ids] == [3, 3, 3]
    assert len(set.union(*ids)) == 9


def test_more_copies_leave_bursts_as_they_were_and_a_higher_speed_shortens_them():
    workload = bursts()
    was, more, quicker = (
        np.array([request.at for request in made.requests])
        for made in (workload, superimposed(workload, 10), faster(workload, 10))
    )
    assert len(more) == 10 * len(was)
    assert more.max() == pytest.approx(was.max())
    assert np.all(np.diff(more) >= 0)
    for window in (1, 10):
        assert index_of_dispersion(more, window) == pytest.approx(index_of_dispersion(was, window), rel=0.5)
    assert index_of_dispersion(quicker, 1) == pytest.approx(index_of_dispersion(was, 10), rel=0.1)


def test_stretched_multiplies_times():
    assert [request.at for request in stretched(TALK.requests[:2], 0.5)] == [0.0, 2.0]
    with pytest.raises(ValueError, match="waits for another"):
        stretched(TALK.requests, 2)


@pytest.mark.parametrize("make", [faster, longer, first, thinned, superimposed])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_factor_that_is_not_above_0_is_refused(make, value):
    with pytest.raises(ValueError, match=r"is not usable: it must be a number above 0"):
        make(TALK, value)


def test_no_more_than_all_can_be_kept():
    with pytest.raises(ValueError, match=r"keep=2 is not usable"):
        thinned(TALK, 2)
