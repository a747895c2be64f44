"""What the benchmark of flips makes of what it saw: gaps, what ran in them, and how they are held against a spike."""

import numpy as np
import pytest
from twinmesh.engine.protocol.actions import Chunk, Decode, DecodeRow, Prefill, Scatter, StartTransfer
from twinmesh.engine.protocol.results import StepResult
from twinmesh.scripts.bench import watched_engine
from twinmesh.scripts.bench.flip import Spike, pair, summarise
from twinmesh.scripts.bench.watched_engine import Gap, Watch


def row(request, kv_len=5):
    return DecodeRow(request, 0, 0, kv_len)


@pytest.fixture
def watch(monkeypatch):
    """A watch, whose `at` lets actions be decided, and results come, at a time."""

    class At(Watch):
        now = 0.0

        def at(self, t, *actions):
            self.now = t
            self.decided(None, actions)

        def done(self, t, action):
            rows = (*getattr(action, "chunks", ()), *getattr(action, "rows", ()))
            self.received(StepResult(t, action.mesh, action.step, rows, np.zeros((1, len(rows)), np.int32)))

    made = At()
    monkeypatch.setattr(watched_engine.time, "monotonic", lambda: made.now)
    return made


def decode(mesh, step, *requests):
    return Decode(mesh, step, 8, 1, tuple(map(row, requests)))


def prefill(mesh, step, request, length, *, is_last):
    return Prefill(mesh, step, 64, (Chunk(request, 0, 1, 0, length, 0, is_last),))


def run(watch, *steps):
    """Steps that were all dispatched at 0, and the times of their results."""
    watch.at(0.0, *(action for _, action in steps))
    for t, action in steps:
        watch.done(t, action)


def test_a_gap_is_told_from_what_ran_on_its_mesh(watch):
    run(watch, (1.0, decode(0, 0, 7)), (1.5, prefill(0, 1, 8, 60, is_last=True)), (1.6, decode(0, 2, 7, 8)))
    (gap,) = watch.gaps(7, 0.0, 9.0)
    assert (gap.seconds, gap.meshes) == (pytest.approx(0.6), (0, 0))
    assert watch.causes(gap) == ["mesh 0: prefill of 60 tokens in 64, 500 ms"]
    assert [gap.begin for gap in watch.gaps(8, 0.0, 9.0)] == [1.5]  # its first token is the prompt's


def test_gaps_count_that_overlap_with_the_time(watch):
    run(watch, *((float(t), decode(0, t, 7)) for t in range(1, 6)))
    assert [gap.begin for gap in watch.gaps(7, 2.5, 3.5)] == [2.0, 3.0]


def test_a_chunk_that_is_not_the_last_gives_no_token(watch):
    run(watch, (1.0, prefill(0, 0, 7, 60, is_last=False)), (2.0, prefill(0, 1, 7, 4, is_last=True)))
    assert watch.gaps(7, 0.0, 9.0) == []


def test_a_request_that_moved_has_its_transfers_as_causes(watch):
    run(watch, (1.0, decode(0, 0, 7)))
    watch.at(1.1, StartTransfer(0, 4, 0, 0, ((1, 2, 3),), 1))
    watch.at(1.4, Scatter(0, 1, 0, ((4, 5, 6),)), decode(1, 0, 7))
    watch.done(1.5, decode(1, 0, 7))
    (gap,) = watch.gaps(7, 0.0, 9.0)
    assert watch.causes(gap) == [
        "moved from mesh 0 to mesh 1", "mesh 0: gather of 3 pages for mesh 1, 0 ms", "mesh 1: scatter of 3 pages, 0 ms",
    ]  # fmt: skip


def test_a_gap_in_which_its_mesh_did_nothing_else_has_its_own_step_and_what_ran_beside_it(watch):
    watch.at(0.0, decode(0, 0, 7), prefill(1, 0, 8, 60, is_last=True), decode(0, 1, 7))
    watch.done(1.0, decode(0, 0, 7))
    watch.done(1.2, prefill(1, 0, 8, 60, is_last=True))
    watch.done(1.3, decode(0, 1, 7))
    (gap,) = watch.gaps(7, 0.0, 9.0)
    assert watch.causes(gap) == ["its own step, 300 ms", "beside it on mesh 1: prefill of 60 tokens in 64"]


def test_gaps_at_a_flip_are_held_against_the_median_without_one(watch):
    run(watch, (1.0, decode(0, 0, 7)), (1.9, prefill(0, 1, 8, 60, is_last=True)), (2.0, decode(0, 2, 7)))
    without = Spike([0.1, 0.1, 0.1, 0.2], [1.0], [], 0.0)
    found = pair(watch, without, Spike([0.1], [1.0], [*watch.gaps(7, 0.0, 9.0), Gap(2.0, 2.1, (0, 0))], 0.5))
    assert found["longest_ratio"] == pytest.approx(10)
    assert found["longest_ratio_without"] == pytest.approx(2)
    assert [gap["seconds"] for gap in found["above"]] == [1.0]
    assert found["above"][0]["causes"] == ["mesh 0: prefill of 60 tokens in 64, 900 ms"]
    with pytest.raises(RuntimeError, match="give more --steady-tokens"):
        pair(watch, without, Spike([0.1], [1.0], [], 0.5))


def test_the_medians_of_all_runs_count():
    rows = [
        {"from": "a", "to": "b", "p99_ratio": p99, "longest_ratio": 9.0, "call_seconds": 1.0}
        | {"p99_ratio_without": 1.0, "longest_ratio_without": 2.0}
        for p99 in (1.0, 2.5, 9.0)
    ]
    found = summarise(rows, [0.1, 0.2])
    assert found["a -> b"]["p99_ratio"] == 2.5
    assert found["a -> b"]["is_met"]
    assert (found["idle_seconds"], found["idle_is_met"]) == (0.2, True)
    assert not summarise(rows[2:], [2.0])["a -> b"]["is_met"]
