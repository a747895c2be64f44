"""Sessions of agents: recorded ones read back, drawn ones within what they are like, and both in lanes."""

import json
from itertools import pairwise

import numpy as np
import pytest
from twinmesh.engine.simulation.loads.agent_sessions import (
    DrawnSessions,
    LanesOfSessions,
    LogNormal,
    Turn,
    read_sessions,
)


def request(t, length, out, ids, api_time=1.0):
    return {"t": t, "type": "n", "in": length, "out": out, "hash_ids": ids, "api_time": api_time, "stop": "end_turn"}


SESSION = {
    "id": "a",
    "block_size": 64,
    "requests": [
        request(0.0, 128, 10, [7, 8]),
        {"t": 5.0, "type": "subagent", "requests": [request(5.0, 64, 4, [90], 2.0)]},
        request(30.0, 192, 20, [7, 8, 9]),
        request(31.0, 0, 5, []),
    ],
}


@pytest.fixture
def write(tmp_path):
    def written(*sessions):
        path = tmp_path / "sessions.jsonl"
        path.write_text("".join(json.dumps(session) + "\n" for session in sessions))
        return path

    return written


def test_recorded_turns_have_their_lengths_gaps_and_blocks(write):
    (session,) = read_sessions(write(SESSION), 1000)
    assert list(session) == [
        Turn(128, 10, 0.0, (0, 1)),
        Turn(64, 4, 4.0, (2,)),  # the helper's, from the end of the turn before it
        Turn(192, 20, 23.0, (0, 1, 3)),
    ]


def test_scaled_turns_are_shorter_and_share_what_they_shared(write):
    longs = [request(0.0, 640, 10, list(range(10))), request(9.0, 1280, 20, list(range(20)))]
    (session,) = read_sessions(write({"requests": longs}), 1000, 0.2)
    first, second = session
    assert (first.prompt_len, first.output_len, second.gap) == (128, 2, pytest.approx(1.6))
    assert (len(first.blocks), len(second.blocks)) == (2, 4)
    assert second.blocks[:2] == first.blocks


@pytest.mark.parametrize(
    ("sessions", "says"),
    [
        ([{"requests": [{"t": 0, "in": "x"}]}], r"line 1: .*give a session with requests"),
        ([SESSION, {"requests": [], "block_size": 16}], r"line 2: its blocks have 16 tokens, not 64"),
        ([{"requests": [request(0, 6400, 10, [])]}], r"none of its 1 sessions fits into 1,000 tokens"),
        ([[]], r"line 1"),
    ],
)
def test_what_is_no_session_or_does_not_fit_is_refused(write, sessions, says):
    with pytest.raises(ValueError, match=says):
        read_sessions(write(*sessions), 1000)


def test_a_lane_plays_one_session_after_the_other_with_gaps_that_are_capped():
    session = [Turn(10, 2, 0.0, (0,)), Turn(20, 3, 99.0, (0, 1))]
    requests = list(LanesOfSessions(lambda index: session, 2, 3, 10.0))
    assert [(one.at, one.after, one.pause) for one in requests] == [
        (0.0, None, 0.0), (None, 0, 10.0), (0.0, None, 0.0), (None, 2, 10.0), (None, 1, 0.0), (None, 4, 10.0),
    ]  # fmt: skip
    assert [one.session for one in requests] == ["s0", "s0", "s1", "s1", "s2", "s2"]
    first, second, other = requests[0].blocks, requests[1].blocks, requests[2].blocks
    assert second[:1] == first
    assert not set(first) & set(other)  # a session that is played again shares nothing


def drawn(**changes):
    kinds = {
        "turns": LogNormal(8, 0.1),
        "new": LogNormal(50, 0.5),
        "output": LogNormal(10, 0.5),
        "gap": LogNormal(4, 1),
    }
    return DrawnSessions(**kinds | {"longest": 10_000, "scale": 1.0, "seed": 3} | changes)


def test_drawn_turns_go_on_with_all_before_them_and_are_the_same_again():
    sessions = drawn()
    turns = sessions(5)
    assert list(turns) == list(drawn()(5)) != list(sessions(6))
    assert 6 <= len(turns) <= 11
    for before, turn in pairwise(turns):
        assert turn.prompt_len > before.prompt_len + before.output_len
        assert turn.blocks[: len(before.blocks)] == before.blocks
        assert len(turn.blocks) * 64 >= turn.prompt_len + turn.output_len
    news = [one.prompt_len for index in range(300) for one in sessions(index)[:1]]
    assert np.median(news) == pytest.approx(50, rel=0.15)


def test_drawn_sessions_end_where_there_is_no_more_room():
    assert all(turn.prompt_len + turn.output_len <= 120 for index in range(20) for turn in drawn(longest=120)(index))
    (only,) = drawn(longest=30, new=LogNormal(500, 0.1))(0)
    assert only.prompt_len + only.output_len == 30


def test_a_scale_shrinks_lengths_and_gaps():
    big, small = drawn(new=LogNormal(5000, 0.1), longest=10**6)(0), drawn(new=LogNormal(5000, 0.1), scale=0.01)(0)
    assert small[0].prompt_len == pytest.approx(big[0].prompt_len / 100, abs=1)
    assert small[1].gap == pytest.approx(big[1].gap / 100)


def test_a_log_normal_has_the_percentiles_it_was_made_of():
    random = np.random.default_rng(0)
    by_p90, by_mean = LogNormal.of(10, 50), LogNormal.with_mean(10, 20)
    assert np.percentile(by_p90.draw(random, 20_000), 90) == pytest.approx(50, rel=0.05)
    assert by_mean.draw(random, 200_000).mean() == pytest.approx(20, rel=0.05)
