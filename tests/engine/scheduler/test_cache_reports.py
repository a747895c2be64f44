"""Why prompt tokens were not cached: every reason, and that they add up; and where a conversation's next turn goes.

A prompt is written as a letter for each of its blocks, so its hashes are its beginnings: what begins alike is alike.
"""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.paging.lost_blocks import MOST, LostBlocks
from twinmesh.engine.protocol.actions import Decode, Prefill, StartTransfer
from twinmesh.engine.protocol.cache_report import Miss, MissReason, PrefixCacheReport
from twinmesh.engine.protocol.events import (
    AbortRequested,
    Arrived,
    MeshFailed,
    Outcome,
    RequestFacts,
    Resume,
    StepDone,
    TransferReady,
)
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.scheduler.cache_reports import common, end_of_run
from twinmesh.engine.scheduler.request import Request
from twinmesh.engine.scheduler.sessions import Sessions

from .test_scheduler import PAGE, make

LAST = Miss(MissReason.LAST_PAGE, 1)


def beginnings(blocks):
    return tuple(blocks[: end + 1].encode() for end in range(len(blocks)))


class Chats:
    """An engine's control plane, whose steps and transfers end at once, in the order in which they were dispatched."""

    def __init__(self, topology="both=1", pages=16, length=64, **changes):
        self.scheduler, _ = make(topology, pages=pages, length=length, **changes)
        self.lost = self.scheduler.meshes[0].shared.index.lost
        self.t, self.texts = 0.0, {}

    def arrive(self, prompt, answer="", tail=1, session="chat", hashes=None, max_tokens=None):
        """A prompt of these blocks and `tail` tokens arrives, and is answered to the end of the blocks `answer`."""
        id_, length, text = len(self.texts), PAGE * len(prompt) + tail, prompt + answer
        self.texts[id_] = text
        most = max(1, PAGE * len(text) - length + 1) if max_tokens is None else max_tokens
        hashes = beginnings(prompt) if hashes is None else hashes
        facts = RequestFacts(id_, length, most, hashes, service=Service(session=session))
        self.t += 1.0
        self.scheduler.on(Arrived(self.t, facts))
        return self.scheduler.requests[id_]

    def serve(self, *arguments, **options):
        """Serve a request alone; return what its caller is told."""
        request = self.arrive(*arguments, **options)
        self.run()
        return request.cache

    def run(self):
        while actions := self.scheduler.actions():
            self.complete(actions)

    def complete(self, actions):
        for action in actions:
            if isinstance(action, Prefill | Decode):
                rows = getattr(action, "rows", None) or [chunk for chunk in action.chunks if chunk.is_last]
                outcomes = tuple(self.outcome(row) for row in rows if self.scheduler.owner(row))
                self.scheduler.on(StepDone(self.t, action.mesh, action.step, outcomes))
            elif isinstance(action, StartTransfer):
                self.scheduler.on(TransferReady(self.t, action.transfer))

    def outcome(self, row):
        length, text = row.kv_len + 1, self.texts[row.request_id]
        fills = length % PAGE == 0 and length // PAGE <= len(text)
        return Outcome(row.request_id, False, text[: length // PAGE].encode() if fills else None)


def forget(lost):
    """Lose so many other blocks that all before are forgotten."""
    for _ in range(2):
        lost.note([b"%d" % number for number in range(MOST)], MissReason.EVICTED)


def told(cached, *missed):
    return PrefixCacheReport(cached, missed)


def test_a_first_prompt_was_never_seen_and_its_last_page_is_not_full():
    assert Chats().serve("abc", tail=2) == told(0, Miss(MissReason.NEVER_SEEN, 12), Miss(MissReason.LAST_PAGE, 2))
    assert Chats().serve("", tail=3) == told(0, Miss(MissReason.LAST_PAGE, 3))


def test_the_next_turn_finds_prompt_and_answer_and_misses_what_is_new():
    chats = Chats()
    chats.serve("ab", "cd")
    assert chats.serve("abcdef") == told(16, Miss(MissReason.NEVER_SEEN, 8), LAST)


def test_a_prompt_that_is_cached_to_its_end_computes_one_token():
    chats = Chats()
    chats.serve("ab", tail=0)
    assert chats.serve("ab", tail=0) == told(7, LAST)


@pytest.mark.parametrize("session", ["chat", None])
def test_what_was_evicted_says_when(session):
    chats = Chats(pages=7)
    chats.serve("abcd", session=session)
    chats.serve("wxyz", session=None, tail=4)  # takes the last two pages
    assert chats.t == 2.0
    report = chats.serve("abcdef", session=session)
    assert report.cached_tokens == 8
    assert report.missed == (Miss(MissReason.EVICTED, 8, at=2.0), Miss(MissReason.NEVER_SEEN, 8), LAST)


def test_what_was_evicted_longer_ago_than_is_remembered_is_known_by_its_session_alone():
    chats = Chats(pages=7)
    chats.serve("abcd")
    chats.serve("wxyz", session=None, tail=4)
    forget(chats.lost)
    assert chats.serve("abcde", tail=2).missed[:2] == (Miss(MissReason.EVICTED, 8), Miss(MissReason.NEVER_SEEN, 4))


def test_a_changed_history_names_the_first_block_that_differs():
    chats = Chats()
    chats.serve("sab", "cd")
    assert chats.serve("sabXde") == told(
        12, Miss(MissReason.DIFFERS, 12, block=3, earlier_blocks=5), LAST
    )  # fmt: skip
    assert chats.serve("Tab") == told(0, Miss(MissReason.DIFFERS, 12, block=0, earlier_blocks=6), LAST)


def test_without_a_session_a_changed_prompt_was_never_seen():
    chats = Chats()
    chats.serve("sab", session=None)
    assert chats.serve("Tab", session=None) == told(0, Miss(MissReason.NEVER_SEEN, 12), LAST)


def test_an_answer_that_is_cached_on_the_decode_mesh_is_on_another_mesh():
    chats = Chats("prefill=1,decode=1")
    chats.serve("ab", "cd")
    assert chats.serve("abcde") == told(
        8, Miss(MissReason.OTHER_MESH, 8, mesh=1), Miss(MissReason.NEVER_SEEN, 4), LAST
    )  # fmt: skip


def test_what_does_not_let_tokens_be_reused_is_named():
    chats = Chats(prefix_cache=False)
    (miss,) = chats.serve("ab").missed
    assert (miss.reason, miss.tokens, miss.because) == (MissReason.NOT_REUSABLE, 9, "prefix_cache=False")
    (miss,) = Chats().serve("ab", hashes=()).missed
    assert (miss.reason, miss.tokens) == (MissReason.NOT_REUSABLE, 9)
    assert "prompt_logprobs" in miss.because


def test_in_deterministic_mode_an_answer_is_not_reusable():
    chats = Chats(deterministic=True, prefill_buckets=(8,))
    chats.serve("ab", "cd")
    cached, (answer, new, last) = 8, chats.serve("abcde").missed
    assert chats.scheduler.counters.cached_tokens == cached
    assert (answer.reason, answer.tokens) == (MissReason.NOT_REUSABLE, 8)
    assert "deterministic" in answer.because
    assert (new, last) == (Miss(MissReason.NEVER_SEEN, 4), LAST)


def test_changed_weights_and_a_lost_mesh_say_when():
    chats = Chats()
    chats.serve("ab")
    chats.t = 5.0
    chats.scheduler.on(Resume(5.0))
    assert chats.serve("abc") == told(
        0, Miss(MissReason.WEIGHTS_CHANGED, 8, at=5.0), Miss(MissReason.NEVER_SEEN, 4), LAST
    )  # fmt: skip
    chats.scheduler.on(MeshFailed(7.0, 0, "boom"))
    assert chats.serve("abc") == told(0, Miss(MissReason.MESH_LOST, 12, at=7.0), LAST)


def test_a_session_knows_of_changed_weights_when_the_blocks_are_forgotten():
    chats = Chats()
    chats.serve("ab")
    chats.scheduler.on(Resume(5.0))
    forget(chats.lost)
    assert chats.serve("ab") == told(0, Miss(MissReason.WEIGHTS_CHANGED, 8, at=5.0), LAST)


def test_a_turn_that_computes_all_for_prompt_logprobs_leaves_what_its_session_remembers():
    chats = Chats()
    chats.serve("ab")
    chats.serve("ab", hashes=())
    assert chats.serve("aX").missed[0] == Miss(MissReason.DIFFERS, 4, block=1, earlier_blocks=2)


def test_completions_of_one_prompt_miss_one_token_each():
    scheduler, _ = make("both=1")
    chats = Chats()
    chats.scheduler = scheduler
    chats.texts = {0: "ab", 1: "ab"}
    for id_ in (0, 1):
        scheduler.on(Arrived(0.0, RequestFacts(id_, 9, 2, beginnings("ab"), 0 if id_ else None)))
    fork = scheduler.requests[1]
    chats.run()
    assert fork.cache == told(8, LAST)


def test_reasons_are_counted():
    chats = Chats()
    chats.serve("ab")
    chats.serve("aX")
    counters = chats.scheduler.counters
    assert {reason: count for reason, count in counters.missed_tokens.items() if count} == {
        "never seen": 8, "differs": 4, "last page": 2,
    }  # fmt: skip
    assert counters.missed_requests["last page"] == 2
    assert counters.missed_requests["differs"] == 1
    assert counters.missed_requests["evicted"] == 0


def test_a_report_reads_as_a_line():
    chats = Chats()
    chats.serve("sab", "cd")
    assert str(chats.serve("sabXde")) == "12 cached; 12 differs in block 3 of 5; 1 last page"
    assert str(Miss(MissReason.DIFFERS, 9, token=13, block=3, earlier_blocks=5)) == (
        "9 differs from token 13 on, in block 3 of 5"
    )
    assert str(Miss(MissReason.EVICTED, 9, at=12.3456)) == "9 evicted at 12.346 s"
    assert str(Miss(MissReason.OTHER_MESH, 9, mesh=2)) == "9 other mesh 2"


# ---- where it goes


@pytest.mark.parametrize(("topology", "mesh"), [("both=3", 1), ("both=12", 10), ("both=40", 39)])
def test_a_second_turn_goes_to_its_mesh_where_load_is_equal(topology, mesh):
    chats = Chats(topology)
    for _ in range(mesh):
        chats.arrive("x", session=None, max_tokens=20)
        chats.scheduler.actions()
    first = chats.arrive("", session="chat", max_tokens=2)  # too short to be found again
    chats.scheduler.actions()
    assert first.placement.mesh == mesh
    for request in list(chats.scheduler.requests):
        chats.scheduler.on(AbortRequested(chats.t, request))
    second = chats.arrive("", tail=2, session="chat", max_tokens=2)
    other = chats.arrive("", tail=2, session="other", max_tokens=2)
    chats.scheduler.actions()
    assert second.placement.mesh == mesh
    assert other.placement.mesh == 0


def test_one_session_does_not_pile_everything_on_its_mesh():
    chats = Chats("both=12", pages=2000, length=256, slots=24)
    chats.serve("s", "a")
    placed = []
    for _ in range(24):
        placed.append(chats.arrive("s", max_tokens=200))
        while not placed[-1].confirmed:
            chats.complete(chats.scheduler.actions())
    assert max(Counter(request.placement.mesh for request in placed).values()) <= 3


# ---- bounds


def test_sessions_used_least_recently_are_forgotten_beyond_either_bound():
    for bounds in ({"most_sessions": 3}, {"most_blocks": 9}):
        sessions = Sessions(LostBlocks(), **bounds)
        requests = {name: ended(name, "abc") for name in "pqrst"}
        for name in "pqr":
            sessions.end(requests[name], PAGE)
        assert sessions.of(requests["p"]).blocks == 3
        sessions.end(requests["s"], PAGE)
        assert [name for name in "pqrst" if sessions.of(requests[name])] == ["p", "r", "s"]
        sessions.end(requests["s"], PAGE)
        sessions.check()
        assert (len(sessions), sessions.blocks) == (3, 9)


def ended(session, blocks):
    facts = RequestFacts(0, PAGE * len(blocks), 1, beginnings(blocks), service=Service(session=session))
    request = Request(facts, 0, None, hashes=list(beginnings(blocks)))
    request.state, request.prefilled = "prefill", request.prompt_len
    return request


def test_of_lost_blocks_the_last_are_known():
    lost = LostBlocks(most=4)
    for number in range(20):
        lost.now = float(number)
        lost.note([b"%d" % number], MissReason.EVICTED)
        assert len(lost) <= 8
        known = [i for i in range(number + 1) if lost.find(b"%d" % i)]
        assert known[-4:] == list(range(max(0, number - 3), number + 1))
        assert all(lost.find(b"%d" % i).at == i for i in known)
    lost.note([b"%d" % number for number in range(100, 200)], MissReason.MESH_LOST)
    assert len(lost) <= 8


# ---- everything adds up


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_the_end_of_a_run_is_found(start, more, within):
    stop, end = start + more, start + min(within, more)
    assert end_of_run(start, stop, lambda i: i < end) == end


@given(st.text("ab", max_size=9), st.text("ab", max_size=9), st.integers(0, 9))
def test_what_two_sequences_have_in_common_is_counted(first, second, most):
    alike = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    assert common(beginnings(first), beginnings(second), most) == min(alike, most)


TURNS = st.lists(
    st.one_of(
        st.tuples(
            st.text("ab", max_size=7), st.text("ab", max_size=3), st.integers(0, 3), st.sampled_from(["s", "t", None]),
            st.booleans(),
        ),
        st.sampled_from(["resume", "lose"]),
    ),
    max_size=25,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    TURNS,
    st.sampled_from(["both=1", "both=3", "prefill=1,decode=1", "both=9"]),
    st.sampled_from([(None,), (None, 6), (3,)]),
    st.integers(13, 20),
    st.sampled_from([{}, {"deterministic": True, "prefill_buckets": (8,)}, {"prefix_cache": False}]),
)
def test_cached_and_missed_tokens_are_the_prompts(turns, topology, windows, pages, mode):
    chats, tokens, reports = Chats(topology, pages, windows=windows, **mode), 0, []
    for turn in turns:
        if turn == "resume":
            chats.scheduler.on(Resume(chats.t))
        elif turn == "lose":
            chats.scheduler.on(MeshFailed(chats.t, 0, "boom"))
        else:
            prompt, answer, tail, session, hashed = turn
            tail += not prompt
            reports.append(chats.serve(prompt, answer, tail, session, None if hashed else ()))
            tokens += PAGE * len(prompt) + tail
            assert reports[-1].cached_tokens + sum(miss.tokens for miss in reports[-1].missed) == (
                PAGE * len(prompt) + tail
            )
            assert all(miss.tokens > 0 for miss in reports[-1].missed)
            assert all(miss.at is None or miss.at <= chats.t for miss in reports[-1].missed)
    counters = chats.scheduler.counters
    assert counters.cached_tokens + sum(counters.missed_tokens.values()) == counters.prompt_tokens == tokens
    for reason in MissReason:
        assert counters.missed_requests[reason] == sum(
            any(miss.reason is reason for miss in report.missed) for report in reports
        )
    chats.scheduler.check_integrity()
