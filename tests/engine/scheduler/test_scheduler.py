"""The scheduler on a fake device: order, hand-off, sharing, preemption, aborts, lost meshes; and a state machine."""

import pytest
from helpers.fake_device import FakeDevice, block_hashes
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.protocol.actions import AssignPages, Decode, Finish, Fused, Prefill, Scatter, StartTransfer
from twinmesh.engine.protocol.events import (
    AbortRequested,
    Arrived,
    Hold,
    MeshFailed,
    MigrateRequested,
    PreemptRequested,
    RequestFacts,
    Resume,
    TransferFailed,
)
from twinmesh.engine.protocol.service import Service
from twinmesh.engine.scheduler.mesh_state import MAX_STEPS_IN_FLIGHT
from twinmesh.engine.scheduler.policy import FCFS, ShortestPromptFirst
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.topology import Topology

PAGE = 4


def make(
    topology="prefill=1,decode=1", pages=16, slots=4, length=32, windows=(None,), spare=None, policy=FCFS, **changes
):
    """An engine's control plane on a fake device; `pages` in the pool of every group, or of a windowed one what a
    request needs and `spare` more."""
    config = EngineConfig(
        topology=Topology.parse(topology),
        max_model_len=length,
        page_size=PAGE,
        max_num_seqs=slots,
        **{"prefill_buckets": (4, 8), "prefill_rows": 3, "decode_buckets": (slots,), "windows": windows} | changes,
    )
    caps = [config.pages_to_send(window) for window in windows]
    counts = [pages if window is None or spare is None else config.most_pages(window) + spare for window in windows]
    pool = PoolSize(tuple(counts), (1,) * len(windows), sum(caps))
    scheduler = Scheduler(config, [pool] * len(config.topology.meshes), policy)
    return scheduler, FakeDevice(scheduler, {})


def arrive(
    scheduler,
    device,
    name,
    prompt_len=6,
    max_tokens=4,
    t=0.0,
    prompt=None,
    fork_of=None,
    *,
    constrained=False,
    **service,
):
    """A request arrives, to be served in this way; those with the same `prompt` share it as far as both go."""
    device.prompts[name] = (prompt or name, prompt_len)
    hashes = block_hashes(prompt or name, prompt_len, PAGE)
    facts = RequestFacts(name, prompt_len, max_tokens, hashes, fork_of, Service(**service), constrained)
    scheduler.on(Arrived(t, facts))
    return scheduler.requests[name]


def kinds(actions):
    """What is done, page tables aside."""
    return [type(action) for action in actions if not isinstance(action, AssignPages)]


def only(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


def step(scheduler, device):
    actions = scheduler.actions()
    device.perform(actions)
    return actions


def test_a_request_goes_through_prefill_handoff_and_decode():
    scheduler, device = make()
    request = arrive(scheduler, device, "a")
    step(scheduler, device)
    assert request.state is State.HANDOFF
    device.complete_step(0, 1.0)
    device.complete_transfer(0, 2.0)
    assert request.state is State.DECODE
    device.drain(3.0)
    assert device.finished == {"a": "length"}
    assert request.timeline.first_token == 1.0
    assert request.timeline.kv_ready == 2.0
    assert request.timeline.finish == 3.0
    assert len(request.timeline.tokens) == 4


def test_scatter_waits_for_the_transfer_and_for_the_first_token():
    scheduler, device = make()
    arrive(scheduler, device, "a")
    assert StartTransfer in kinds(step(scheduler, device))
    device.complete_transfer(0, 1.0)
    assert not step(scheduler, device)
    device.complete_step(0, 2.0)
    assert kinds(step(scheduler, device)) == [Scatter, Decode, Decode]


def test_decode_steps_are_dispatched_ahead_of_results_but_never_past_max_tokens():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", prompt_len=4, max_tokens=2)
    actions = step(scheduler, device)
    assert kinds(actions) == [Prefill, Decode]
    device.complete_step(0, 1.0)
    assert not step(scheduler, device)


def test_no_more_steps_are_in_flight_than_allowed():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", prompt_len=4, max_tokens=20)
    step(scheduler, device)
    assert len(device.steps[0]) == MAX_STEPS_IN_FLIGHT


def test_prefill_goes_on_without_decode_pages_and_the_first_token_is_not_delayed():
    scheduler, device = make(pages=8)
    first = arrive(scheduler, device, "a", prompt_len=24, max_tokens=4)  # takes 6 of 8 decode pages
    step(scheduler, device)
    while first.state is not State.DECODE:
        device.complete_step(0, 1.0)
        device.perform(scheduler.actions())
        while device.transfers:
            device.complete_transfer(0, 1.0)
        device.perform(scheduler.actions())
    second = arrive(scheduler, device, "b", prompt_len=16, max_tokens=4)
    for _ in range(2):
        step(scheduler, device)
        device.complete_step(0, 2.0)
    assert second.handoff is None
    assert second.confirmed == 1
    device.drain(3.0)
    assert device.finished == {"a": "length", "b": "length"}


def test_a_gather_does_not_queue_behind_the_next_prompts_prefill():
    scheduler, device = make(pages=32)
    for name in "ab":
        arrive(scheduler, device, name, prompt_len=8)
    order = [kind for kind in kinds(step(scheduler, device)) if kind in (Prefill, StartTransfer)]
    assert order == [Prefill, StartTransfer, Prefill, StartTransfer]


def test_a_token_that_stops_the_request_on_the_prefill_mesh_cancels_its_transfer():
    scheduler, device = make()
    arrive(scheduler, device, "a")
    step(scheduler, device)
    device.complete_step(0, 1.0, stops=lambda request: True)
    assert only(step(scheduler, device), Finish)[0].reason == "stop"
    assert not device.staged
    device.complete_transfer(0, 2.0)
    assert not step(scheduler, device)


def test_a_one_token_request_needs_no_transfer():
    scheduler, device = make()
    arrive(scheduler, device, "a", max_tokens=1)
    assert StartTransfer not in kinds(step(scheduler, device))
    device.drain(1.0)
    assert device.finished == {"a": "length"}


def test_a_late_result_does_not_reach_the_slots_next_holder():
    scheduler, device = make("both=1", slots=1)
    arrive(scheduler, device, "a", prompt_len=4, max_tokens=9)
    step(scheduler, device)
    device.complete_step(0, 1.0)
    step(scheduler, device)  # two decode steps of "a" in flight
    device.complete_step(0, 2.0, stops=lambda request: True)
    second = arrive(scheduler, device, "b", prompt_len=4, max_tokens=9)
    step(scheduler, device)
    assert second.placement.slot == 0
    device.complete_step(0, 3.0, stops=lambda request: True)  # the late step of "a"
    assert second.state is State.DECODE
    assert second.confirmed == 0
    device.drain(4.0)
    assert device.finished == {"a": "stop", "b": "length"}


def test_both_alternates_prefill_and_decode():
    scheduler, device = make("both=1", pages=32)
    arrive(scheduler, device, "a", prompt_len=4, max_tokens=9)
    step(scheduler, device)
    arrive(scheduler, device, "b", prompt_len=24, max_tokens=4)
    order = []
    for t in range(6):
        device.complete_step(0, t)
        order += kinds(step(scheduler, device))
    assert [kind for kind in order if kind in (Prefill, Decode)][:4] == [Prefill, Decode, Prefill, Decode]


def test_short_prompts_share_a_step_and_a_long_one_is_chunked():
    scheduler, device = make(pages=32)
    for name, length in (("a", 2), ("b", 3), ("c", 20)):
        arrive(scheduler, device, name, prompt_len=length)
    first = only(step(scheduler, device), Prefill)[0]
    assert [(chunk.request_id, chunk.start, chunk.length) for chunk in first.chunks] == [
        ("a", 0, 2), ("b", 0, 3), ("c", 0, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("topology", ["prefill=2,decode=1", "prefill=1,decode=2", "both=2"])
def test_several_meshes_of_a_role_share_the_work(topology):
    scheduler, device = make(topology)
    for index in range(6):
        arrive(scheduler, device, f"r{index}", prompt_len=8, max_tokens=8)
    seen = set()
    for t in range(200):
        seen |= {action.mesh for action in step(scheduler, device) if isinstance(action, Prefill | Decode)}
        for mesh, steps in enumerate(device.steps):
            if steps:
                device.complete_step(mesh, t)
        if device.transfers:
            device.complete_transfer(0, t)
    assert seen == set(range(len(scheduler.meshes)))
    assert len(device.finished) == 6


@pytest.mark.parametrize(("topology", "meshes"), [("both=2", 2), ("prefill=2,decode=1", 2)])
def test_a_prompt_goes_where_none_is_being_prefilled_or_else_where_fewer_requests_are(topology, meshes):
    scheduler, device = make(topology, pages=32, handoff_factor=2)
    first = arrive(scheduler, device, "a", prompt_len=8)
    step(scheduler, device)  # all of it is dispatched, none is answered
    second = arrive(scheduler, device, "b", prompt_len=4)
    mesh = [chunk.mesh for chunk in only(step(scheduler, device), Prefill)]
    assert first.timeline.prefill_start is not None
    assert second.timeline.prefill_start is not None
    assert mesh == [1]
    for t in range(12):  # spaced arrivals, each answered before the next
        for index, steps in enumerate(device.steps):
            if steps:
                device.complete_step(index, t)
        step(scheduler, device)
    both = topology.startswith("both")
    third = arrive(scheduler, device, "c", prompt_len=8, max_tokens=20)
    fourth = arrive(scheduler, device, "d", prompt_len=8, max_tokens=20)
    actions = only(step(scheduler, device), Prefill)
    assert {action.mesh for action in actions} == {0, 1}
    assert (third.placement is not None) == (fourth.placement is not None) == both


def test_requests_of_a_lost_mesh_start_again_and_others_go_on():
    scheduler, device = make("both=2")
    lost, kept = arrive(scheduler, device, "a"), arrive(scheduler, device, "b")
    step(scheduler, device)
    mesh = lost.placement.mesh
    assert kept.placement.mesh != mesh
    device.lose(mesh)
    scheduler.on(MeshFailed(1.0, mesh, "boom"))
    assert (lost.state, lost.restarts, kept.restarts) == (State.WAITING, 1, 0)
    step(scheduler, device)
    assert lost.placement.mesh != mesh, "it goes where it was not lost"
    device.drain(2.0)
    assert device.finished == {"a": "length", "b": "length"}


def test_a_request_that_loses_its_mesh_again_and_again_fails_with_the_cause():
    scheduler, device = make("both=1", max_retries=2)
    arrive(scheduler, device, "a")
    for t in range(3):
        step(scheduler, device)
        device.lose(0)
        scheduler.on(MeshFailed(t, 0, "boom"))
    finish = only(step(scheduler, device), Finish)[0]
    assert (finish.reason, finish.error) == ("error", "boom (after 3 tries)")


def test_a_failed_transfer_starts_its_request_again_and_no_other():
    scheduler, device = make()
    first, second = arrive(scheduler, device, "a"), arrive(scheduler, device, "b")
    step(scheduler, device)
    device.complete_step(0, 1.0)
    scheduler.on(TransferFailed(1.0, device.transfers.pop(0), "boom"))
    device.drain(2.0)
    assert device.finished == {"a": "length", "b": "length"}
    assert (first.restarts, second.restarts) == (1, 0)


def test_credit_on_a_mesh_that_is_lost_is_taken_back_and_asked_for_again():
    scheduler, device = make(length=64, pages=32, prefill_buckets=(8,))
    request = arrive(scheduler, device, "a", prompt_len=40)
    step(scheduler, device)
    assert request.handoff is not None
    device.lose(1)
    scheduler.on(MeshFailed(1.0, 1, "boom"))
    assert (request.handoff, request.state, request.restarts) == (None, State.PREFILL, 0)
    device.drain(2.0)
    assert device.finished == {"a": "length"}


def test_identical_prompts_that_arrive_together_are_computed_once():
    scheduler, device = make("both=1", pages=32)
    for name in "abc":
        arrive(scheduler, device, name, prompt_len=20, prompt="p")
    device.drain(1.0)
    assert device.computed == 20 + 1 + 1
    assert scheduler.counters.cached_tokens == 19 + 19


@pytest.mark.parametrize(("first", "second", "computed"), [(8, 8, 1), (8, 11, 3), (7, 7, 3), (8, 7, 3), (3, 3, 3)])
def test_a_prompt_reuses_the_full_pages_of_an_earlier_one(first, second, computed):
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", prompt_len=first, prompt="p")
    device.drain(1.0)
    before = device.computed
    arrive(scheduler, device, "b", prompt_len=second, prompt="p")
    device.drain(2.0)
    assert device.computed - before == computed


def test_pages_filled_by_decoding_are_reused_unless_deterministic():
    for deterministic, computed in ((False, 1), (True, 4)):
        scheduler, device = make("both=1", deterministic=deterministic, prefill_buckets=(8,))
        first = arrive(scheduler, device, "a", prompt_len=4, max_tokens=9)
        device.drain(1.0)
        hashes = [*first.facts.block_hashes, b"a:8", b"a:12"]
        device.prompts["b"] = ("a", 4)  # its tokens 4 to 11 are what "a" generated
        scheduler.on(Arrived(2.0, RequestFacts("b", 12, 1, tuple(hashes))))
        action = only(scheduler.actions(), Prefill)[0]
        assert sum(chunk.length for chunk in action.chunks) == computed


def test_a_second_copy_of_a_block_is_found_when_the_first_was_evicted():
    pages, hashes = make("both=1", pages=6)[0].meshes[0].pages, block_hashes("p", 8, PAGE)
    (first, _), (second, _) = (pages.place_prompt(name, hashes, 8, 0) for name in "ab")  # both compute it
    pages.remember(first, hashes, 8)
    pages.remember(second, hashes, 8)
    pages.release(first)
    pages.place_prompt("c", block_hashes("q", 12, PAGE), 12, 0)  # evicts the first one's last page
    assert pages.hit(hashes, 9) == 4
    pages.remember(second, hashes, 8)
    assert pages.hit(hashes, 9) == 8


def test_a_prompt_without_room_is_asked_again_when_its_blocks_arrive_with_another():
    scheduler, device = make("both=2", pages=8)
    arrive(scheduler, device, "moves", prompt_len=12, max_tokens=8, prompt="p")
    step(scheduler, device)
    device.complete_step(0, 1.0)
    step(scheduler, device)
    scheduler.on(MigrateRequested(2.0, "moves", 1))
    arrive(scheduler, device, "fills mesh 0", prompt_len=28, prompt="q")
    waiting = arrive(scheduler, device, "waits", prompt_len=13, prompt="p")
    step(scheduler, device)
    assert waiting.state is State.WAITING
    while device.steps[0]:
        device.complete_step(0, 3.0)
    device.complete_transfer(0, 4.0)
    step(scheduler, device)
    assert waiting.placement is not None
    assert waiting.placement.mesh == 1
    assert waiting.cache.cached_tokens == 12


def test_a_prompt_without_room_sleeps_when_an_earlier_one_begins_to_compute_its_next_block():
    scheduler, device = make("both=1", pages=6, policy=ShortestPromptFirst())
    arrive(scheduler, device, "runs", prompt_len=12, max_tokens=8)
    waiting = arrive(scheduler, device, "waits", prompt_len=16, prompt="p")
    step(scheduler, device)
    assert waiting.sleeps_for is None
    arrive(scheduler, device, "computes", prompt_len=8, prompt="p")
    step(scheduler, device)
    assert waiting.sleeps_for == waiting.hashes[0]


def test_one_without_credit_sleeps_when_an_earlier_one_begins_to_send_its_next_block():
    scheduler, device = make(pages=6, policy=ShortestPromptFirst())
    arrive(scheduler, device, "runs", prompt_len=12, max_tokens=8)
    step(scheduler, device)
    device.complete_step(0, 1.0)
    step(scheduler, device)
    device.complete_transfer(0, 2.0)
    waiting = arrive(scheduler, device, "waits", prompt_len=12, prompt="p")
    while not waiting.confirmed:
        step(scheduler, device)
        device.complete_step(0, 3.0)
    assert waiting.state is State.HANDOFF
    assert waiting.handoff is waiting.sleeps_for is None
    sent = arrive(scheduler, device, "is sent", prompt_len=4, prompt="p")
    step(scheduler, device)
    assert sent.handoff is not None
    assert waiting.sleeps_for == waiting.hashes[0]


def test_without_the_prefix_cache_everything_is_computed():
    scheduler, device = make("both=1", prefix_cache=False)
    for name in "ab":
        arrive(scheduler, device, name, prompt_len=8, prompt="p")
    device.drain(1.0)
    assert device.computed == 16


def test_a_prompt_waits_for_what_another_is_computing_and_takes_over_if_that_is_aborted():
    scheduler, device = make("both=1", pages=32)
    arrive(scheduler, device, "a", prompt_len=30, prompt="p")
    second = arrive(scheduler, device, "b", prompt_len=30, prompt="p")
    third = arrive(scheduler, device, "c", prompt_len=3)
    step(scheduler, device)
    assert second.state is State.WAITING
    device.complete_step(0, 1.0)
    step(scheduler, device)
    assert third.state is not State.WAITING, "one that shares nothing does not wait"
    scheduler.on(AbortRequested(1.0, "a"))
    device.drain(2.0)
    assert device.finished == {"a": "abort", "b": "length", "c": "length"}


def test_a_prompt_goes_to_the_mesh_that_has_its_prefix():
    scheduler, device = make("both=2", pages=32)
    arrive(scheduler, device, "a", prompt_len=16, prompt="p")
    arrive(scheduler, device, "b", prompt_len=16, prompt="q")
    device.drain(1.0)
    again = arrive(scheduler, device, "c", prompt_len=18, prompt="q")
    step(scheduler, device)
    assert again.placement.mesh == 1


@pytest.mark.parametrize("topology", ["both=1", "both(mode=fused)=1"])
def test_siblings_share_the_prompts_pages_and_copy_the_last_when_they_write(topology):
    scheduler, device = make(topology, pages=16)
    arrive(scheduler, device, "a", prompt_len=6, prompt="p", max_tokens=8)
    for name in "bc":
        arrive(scheduler, device, name, prompt_len=6, prompt="p", max_tokens=8, fork_of="a")
    device.drain(1.0)
    assert device.computed == 6 + 1 + 1
    assert device.most_copies == 2, "the last holder writes in place"
    assert set(device.finished.values()) == {"length"}


def test_siblings_move_only_what_the_decode_mesh_lacks():
    scheduler, device = make(pages=32)
    arrive(scheduler, device, "a", prompt_len=14, prompt="p", max_tokens=8)
    moved = []
    arrive(scheduler, device, "b", prompt_len=14, prompt="p", max_tokens=8, fork_of="a")
    for t in range(50):
        actions = step(scheduler, device)
        moved += [len(action.source_pages[0]) for action in only(actions, StartTransfer)]
        for mesh in (0, 1):
            if device.steps[mesh]:
                device.complete_step(mesh, t)
        if device.transfers:
            device.complete_transfer(0, t)
    assert moved[0] == 4
    assert set(device.finished) == {"a", "b"}
    again = arrive(scheduler, device, "c", prompt_len=14, prompt="p", max_tokens=8)
    transfer = only(step(scheduler, device), StartTransfer)[0]
    assert len(transfer.source_pages[0]) == 1, "the full pages are there"
    device.drain(60.0)
    assert again.state is State.FINISHED


def test_where_no_page_is_free_the_latest_arrival_gives_way_and_comes_back():
    scheduler, device = make("both=1", pages=8)
    first = arrive(scheduler, device, "a", prompt_len=8, max_tokens=20)
    second = arrive(scheduler, device, "b", prompt_len=8, max_tokens=20)
    device.drain(1.0)
    assert device.finished == {"a": "length", "b": "length"}
    assert (first.restarts, second.restarts > 0) == (0, True)
    assert scheduler.counters.preemptions == second.restarts


def test_a_preempted_request_finds_its_pages_in_the_cache():
    scheduler, device = make("both=1", pages=16)
    request = arrive(scheduler, device, "a", prompt_len=8, max_tokens=12)
    step(scheduler, device)
    for t in range(5):
        device.complete_step(0, t)
        step(scheduler, device)
    before = device.computed
    scheduler.on(PreemptRequested(6.0, "a"))
    device.drain(7.0)
    assert request.restarts == 1
    assert device.computed - before < PAGE + 1


def test_deterministic_preemption_prefills_the_prompt_and_decodes_the_rest_again():
    scheduler, device = make("both=1", deterministic=True, prefill_buckets=(8,))
    request = arrive(scheduler, device, "a", prompt_len=6, max_tokens=8)
    step(scheduler, device)
    for t in range(4):
        device.complete_step(0, t)
        step(scheduler, device)
    known = request.confirmed
    assert known > 2
    scheduler.on(PreemptRequested(5.0, "a"))
    forced = []
    for t in range(5, 30):
        forced += [row.is_forced for action in only(step(scheduler, device), Decode) for row in action.rows]
        if device.steps[0]:
            device.complete_step(0, t)
    assert forced == [True] * known + [False] * (7 - known)
    assert request.confirmed == 8


def test_a_pool_for_little_more_than_one_request_serves_fifty():
    for topology in ("both=1", "prefill=1,decode=1"):
        scheduler, device = make(topology, pages=10, length=32)
        for index in range(50):
            arrive(scheduler, device, f"r{index}", prompt_len=1 + index % 20, max_tokens=12)
        device.drain(1.0)
        assert list(device.finished.values()) == ["length"] * 50
        scheduler.check_integrity()


def test_requests_that_give_up_their_pages_finish_in_order_of_arrival():
    scheduler, device = make("both=1", pages=8)
    for name in "abcd":
        arrive(scheduler, device, name, prompt_len=8, max_tokens=20)
    device.drain(1.0)
    assert list(device.finished) == list("abcd")


def test_a_decoding_request_moves_to_another_mesh_and_goes_on():
    scheduler, device = make("prefill=1,decode=2")
    request = arrive(scheduler, device, "a", max_tokens=12)
    while request.state is not State.DECODE:
        step(scheduler, device)
        if device.transfers:
            device.complete_transfer(0, 1.0)
        elif device.steps[0]:
            device.complete_step(0, 1.0)
    source = request.placement.mesh
    step(scheduler, device)
    scheduler.on(MigrateRequested(2.0, "a"))
    assert request.state is State.HANDOFF
    step(scheduler, device)
    device.complete_transfer(0, 3.0)
    assert request.state is State.HANDOFF, "tokens of steps before the move are read first"
    device.drain(4.0)
    assert device.finished == {"a": "length"}
    assert scheduler.counters.migrations == 1
    assert {source, 3 - source} == {1, 2}


def test_a_full_decode_mesh_moves_its_latest_arrival_to_one_with_room():
    scheduler, device = make("both=2", pages=8)
    arrive(scheduler, device, "first", prompt_len=8, max_tokens=1, prompt="p")
    device.drain(1.0)
    for name in "ab":
        arrive(scheduler, device, name, prompt_len=8, max_tokens=20, prompt="p")  # the prefix draws both to one mesh
    device.drain(1.0)
    assert device.finished == {"first": "length", "a": "length", "b": "length"}
    assert scheduler.counters.migrations == 1
    assert scheduler.counters.preemptions == 0


def test_long_prompts_leave_in_parts_while_they_are_prefilled():
    scheduler, device = make(length=64, pages=32, prefill_buckets=(8,), handoff_factor=2)
    request = arrive(scheduler, device, "a", prompt_len=37)
    actions = []
    for t in range(10):
        actions += step(scheduler, device)
        if device.steps[0]:
            device.complete_step(0, t)
        if request.state is State.HANDOFF:
            break
    sent = [(len(action.source_pages[0]), action.source_slot) for action in only(actions, StartTransfer)]
    assert [pages for pages, _ in sent] == [2, 2, 2, 2, 2]
    assert [slot is None for _, slot in sent] == [True] * 4 + [False]
    device.drain(20.0)
    assert device.finished == {"a": "length"}


def test_prompts_of_two_chunks_leave_in_one_transfer():
    scheduler, device = make(pages=32, prefill_buckets=(8,))
    arrive(scheduler, device, "a", prompt_len=16)
    actions = []
    for t in range(4):
        actions += step(scheduler, device)
        if device.steps[0]:
            device.complete_step(0, t)
    assert len(only(actions, StartTransfer)) == 1
    device.drain(5.0)


def test_staging_stays_taken_until_a_dropped_transfer_is_over():
    scheduler, device = make(pages=32)
    arrive(scheduler, device, "a", prompt_len=30, max_tokens=2)
    for t in range(6):
        step(scheduler, device)
        if device.steps[0]:
            device.complete_step(0, t)
    free = scheduler.meshes[1].staging
    scheduler.on(AbortRequested(7.0, "a"))
    step(scheduler, device)
    assert scheduler.meshes[1].staging == free < 8
    while device.transfers:
        device.complete_transfer(0, 8.0)
    assert scheduler.meshes[1].staging == 8


def test_prompts_stop_being_admitted_while_half_the_pool_waits_for_credit():
    scheduler, device = make(pages=16, length=32, slots=8)
    for index in range(8):
        arrive(scheduler, device, f"r{index}", prompt_len=16, max_tokens=16)
    for t in range(12):
        step(scheduler, device)
        if device.steps[0]:
            device.complete_step(0, t)
    states = [request.state for request in scheduler.requests.values()]
    assert State.WAITING in states
    assert scheduler.meshes[0].is_backed_up
    device.drain(20.0)
    assert len(device.finished) == 8


def test_a_fused_mesh_decodes_and_prefills_in_one_step():
    scheduler, device = make("both(mode=fused)=1", pages=32)
    arrive(scheduler, device, "a", prompt_len=4, max_tokens=9)
    step(scheduler, device)
    arrive(scheduler, device, "b", prompt_len=24, max_tokens=4)
    seen = []
    for t in range(5):
        device.complete_step(0, t)
        seen += kinds(step(scheduler, device))
    assert Fused in seen
    assert Prefill not in seen
    device.drain(9.0)
    assert device.finished == {"a": "length", "b": "length"}


def test_several_decode_steps_go_in_one_dispatch_while_nothing_can_interfere():
    scheduler, device = make("both=1", pages=32, decode_steps=4)
    arrive(scheduler, device, "a", prompt_len=4, max_tokens=11)
    taken = []
    for t in range(20):
        taken += [action.steps for action in only(step(scheduler, device), Decode)]
        if device.steps[0]:
            device.complete_step(0, t)
    assert taken == [4, 4, 1, 1]
    assert device.finished == {"a": "length"}


def test_one_decode_step_goes_in_a_dispatch_while_a_prompt_is_prefilled_or_a_request_is_about_to_end():
    scheduler, device = make("both=1", pages=32, decode_steps=4)
    arrive(scheduler, device, "a", prompt_len=4, max_tokens=40)
    arrive(scheduler, device, "b", prompt_len=4, max_tokens=6)
    taken = []
    for t in range(9):
        if t == 3:
            arrive(scheduler, device, "c", prompt_len=30, max_tokens=9)
        taken.append([(len(action.rows), action.steps) for action in only(step(scheduler, device), Decode)])
        if device.steps[0]:
            device.complete_step(0, t)
    # b has one token left after the first dispatch; c's chunks and a's decode steps take turns.
    assert taken == [[(2, 4)], [(2, 1)], [(1, 4)], [], [(1, 1)], [], [(1, 1)], [], [(1, 1)]]


def test_a_windowed_group_keeps_only_its_window():
    scheduler, device = make("both=1", pages=32, length=96, windows=(None, 6))
    request = arrive(scheduler, device, "a", prompt_len=40, max_tokens=40)
    most = 0
    for t in range(200):
        step(scheduler, device)
        if request.placement is not None:
            table = request.placement.tables[1]
            most = max(most, len(table.pages) + len(table.spare))
        if device.steps[0]:
            device.complete_step(0, t)
    assert device.finished == {"a": "length"}
    assert most <= scheduler.config.most_pages(6) == 5


def test_a_handoff_moves_only_the_window_of_a_windowed_group():
    scheduler, device = make(pages=32, length=64, windows=(None, 6))
    arrive(scheduler, device, "a", prompt_len=16, max_tokens=8)
    actions = []
    for t in range(4):
        actions += step(scheduler, device)
        if device.steps[0]:
            device.complete_step(0, t)
    (transfer,) = only(actions, StartTransfer)
    assert list(map(len, transfer.source_pages)) == [4, 2]
    device.drain(5.0)
    assert device.finished == {"a": "length"}


def test_a_hit_needs_only_the_window_of_a_windowed_group():
    scheduler, device = make("both=1", pages=32, length=64, windows=(None, 6))
    arrive(scheduler, device, "a", prompt_len=24, prompt="p")
    device.drain(1.0)
    before = device.computed
    arrive(scheduler, device, "b", prompt_len=26, prompt="p")
    device.drain(2.0)
    assert device.computed - before == 2


def test_admission_is_held_while_parameters_change_and_the_cache_is_void_after():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", prompt_len=8, prompt="p")
    step(scheduler, device)
    scheduler.on(Hold(1.0))
    second = arrive(scheduler, device, "b", prompt_len=8, prompt="p")
    assert not scheduler.is_drained
    device.drain(2.0)
    assert second.state is State.WAITING
    assert scheduler.is_drained
    scheduler.on(Resume(3.0))
    before = device.computed
    device.drain(4.0)
    assert device.computed - before == 8
    assert device.finished == {"a": "length", "b": "length"}


def test_a_prompt_with_a_cached_prefix_fits_into_the_smallest_windowed_pool():
    scheduler, device = make("both=1", windows=(None, 6), spare=0)
    arrive(scheduler, device, "a", prompt_len=12, prompt="p", max_tokens=1)
    device.drain(1.0)
    arrive(scheduler, device, "b", prompt_len=30, prompt="p", max_tokens=1)
    device.drain(2.0)
    assert device.finished == {"a": "length", "b": "length"}


def test_a_request_with_early_credit_never_waits_for_an_earlier_one_that_has_none():
    """ "h" waits for the block that "q" computes, and "p", which came later, takes the decode pages meanwhile."""
    scheduler, device = make(pages=13, length=48, prefill_buckets=(8,))
    arrive(scheduler, device, "q", prompt_len=8, prompt="s", max_tokens=4)
    arrive(scheduler, device, "h", prompt_len=16, prompt="s", max_tokens=4)
    arrive(scheduler, device, "p", prompt_len=36, max_tokens=4)
    device.drain(1.0)
    assert set(device.finished) == {"q", "h", "p"}


def test_a_late_result_does_not_reach_a_new_request_of_the_same_name():
    scheduler, device = make("both=1")
    arrive(scheduler, device, "a", prompt_len=4, max_tokens=9)
    step(scheduler, device)
    scheduler.on(AbortRequested(1.0, "a"))
    step(scheduler, device)
    again = arrive(scheduler, device, "a", prompt_len=4, max_tokens=9)
    device.finished.clear()
    device.outputs.clear()
    while device.steps[0] and again.state is State.WAITING:
        device.complete_step(0, 2.0, stops=lambda request: True)
    assert again.confirmed == 0
    device.drain(3.0)
    assert device.finished == {"a": "length"}


def test_a_lost_mesh_whose_transfers_failed_first_costs_one_try():
    scheduler, device = make(max_retries=1)
    request = arrive(scheduler, device, "a")
    step(scheduler, device)
    scheduler.on(TransferFailed(1.0, device.transfers.pop(0), "boom"))
    step(scheduler, device)
    device.lose(0)
    scheduler.on(MeshFailed(1.0, 0, "boom"))
    assert (request.retries, request.restarts) == (1, 2)
    device.drain(2.0)
    assert device.finished == {"a": "length"}


def test_identical_prompts_move_to_the_decode_mesh_once():
    scheduler, device = make(pages=32)
    moved = []
    for name in "abc":
        arrive(scheduler, device, name, prompt_len=14, prompt="p", max_tokens=8)
    for t in range(80):
        moved += [len(action.source_pages[0]) for action in only(step(scheduler, device), StartTransfer)]
        for mesh in (0, 1):
            if device.steps[mesh]:
                device.complete_step(mesh, t)
        if device.transfers:
            device.complete_transfer(0, t)
    assert moved == [4, 1, 1]
    assert set(device.finished) == {"a", "b", "c"}


def _waiting_for_a_prefix(monkeypatch, count, length=60):
    """A scheduler, its device and a list of what was looked up in its prefix cache, while `count` requests wait for
    the prompt that another computes in chunks."""
    scheduler, device = make("both=1", pages=64, slots=count + 1, length=length + 16, prefill_buckets=(4,))
    arrive(scheduler, device, "leader", prompt_len=length, prompt="p", max_tokens=2)
    step(scheduler, device)
    for number in range(count):
        arrive(scheduler, device, f"r{number}", prompt_len=length + 2, prompt="p", max_tokens=2)
    asked = []
    pages = scheduler.meshes[0].pages
    hit = pages.hit
    monkeypatch.setattr(pages, "hit", lambda *arguments: asked.append(arguments) or hit(*arguments))
    return scheduler, device, asked


def test_what_a_turn_looks_up_does_not_grow_with_the_requests_that_wait_for_a_prefix(monkeypatch):
    lookups = []
    for count in (3, 30):
        scheduler, device, asked = _waiting_for_a_prefix(monkeypatch, count)
        others, before, turns = [r for r in scheduler.requests.values() if r.id != "leader"], 0, 0
        while all(request.state is State.WAITING for request in others):
            turns, before = turns + 1, len(asked)
            step(scheduler, device)
            device.complete_step(0, 1.0)
        assert turns > 10
        lookups.append(before)
        device.drain(2.0)
        assert len(device.finished) == count + 1
    assert lookups[0] == lookups[1] <= 60 // 4 + 2


@pytest.mark.parametrize("event", [AbortRequested, PreemptRequested, MeshFailed])
def test_requests_are_woken_at_once_when_what_they_wait_for_will_not_come(monkeypatch, event):
    scheduler, device, _ = _waiting_for_a_prefix(monkeypatch, 3)
    step(scheduler, device)
    others = [request for request in scheduler.requests.values() if request.id != "leader"]
    assert len({request.sleeps_for for request in others}) == 1
    assert all(request.sleeps_for is not None for request in others)
    if event is MeshFailed:
        device.lose(0)
    scheduler.on(MeshFailed(1.0, 0, "boom") if event is MeshFailed else event(1.0, "leader"))
    scheduler.check_integrity()
    step(scheduler, device)
    placed = [request for request in scheduler.requests.values() if request.state is State.PREFILL]
    assert len(placed) == 1  # another computes it now, and the rest wait for that
    device.drain(2.0)
    assert len(device.finished) == 4
