"""Batch work beside interactive work: one chunk in flight, answers within their share, and else no change."""

import pytest
from twinmesh.engine.protocol.actions import Decode, Fused, Prefill
from twinmesh.engine.protocol.events import ServiceChanged
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.scheduler.batch_allowance import SHARE
from twinmesh.engine.scheduler.interactive import EXPECTED
from twinmesh.engine.scheduler.request import State

from .test_scheduler import arrive as arrive_as
from .test_scheduler import make, only, step

CHUNK, ROW = 1.0, 0.1  # seconds of a full chunk and of a decode step


def arrive(scheduler, device, name, prompt_len=8, max_tokens=4, t=0.0):
    """A request arrives, a batch one if its name begins with b."""
    return arrive_as(scheduler, device, name, prompt_len, max_tokens, t, is_batch=name[0] == "b")


def beside(topology="both=1", **changes):
    return make(topology, **{"pages": 64, "slots": 8, "length": 64, "prefill_rows": 1} | changes)


def ids(action):
    return [row.request_id for row in (*getattr(action, "chunks", ()), *getattr(action, "rows", ()))]


def run(scheduler, device, t, seconds, *, until=1000):
    """Let mesh 0 run, each step as long as `seconds` of it says; yield the actions as they end, and the time."""
    for _ in range(until):
        step(scheduler, device)
        if not device.steps[0]:
            return
        action = device.steps[0][0]
        t += seconds(action)
        device.complete_step(0, t)
        yield action, t


def seconds_of(action):
    chunk = CHUNK * sum(c.length for c in getattr(action, "chunks", ())) / 8
    return chunk + ROW * bool(getattr(action, "rows", ()))


# ---- prompts


def test_with_an_interactive_request_about_one_batch_chunk_is_in_flight():
    scheduler, device = beside("prefill=1,decode=1")
    arrive(scheduler, device, "i", max_tokens=1)
    for name in ("b1", "b2"):
        arrive(scheduler, device, name)
    assert [ids(action) for action in only(step(scheduler, device), Prefill)] == [["i"], ["b1"]]
    device.complete_step(0, 1.0)
    assert not only(step(scheduler, device), Prefill)  # b1 is in flight
    device.complete_step(0, 2.0)
    assert [ids(action) for action in only(step(scheduler, device), Prefill)] == [["b2"]]


def test_a_prompt_that_arrives_waits_for_one_batch_chunk():
    scheduler, device = beside("prefill=1,decode=1")
    arrive(scheduler, device, "i", max_tokens=1)
    arrive(scheduler, device, "b1", prompt_len=40)
    step(scheduler, device)
    device.complete_step(0, 1.0)
    assert not scheduler.requests.get("i")
    step(scheduler, device)  # a chunk of b1 is in flight, and no other
    arrive(scheduler, device, "i2")
    assert [ids(action) for action in only(step(scheduler, device), Prefill)] == [["i2"]]


def test_without_interactive_requests_batch_runs_ahead_as_always():
    scheduler, device = beside("prefill=1,decode=1")
    for name in ("b1", "b2", "b3"):
        arrive(scheduler, device, name)
    assert [ids(action) for action in only(step(scheduler, device), Prefill)] == [["b1"], ["b2"]]


def test_a_minute_after_the_last_interactive_request_batch_runs_ahead_again():
    scheduler, device = beside("prefill=1,decode=1")
    arrive(scheduler, device, "i", max_tokens=1)
    arrive(scheduler, device, "b0")
    step(scheduler, device)
    device.complete_step(0, 1.0)  # i ends
    device.complete_step(0, 2.0)
    for name in ("b1", "b2", "b3"):
        arrive(scheduler, device, name, t=EXPECTED)
    assert len(only(step(scheduler, device), Prefill)) == 1
    device.complete_step(0, EXPECTED + 1.0)
    assert [ids(action) for action in only(step(scheduler, device), Prefill)] == [["b2"], ["b3"]]


def test_batch_prompts_fill_the_padding_of_an_interactive_one_and_no_more():
    scheduler, device = beside("both=1", prefill_buckets=(4, 8, 16), prefill_rows=3)
    arrive(scheduler, device, "b1", prompt_len=20)
    arrive(scheduler, device, "i", prompt_len=6)
    (prefill, *_) = only(step(scheduler, device), Prefill)
    assert [(chunk.request_id, chunk.length) for chunk in prefill.chunks] == [("i", 6), ("b1", 2)]


def test_no_batch_chunk_or_row_enters_beside_an_interactive_prompt():
    scheduler, device = beside("both=1")
    arrive(scheduler, device, "b1", max_tokens=20)
    arrive(scheduler, device, "b2", prompt_len=40)
    done = run(scheduler, device, 0.0, seconds_of)
    next(action for action, _ in done if isinstance(action, Decode))
    arrive(scheduler, device, "i", prompt_len=24)
    began = []
    for action, _ in done:
        began.append(action)
        if "i" in ids(action) and action.chunks[0].is_last:
            break
    own = next(index for index, action in enumerate(began) if "i" in ids(action))
    assert own <= 2  # what was in flight comes first
    assert [ids(action) for action in began[own:]] == [["i"]] * 3


@pytest.mark.parametrize("topology", ["both=1", "both=2", "prefill=1,decode=1", "both(mode=fused)=1"])
@pytest.mark.parametrize("mode", [{}, {"deterministic": True, "prefill_buckets": (8,)}])
def test_all_batch_work_is_done_once_interactive_work_leaves_room(topology, mode):
    if mode and "fused" in topology:
        mode = {}
    scheduler, device = beside(topology, **mode)
    for index in range(12):
        arrive(scheduler, device, f"b{index}", prompt_len=5 + 3 * index, max_tokens=6)
        arrive(scheduler, device, f"i{index}", prompt_len=4 + 3 * index, max_tokens=5)
    device.drain(1.0)
    assert set(device.finished.values()) == {"length"}
    assert len(device.finished) == 24
    scheduler.check_integrity()


# ---- answers


def interactive_gaps(topology, *, batch, prompt_len=32, tokens=50, row=lambda action: ROW, **changes):
    """The time that an answer takes, and what batch requests got meanwhile: prompt tokens and generated ones."""
    scheduler, device = beside(topology, length=128, pages=300, **changes)
    for index in range(batch):
        arrive(scheduler, device, f"b{index}", prompt_len=prompt_len, max_tokens=90)
    *_, (_, t) = run(scheduler, device, 0.0, seconds_of, until=15) if batch else [(None, 0.0)]
    request = arrive(scheduler, device, "i", max_tokens=tokens, t=t)
    got = [0, 0]

    def seconds(action):
        chunk = CHUNK * sum(c.length for c in getattr(action, "chunks", ())) / 8
        return chunk + (row(action) if getattr(action, "rows", ()) else 0.0)

    for action, _ in run(scheduler, device, t, seconds):
        if request.confirmed:
            got[0] += sum(c.length for c in getattr(action, "chunks", ()))
            got[1] += sum(r.request_id != "i" for r in getattr(action, "rows", ()))
        if request.state is State.FINISHED:
            break
    return request.timeline.tpot, got


@pytest.mark.parametrize("topology", ["both=1", "both(mode=fused)=1"])
def test_batch_chunks_take_their_share_of_an_answers_time_and_no_more(topology):
    alone, _ = interactive_gaps(topology, batch=0)
    beside, (prompt_tokens, _) = interactive_gaps(topology, batch=20)
    assert prompt_tokens > 0
    assert beside <= alone * (1 + SHARE) + CHUNK / 49


def test_batch_rows_that_cost_nothing_go_along():
    alone, _ = interactive_gaps("both=1", batch=0, decode_buckets=(4, 8))
    beside, (_, generated) = interactive_gaps("both=1", batch=3, prompt_len=4, decode_buckets=(4, 8))
    assert generated >= 140
    assert beside <= alone * (1 + SHARE) + CHUNK / 49


def test_batch_rows_that_cost_much_go_along_now_and_then():
    def row(action):
        return ROW * (4 if len(action.rows) > 1 else 1)

    alone, _ = interactive_gaps("both=1", batch=0, decode_buckets=(1, 8), row=row)
    beside, (_, generated) = interactive_gaps("both=1", batch=7, prompt_len=4, decode_buckets=(1, 8), row=row)
    assert generated > 0
    assert beside <= alone * (1 + SHARE) + 2 * CHUNK / 49


def test_batch_rows_have_all_steps_where_no_answer_is_given():
    scheduler, device = beside("prefill=1,decode=1")
    arrive(scheduler, device, "i", max_tokens=1)
    for index in range(4):
        arrive(scheduler, device, f"b{index}", max_tokens=9)
    device.drain(1.0)
    assert len(device.finished) == 5


# ---- another service


def test_a_waiting_batch_request_that_becomes_interactive_takes_the_place_of_another():
    scheduler, device = beside(slots=1)
    for name in ("b1", "b2", "b3"):
        arrive(scheduler, device, name)
    step(scheduler, device)
    scheduler.on(ServiceChanged(1.0, "b3", Service()))
    assert not scheduler.requests["b3"].is_batch
    device.drain(2.0)
    assert list(device.finished) == ["b3", "b1", "b2"]
    scheduler.check_integrity()


@pytest.mark.parametrize("topology", ["both=1", "prefill=1,decode=1"])
def test_one_that_runs_starts_over_with_its_tokens_and_keeps_them(topology):
    scheduler, device = beside(topology)
    request = arrive(scheduler, device, "b1", max_tokens=6)
    for _ in run(scheduler, device, 0.0, seconds_of, until=2):
        pass
    known = request.confirmed
    assert known
    scheduler.on(ServiceChanged(5.0, "b1", Service()))
    assert request.state is State.WAITING
    device.drain(6.0)
    assert device.outputs["b1"] == list(range(6))
    assert device.finished == {"b1": "length"}
    assert not scheduler.meshes[0].batch
    assert scheduler.meshes[0].shared.interactive.count == 0


@pytest.mark.parametrize("is_batch", [True, False])
def test_completions_of_one_prompt_are_served_otherwise_together(is_batch):
    scheduler, device = beside(slots=1)
    for name, fork_of in (("x1", None), ("x2", "x1"), ("x3", "x1")):
        arrive_as(scheduler, device, name, 8, 4, 0.0, "x", fork_of, is_batch=not is_batch)
    step(scheduler, device)
    scheduler.on(ServiceChanged(1.0, "x2", Service(is_batch=is_batch)))
    assert [scheduler.requests[name].is_batch for name in ("x1", "x2", "x3")] == [not is_batch] * 3
    scheduler.on(ServiceChanged(1.0, "x1", Service(is_batch=is_batch)))
    assert [scheduler.requests[name].is_batch for name in ("x1", "x2", "x3")] == [is_batch] * 3
    orders = [scheduler.requests[name].order for name in ("x1", "x2", "x3")]
    assert orders == sorted(orders)
    device.drain(2.0)
    assert len(device.finished) == 3


def test_the_load_of_batch_prompts_sends_no_interactive_prompt_elsewhere():
    scheduler, device = beside("both=2")
    arrive(scheduler, device, "i1", prompt_len=8)
    for index in range(4):
        arrive(scheduler, device, f"b{index}", prompt_len=40)
    step(scheduler, device)
    mine = scheduler.requests["i1"].placement.mesh
    other = arrive(scheduler, device, "i2", prompt_len=8)
    step(scheduler, device)
    assert other.placement.mesh != mine


def test_steps_of_batch_work_alone_do_not_count_against_the_next_answer():
    scheduler, device = beside("both(mode=fused)=1")
    for index in range(4):
        arrive(scheduler, device, f"b{index}", prompt_len=40)
    for _ in run(scheduler, device, 0.0, seconds_of, until=5):
        pass
    arrive(scheduler, device, "i", t=50.0)
    actions = [action for action, _ in run(scheduler, device, 50.0, seconds_of) if "i" in ids(action)]
    assert isinstance(actions[0], Prefill | Fused)
