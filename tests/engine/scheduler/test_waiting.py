"""The queue finds the first that may be placed, whatever sleeps, moves on or is taken out, and loses none."""

from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.protocol.events import RequestFacts
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.scheduler.request import Request
from twinmesh.engine.scheduler.waiting import WaitingRequests

TEXTS = st.text("ab", max_size=5)


def request(number, text):
    """A request whose prompt has a block for each letter of a text."""
    hashes = [text[: i + 1].encode() for i in range(len(text))]
    return Request(RequestFacts(number, 1 + len(text), 1), number, Timeline(0.0), order=(0, number), hashes=hashes)


def may_be_placed(requests, under_way):
    return [r for r in requests if r.sleeps_for is None or r.sleeps_for not in under_way]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aasssdr"), st.integers(0, 20), TEXTS), max_size=50))
def test_the_first_that_may_be_placed_is_found(steps):
    waiting, requests, under_way = WaitingRequests(4), [], set()
    for number, (what, pick, text) in enumerate(steps):
        first = waiting.first(under_way.__contains__)
        if what == "a":
            requests.append(request(number, text))
            waiting.add(requests[-1])
        elif what == "s" and first is not None and first.hashes:  # a block of it is being computed
            index = pick % len(first.hashes)
            under_way.add(first.hashes[index])
            waiting.sleep(first, first.hashes[index], index + 1)
            assert first.sleeps_for == first.hashes[index]
        elif what == "d" and under_way:
            done = sorted(under_way)[pick % len(under_way)]
            under_way.remove(done)
            waiting.done([done])
        elif what == "r" and requests:
            waiting.remove(requests.pop(pick % len(requests)))
        waiting.check(under_way.__contains__)
        assert all(r.sleeps_for is None or r.sleeps_for in r.hashes for r in requests)
        assert waiting.first(under_way.__contains__) == min(
            may_be_placed(requests, under_way), key=lambda r: r.order, default=None
        )
    waiting.done(under_way)
    for expected in requests:
        assert waiting.first(lambda key: False) is expected
        waiting.remove(expected)
    assert waiting.first(lambda key: False) is None


def test_a_group_goes_on_to_the_block_that_all_in_it_have_and_no_further():
    waiting, requests = WaitingRequests(4), [request(0, "aab"), request(1, "aab"), request(2, "aaa")]
    for one in requests:
        waiting.add(one)
    waiting.sleep(requests[0], b"a", 1)
    assert [one.sleeps_for for one in requests] == [b"a"] * 3
    waiting.done([b"a"])
    waiting.sleep(requests[0], b"aa", 2)
    assert [one.sleeps_for for one in requests] == [b"aa"] * 3
    waiting.done([b"aa"])
    waiting.sleep(requests[0], b"aab", 3)
    assert [one.sleeps_for for one in requests] == [b"aab", b"aa", b"aa"]
    assert waiting.first(lambda key: key == b"aab") is requests[1]


def test_a_group_does_not_follow_one_that_waits_for_the_request_that_it_forks():
    waiting, requests = WaitingRequests(4), [request(0, "aa"), request(1, "aa"), request(2, "aa")]
    for one in requests:
        waiting.add(one)
    waiting.sleep(requests[0], b"a", 1)
    waiting.done([b"a"])
    waiting.sleep(requests[0], 7, 2)
    assert [one.sleeps_for for one in requests] == [7, b"a", b"a"]
    assert waiting.first(lambda key: key == 7) is requests[1]
