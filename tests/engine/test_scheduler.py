"""The scheduler on a fake device: order, hand-off, aborts, lost meshes; and a state machine over all of it."""

import pytest
from helpers.fake_device import FakeDevice
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twinmesh.engine.config import EngineConfig, PoolSize, Topology
from twinmesh.engine.mesh_state import MAX_STEPS_IN_FLIGHT
from twinmesh.engine.protocol import (
    AbortRequested,
    Arrived,
    Decode,
    Finish,
    MeshFailed,
    Prefill,
    Scatter,
    StartTransfer,
    TransferFailed,
)
from twinmesh.engine.request import Request, State, Timeline
from twinmesh.engine.scheduler import Scheduler

PAGE = 4


def make(topology="prefill=1,decode=1", pages=16, slots=4, length=32):
    config = EngineConfig(
        topology=Topology.parse(topology),
        max_model_len=length,
        page_size=PAGE,
        max_num_seqs=slots,
        prefill_buckets=(4, 8),
        prefill_rows=3,
        decode_buckets=tuple(sorted({1, slots})),
    )
    scheduler = Scheduler(config, [PoolSize(pages, config.max_pages)] * len(config.topology.meshes))
    return scheduler, FakeDevice(scheduler, PAGE)


def arrive(scheduler, name, prompt_len=6, max_tokens=4, t=0.0):
    request = Request(name, prompt_len, max_tokens, Timeline(t))
    scheduler.on(Arrived(t, request))
    return request


def kinds(actions):
    return [type(action) for action in actions]


def only(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


def step(scheduler, device):
    actions = scheduler.actions()
    device.perform(actions)
    return actions


def test_a_request_goes_through_prefill_handoff_and_decode():
    scheduler, device = make()
    request = arrive(scheduler, "a")
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
    arrive(scheduler, "a")
    assert StartTransfer in kinds(step(scheduler, device))
    device.complete_transfer(0, 1.0)
    assert not step(scheduler, device)
    device.complete_step(0, 2.0)
    assert kinds(step(scheduler, device))[1:] == [Scatter, Decode, Decode]


def test_decode_steps_are_dispatched_ahead_of_results_but_never_past_max_tokens():
    scheduler, device = make("both=1")
    arrive(scheduler, "a", prompt_len=4, max_tokens=2)
    actions = step(scheduler, device)
    assert kinds(actions)[1:] == [Prefill, Decode]
    device.complete_step(0, 1.0)
    assert not step(scheduler, device)


def test_no_more_steps_are_in_flight_than_allowed():
    scheduler, device = make("both=1")
    arrive(scheduler, "a", prompt_len=4, max_tokens=20)
    step(scheduler, device)
    assert len(device.steps[0]) == MAX_STEPS_IN_FLIGHT


def test_prefill_goes_on_without_decode_pages_and_the_first_token_is_not_delayed():
    scheduler, device = make(pages=8)
    first = arrive(scheduler, "a", prompt_len=8, max_tokens=20)  # takes 7 of 8 decode pages
    second = arrive(scheduler, "b", prompt_len=8, max_tokens=20)
    step(scheduler, device)
    device.complete_step(0, 1.0)
    step(scheduler, device)
    device.complete_step(0, 2.0)
    assert first.credit is not None
    assert second.credit is None
    assert second.confirmed == 1
    device.drain(3.0)
    assert device.finished == {"a": "length", "b": "length"}


def test_a_gather_does_not_queue_behind_the_next_prompts_prefill():
    scheduler, device = make(pages=32)
    for name in "ab":
        arrive(scheduler, name, prompt_len=8)
    order = [kind for kind in kinds(step(scheduler, device)) if kind in (Prefill, StartTransfer)]
    assert order == [Prefill, StartTransfer, Prefill, StartTransfer]


def test_a_token_that_stops_the_request_on_the_prefill_mesh_cancels_its_transfer():
    scheduler, device = make()
    arrive(scheduler, "a")
    step(scheduler, device)
    device.complete_step(0, 1.0, stops=lambda request: True)
    assert only(step(scheduler, device), Finish)[0].reason == "stop"
    assert not device.staged
    device.complete_transfer(0, 2.0)
    assert not step(scheduler, device)


def test_a_one_token_request_needs_no_transfer():
    scheduler, device = make()
    arrive(scheduler, "a", max_tokens=1)
    assert StartTransfer not in kinds(step(scheduler, device))
    device.drain(1.0)
    assert device.finished == {"a": "length"}


def test_a_late_result_does_not_reach_the_slots_next_tenant():
    scheduler, device = make("both=1", slots=1)
    arrive(scheduler, "a", prompt_len=4, max_tokens=9)
    step(scheduler, device)
    device.complete_step(0, 1.0)
    step(scheduler, device)  # two decode steps of "a" in flight
    device.complete_step(0, 2.0, stops=lambda request: True)
    second = arrive(scheduler, "b", prompt_len=4, max_tokens=9)
    step(scheduler, device)
    assert second.home.slot == 0
    device.complete_step(0, 3.0, stops=lambda request: True)  # the late step of "a"
    assert second.state is State.DECODE
    assert second.confirmed == 0
    device.drain(4.0)
    assert device.finished == {"a": "stop", "b": "length"}


def test_both_alternates_prefill_and_decode():
    scheduler, device = make("both=1", pages=32)
    arrive(scheduler, "a", prompt_len=4, max_tokens=9)
    step(scheduler, device)
    arrive(scheduler, "b", prompt_len=24, max_tokens=4)
    order = []
    for t in range(6):
        device.complete_step(0, t)
        order += kinds(step(scheduler, device))
    assert [kind for kind in order if kind in (Prefill, Decode)][:4] == [Prefill, Decode, Prefill, Decode]


def test_short_prompts_share_a_step_and_a_long_one_is_chunked():
    scheduler, device = make(pages=32)
    for name, length in (("a", 2), ("b", 3), ("c", 20)):
        arrive(scheduler, name, prompt_len=length)
    first = only(step(scheduler, device), Prefill)[0]
    assert [(chunk.request_id, chunk.start, chunk.length) for chunk in first.chunks] == [
        ("a", 0, 2), ("b", 0, 3), ("c", 0, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("topology", ["prefill=2,decode=1", "prefill=1,decode=2", "both=2"])
def test_several_meshes_of_a_role_share_the_work(topology):
    scheduler, device = make(topology)
    for index in range(6):
        arrive(scheduler, f"r{index}", prompt_len=8, max_tokens=8)
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
def test_a_prompt_goes_where_none_is_being_prefilled_or_else_where_fewer_requests_sit(topology, meshes):
    scheduler, device = make(topology, pages=32)
    first = arrive(scheduler, "a", prompt_len=8)
    step(scheduler, device)  # all of it is dispatched, none is answered
    second = arrive(scheduler, "b", prompt_len=4)
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
    third = arrive(scheduler, "c", prompt_len=8, max_tokens=20)
    fourth = arrive(scheduler, "d", prompt_len=8, max_tokens=20)
    actions = only(step(scheduler, device), Prefill)
    assert {action.mesh for action in actions} == {0, 1}
    assert (third.home is not None) == (fourth.home is not None) == both


def test_a_lost_mesh_takes_its_own_requests_and_no_others():
    scheduler, device = make("both=2")
    lost, kept = arrive(scheduler, "a"), arrive(scheduler, "b")
    step(scheduler, device)
    mesh = lost.home.mesh
    assert kept.home.mesh != mesh
    device.lose(mesh)
    scheduler.on(MeshFailed(1.0, mesh, "boom"))
    finish = only(step(scheduler, device), Finish)[0]
    assert (finish.reason, finish.error) == ("error", "boom")
    device.drain(2.0)
    assert device.finished == {"a": "error", "b": "length"}


def test_a_failed_transfer_takes_only_its_request():
    scheduler, device = make()
    arrive(scheduler, "a")
    arrive(scheduler, "b")
    step(scheduler, device)
    device.complete_step(0, 1.0)
    scheduler.on(TransferFailed(1.0, device.transfers.pop(0), "boom"))
    device.drain(2.0)
    assert device.finished == {"a": "error", "b": "length"}


class Machine(RuleBasedStateMachine):
    """Arrivals, results in any order that devices allow, aborts and lost meshes, at random."""

    @initialize(
        topology=st.sampled_from(["both=1", "both=2", "prefill=1,decode=1", "prefill=2,decode=2"]),
        pages=st.integers(8, 14),
        slots=st.integers(1, 4),
    )
    def start(self, topology, pages, slots):
        self.scheduler, self.device = make(topology, pages, slots)
        self.requests, self.t = [], 0.0

    def _advance(self):
        self.t += 1.0
        return self.t

    def _act(self):
        self.device.perform(self.scheduler.actions())

    @rule(prompt_len=st.integers(1, 20), max_tokens=st.integers(1, 12))
    def arrive(self, prompt_len, max_tokens):
        name = f"r{len(self.requests)}"
        self.requests.append(arrive(self.scheduler, name, prompt_len, max_tokens, self._advance()))
        self._act()

    @precondition(lambda self: any(self.device.steps))
    @rule(pick=st.integers(0, 99), stop=st.integers(0, 9))
    def step_done(self, pick, stop):
        busy = [mesh for mesh, steps in enumerate(self.device.steps) if steps]
        self.device.complete_step(busy[pick % len(busy)], self._advance(), stops=lambda request: stop == 0)
        self._act()

    @precondition(lambda self: self.device.transfers)
    @rule(pick=st.integers(0, 99), works=st.integers(0, 9))
    def transfer_done(self, pick, works):
        index = pick % len(self.device.transfers)
        if works:
            self.device.complete_transfer(index, self._advance())
        else:
            self.scheduler.on(TransferFailed(self._advance(), self.device.transfers.pop(index), "boom"))
        self._act()

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 99))
    def abort(self, pick):
        self.scheduler.on(AbortRequested(self._advance(), self.requests[pick % len(self.requests)].id))
        self._act()

    @rule(pick=st.integers(0, 99), dice=st.integers(0, 3))
    def lose_mesh(self, pick, dice):
        if dice == 0:
            mesh = pick % len(self.scheduler.meshes)
            self.device.lose(mesh)
            self.scheduler.on(MeshFailed(self._advance(), mesh, "boom"))
            self._act()

    @invariant()
    def integrity(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        self.device.drain(self._advance())
        assert set(self.device.finished) == {request.id for request in self.requests}
        assert not self.scheduler.requests
        for mesh in self.scheduler.meshes:
            assert mesh.pages.num_free == mesh.pages.num_pages
            assert mesh.slots.num_free == self.scheduler.config.max_num_seqs
        assert not self.device.staged


Machine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase
