"""Loads by rule: the rates, gaps and lengths that were asked for, whole conversations, the same each time."""

from itertools import pairwise

import numpy as np
import pytest
from twinmesh.engine.metrics.dispersion import index_of_dispersion
from twinmesh.engine.simulation.loads.arrival_times import ArrivalTimes, Rate
from twinmesh.engine.simulation.loads.load_spec import read_workload
from twinmesh.engine.simulation.workload import page_hashes

LENGTHS = "input=10-90,output=5"
OPEN = [
    f"poisson:rate=5,seconds=600,{LENGTHS}",
    f"gamma:rate=5,cv=3,seconds=600,{LENGTHS}",
    f"ramp:rate=1,to=9,seconds=600,{LENGTHS}",
    f"spike:rate=2,factor=10,begin=100,length=60,seconds=600,{LENGTHS}",
    f"diurnal:rate=5,period=600,seconds=600,{LENGTHS}",
]
CLOSED = f"closed:concurrency=4,requests=11,think=2,{LENGTHS}"
SESSIONS = "sessions:rate=0.5,seconds=100,think=10,turns=2-5,system=100,input=50-60,output=70"
AGENTS = "agents:lanes=3,conversations=8,tool=2,turns=4,opening=200-300,input=30,output=50,system=64,systems=2"


def requests(text):
    return list(read_workload(text).requests)


def times(text):
    return np.array([request.at for request in requests(text)])


@pytest.mark.parametrize("text", [*OPEN, CLOSED, SESSIONS, AGENTS])
def test_the_same_seed_gives_the_same_requests_and_another_one_others(text):
    workload = read_workload(text)
    found = list(workload.requests)
    assert found == list(workload.requests) == requests(f"{text},seed=0") != requests(f"{text},seed=1")
    assert workload.name == text


@pytest.mark.parametrize("text", OPEN)
def test_open_loops_are_in_order_and_end_in_time(text):
    found = times(text)
    assert found[0] >= 0
    assert found[-1] < 600
    assert np.all(np.diff(found) >= 0)
    short = times(f"{text},requests=100")
    assert np.array_equal(short, found[:100])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (OPEN[0], [5] * 6),
        (OPEN[2], [1 + 8 * (n + 0.5) / 6 for n in range(6)]),
        (OPEN[3], [2, 2 + 18 * 0.6, 2, 2, 2, 2]),
        (OPEN[4].replace("seconds=600", "seconds=600,depth=1"),
         [5 - 5 * (np.sin(np.pi * (n + 1) / 3) - np.sin(np.pi * n / 3)) * 3 / np.pi for n in range(6)]),
    ],
)  # fmt: skip
def test_rates_are_those_that_were_asked_for(text, expected):
    # Ten times as fast a rate, so that counts are close to their means.
    scaled = ",".join(
        f"{key}={float(value) * 10}" if key.endswith(("rate", "to")) else f"{key}={value}"
        for key, value in (part.split("=") for part in text.split(","))
    )
    counts = np.histogram(times(scaled), 6, (0, 600))[0]
    assert counts / 1000 == pytest.approx(expected, abs=5 * np.sqrt(max(expected) / 1000))


def test_gaps_vary_as_much_as_was_asked_for():
    for cv in (0, 0.5, 1, 3):
        draws = ArrivalTimes(Rate.steady(5.0), cv, count=50_000).draw(np.random.default_rng(0))
        found = np.concatenate(list(draws))
        assert len(found) == 50_000
        gaps = np.diff(found)
        assert gaps.mean() == pytest.approx(0.2, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)
    assert index_of_dispersion(found, 60) == pytest.approx(9, rel=0.3)


def test_another_rate_leaves_the_lengths_as_they_were():
    slow, fast = (requests(f"poisson:rate={rate},requests=50,{LENGTHS}") for rate in (1, 7))
    assert [r.prompt_len for r in slow] == [r.prompt_len for r in fast]
    assert {r.output_len for r in slow} == {5}
    assert min(r.prompt_len for r in requests(f"poisson:rate=9,requests=3000,{LENGTHS}")) == 10
    assert max(r.prompt_len for r in requests(f"poisson:rate=9,requests=3000,{LENGTHS}")) == 90


def test_lengths_of_a_trace_stay_pairs(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00,10,1\n2024-05-12 00:00:01,20,2\n")
    found = requests(f"poisson:rate=5,requests=200,lengths={path}")
    assert {(r.prompt_len, r.output_len) for r in found} == {(10, 1), (20, 2)}


def test_an_integral_that_ends_is_never_reached_beyond():
    down = Rate.ramp(2.0, 0.0, 10.0)  # 10 requests in all
    assert down.times(np.array([0.0, 7.5, 10.0])) == pytest.approx([0.0, 5.0, 10.0])
    assert np.isinf(down.times(np.array([10.5])))
    assert len(times(f"ramp:rate=20,to=0,seconds=10,{LENGTHS}")) == pytest.approx(100, abs=40)


def test_users_of_a_closed_loop_have_one_request_at_a_time():
    found = requests(CLOSED)
    assert [(r.at, r.after) for r in found] == [(0.0, None)] * 4 + [(None, n) for n in range(7)]
    assert np.mean([r.pause for r in requests(CLOSED.replace("=11", "=4000"))[4:]]) == pytest.approx(2, rel=0.1)
    assert all(r.pause == 0 for r in requests(CLOSED.replace("think=2,", "")))


def by_session(found):
    talks = {}
    for number, request in enumerate(found):
        talks.setdefault(request.session, []).append((number, request))
    return talks


@pytest.mark.parametrize("text", [SESSIONS, AGENTS])
def test_a_turn_goes_on_with_prompt_and_answer_of_the_one_before(text):
    workload = read_workload(text)
    for turns in by_session(list(workload.requests)).values():
        for (number, before), (_, turn) in pairwise(turns):
            length = before.prompt_len + before.output_len
            assert turn.prompt_len > length
            assert turn.after == number
            assert turn.at is None
            was = page_hashes(before.blocks, workload.block_tokens, length, 16)
            assert len(was) == length // 16
            assert page_hashes(turn.blocks, workload.block_tokens, turn.prompt_len, 16)[: len(was)] == was


def test_conversations_share_their_system_prompt_and_nothing_else():
    workload = read_workload(AGENTS)
    firsts = [turns[0][1] for turns in by_session(list(workload.requests)).values()]
    pages = [page_hashes(first.blocks, workload.block_tokens, first.prompt_len, 64) for first in firsts]
    assert len({page[0] for page in pages}) == 2
    assert len({page for own in pages for page in own[1:]}) == sum(len(own) - 1 for own in pages)
    assert all(64 + 200 <= first.prompt_len <= 64 + 300 for first in firsts)


def test_sessions_have_as_many_turns_as_asked_and_begin_at_the_rate():
    talks = by_session(requests(SESSIONS.replace("seconds=100", "seconds=1000")))
    assert len(talks) == pytest.approx(500, rel=0.15)
    assert {len(turns) for turns in talks.values()} == {2, 3, 4, 5}
    pauses = [request.pause for turns in talks.values() for _, request in turns[1:]]
    assert np.mean(pauses) == pytest.approx(10, rel=0.1)


def test_a_turn_that_would_be_too_long_is_left_out():
    found = by_session(requests(f"{SESSIONS},longest=500"))
    assert all(r.prompt_len + r.output_len <= 500 for turns in found.values() for _, r in turns)
    assert max(len(turns) for turns in found.values()) == 3


def test_a_lane_begins_its_next_conversation_after_its_last():
    found = requests(AGENTS)
    begins = {session: turns[0][1] for session, turns in by_session(found).items()}
    assert [begin.at for begin in begins.values()] == [0.0] * 3 + [None] * 5
    for index, begin in enumerate(begins.values()):
        if index >= 3:
            assert found[begin.after].session == f"c{index - 3}"
            assert found[begin.after + 1].session != f"c{index - 3}"
    assert all(r.after is None or r.after < number for number, r in enumerate(found))
