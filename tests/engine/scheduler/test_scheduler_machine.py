"""A state machine over scheduler, pages and hand-offs: nothing is lost, held twice or read wrongly, come what may."""

from collections import Counter
from typing import ClassVar

from helpers.fake_device import FakeDevice
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twinmesh.engine.protocol.events import (
    AbortRequested,
    Hold,
    MeshFailed,
    MigrateRequested,
    PreemptRequested,
    Resume,
    Tick,
    TransferFailed,
)
from twinmesh.engine.scheduler.mesh_state import in_order
from twinmesh.engine.scheduler.policy import FirstComeFirstServed, ShortestPromptFirst
from twinmesh.engine.scheduler.request import FINAL, State

from .test_policy import AtRandom
from .test_scheduler import arrive, make

TOPOLOGIES = [
    "both=1", "both=2", "both(mode=fused)=1", "prefill=1,decode=1", "prefill=2,decode=2", "prefill=1,decode=2",
    "both=9", "prefill=9,decode=9",
]  # fmt: skip
POLICIES = [FirstComeFirstServed(), ShortestPromptFirst(), *map(AtRandom, range(4))]
MODES = [
    {},
    {"prefill_buckets": (8,)},
    {"decode_steps": 3},
    {"deterministic": True, "prefill_buckets": (8,)},
    {"prefix_cache": False},
]

SERVICES = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(-2, 2),
        "deadline": st.integers(1, 60),
        "first_token_deadline": st.integers(1, 30),
        "is_batch": st.booleans(),
        "due": st.integers(0, 90),
    },
)


def _stand(request):
    """Where a request stands, as deadlines meet it."""
    if request.state is State.WAITING and request.sleeps_for is not None:
        return "asleep"
    if request.state is State.HANDOFF:
        return "asking for credit" if request.handoff is None else "on its way"
    return str(request.state)


class Watched:
    """A policy whose victims are looked at: the first of all requests is never one."""

    victims = 0

    def __init__(self, policy):
        self._policy, self.requests = policy, {}
        self.name, self.key = policy.name, policy.key
        self.prefill_rank, self.decode_rank = policy.prefill_rank, policy.decode_rank

    def victim(self, candidates):
        Watched.victims += 1
        assert not self.requests or min(self.requests.values(), key=in_order) not in candidates
        return self._policy.victim(candidates)


class Machine(RuleBasedStateMachine):
    """Arrivals, results in any order that devices allow, aborts, preemptions, migrations and lost meshes, at random."""

    steps = sleepers = handoffs_asleep = displaced = 0
    expired: ClassVar = Counter()

    @initialize(
        topology=st.sampled_from(TOPOLOGIES),
        mode=st.sampled_from(MODES),
        windows=st.sampled_from([(None,), (None, 6), (3,)]),
        pages=st.integers(12, 18),
        spare=st.integers(0, 3),
        slots=st.integers(1, 4),
        policy=st.sampled_from(POLICIES),
    )
    def start(self, topology, mode, windows, pages, spare, slots, policy):
        if mode.get("deterministic") and "fused" in topology:
            mode = {}
        watched = Watched(policy)
        self.scheduler, self.device = make(
            topology, pages, slots, windows=windows, spare=spare, length=48, policy=watched, **mode
        )
        watched.requests = self.scheduler.requests
        assert isinstance(self.device, FakeDevice)
        self.requests, self.t, self.is_held = [], 0.0, False

    def _advance(self):
        self.t += 1.0
        return self.t

    def _act(self):
        Machine.steps += 1
        self.scheduler.check_integrity()  # what others wait for ends with notice, before anything is decided
        first = min(self.scheduler.requests.values(), key=in_order, default=None)
        before = {request: request.preempted for request in self.scheduler.requests.values()}
        self.device.perform(self.scheduler.actions())
        Machine.displaced += sum(request.preempted - count for request, count in before.items())
        assert first is None or first.preempted == before[first], "the first of all is never a victim"
        self._check_that_what_is_awaited_is_under_way()
        self._check_that_nobody_was_forgotten()

    def _check_that_nobody_was_forgotten(self):
        """Nothing more can be done even if all are asked again, those included for which nothing has changed."""
        self.scheduler.meshes[0].shared.room.freed += 1
        for mesh in self.scheduler.meshes:
            mesh.wake()
        assert not self.scheduler.actions()

    def _check_that_what_is_awaited_is_under_way(self):
        """What a request sleeps for is under way, or it stands in line behind one that found no room."""
        computing = [block for mesh in self.scheduler.meshes for block in mesh.computing]
        placed = {id(request.placement) for request in self.scheduler.requests.values()}
        assert all(
            id(placement) in placed for mesh in self.scheduler.meshes for placement in mesh.computing.values()
        ), "a block is being computed by a placement that is gone"
        awake = [r for r in self.scheduler.requests.values() if r.state is State.WAITING and r.sleeps_for is None]
        first = min((request.order for request in awake if request.restarts or not self.is_held), default=None)
        for request in self.scheduler.requests.values():
            if request.sleeps_for is None:
                continue
            if request.state is State.HANDOFF:
                assert any(request.sleeps_for in mesh.arriving for mesh in self.scheduler.meshes)
                Machine.handoffs_asleep += 1
                continue
            Machine.sleepers += 1
            assert request.state is State.WAITING
            leader = self.scheduler.requests.get(request.sleeps_for)
            is_under_way = request.sleeps_for in computing or (
                leader is not None and leader.state in (State.WAITING, State.PREFILL)
            )
            in_line = self.is_held or (first is not None and first < request.order)
            assert is_under_way or in_line, f"{request.id} waits for {request.sleeps_for}, which is not under way"

    def _leaders(self):
        """The requests that others wait for: for what they compute, or because they are to be forked."""
        requests = self.scheduler.requests
        keys = {request.sleeps_for for request in requests.values() if request.sleeps_for is not None}
        computing = [mesh.computing.get(key) for mesh in self.scheduler.meshes for key in keys]
        return [r for r in requests.values() if r.id in keys or (r.placement is not None and r.placement in computing)]

    def _some(self, pick):
        return self.requests[pick % len(self.requests)].id

    @rule(
        prompt=st.sampled_from("pqr"),
        prompt_len=st.integers(1, 36),
        max_tokens=st.integers(1, 12),
        siblings=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def arrive(self, prompt, prompt_len, max_tokens, siblings):
        self._arrive(prompt, prompt_len, max_tokens, siblings)

    @rule(
        prompt=st.sampled_from("pqr"),
        prompt_len=st.integers(1, 36),
        max_tokens=st.integers(1, 12),
        siblings=st.sampled_from([0, 0, 0, 1]),
        service=SERVICES,
    )
    def arrive_to_be_served(self, prompt, prompt_len, max_tokens, siblings, service):
        self._arrive(prompt, prompt_len, max_tokens, siblings, **service)

    def _arrive(self, prompt, prompt_len, max_tokens, siblings, **service):
        first = f"r{len(self.requests)}"
        for index in range(1 + siblings):
            name, fork_of = f"r{len(self.requests)}", first if index else None
            t = self._advance()
            self.requests.append(
                arrive(self.scheduler, self.device, name, prompt_len, max_tokens, t, prompt, fork_of, **service)
            )
        self._act()

    @precondition(lambda self: hasattr(self, "scheduler") and self.scheduler.next_due() is not None)
    @rule()
    def let_time_come(self):
        states = {request.id: _stand(request) for request in self.scheduler.requests.values()}
        self.t = max(self.t, self.scheduler.next_due())
        self.scheduler.on(Tick(self.t))
        Machine.expired.update(states[id_] for id_ in states.keys() - self.scheduler.requests.keys())
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
        self.scheduler.on(AbortRequested(self._advance(), self._some(pick)))
        self._act()

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 99))
    def preempt(self, pick):
        self.scheduler.on(PreemptRequested(self._advance(), self._some(pick)))
        self._act()

    @precondition(lambda self: hasattr(self, "scheduler") and self._leaders())
    @rule(pick=st.integers(0, 99), what=st.sampled_from(["abort", "preempt", "lose"]))
    def end_a_leader(self, pick, what):
        leaders = self._leaders()
        leader = leaders[pick % len(leaders)]
        if what == "lose" and leader.placement is not None:
            self.device.lose(leader.placement.mesh)
            self.scheduler.on(MeshFailed(self._advance(), leader.placement.mesh, "boom"))
        else:
            self.scheduler.on((PreemptRequested if what == "preempt" else AbortRequested)(self._advance(), leader.id))
        self._act()

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 99), destination=st.sampled_from([None, 0, 1, 2]))
    def migrate(self, pick, destination):
        self.scheduler.on(MigrateRequested(self._advance(), self._some(pick), destination))
        self._act()

    @rule(pick=st.integers(0, 99), dice=st.integers(0, 3))
    def lose_mesh(self, pick, dice):
        if dice == 0:
            mesh = pick % len(self.scheduler.meshes)
            self.device.lose(mesh)
            self.scheduler.on(MeshFailed(self._advance(), mesh, "boom"))
            self._act()

    @rule(dice=st.integers(0, 2))
    def hold_or_resume(self, dice):
        if dice and not self.is_held:
            return
        if not self.is_held:
            self.scheduler.on(Hold(self._advance()))
        elif self.scheduler.is_drained:
            self.scheduler.on(Resume(self._advance()))
        else:
            return
        self.is_held = not self.is_held
        self._act()

    @invariant()
    def integrity(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        self.device.drain(self._advance())
        if self.is_held:
            assert self.scheduler.is_drained
            self.scheduler.on(Resume(self._advance()))
            self.device.drain(self._advance())
        assert self.scheduler.next_due() is None
        assert set(self.device.finished) == {request.id for request in self.requests}
        assert not self.scheduler.requests
        assert all(request.state in FINAL for request in self.requests)
        for mesh in self.scheduler.meshes:
            assert all(pages.num_free == pages.num_pages for pages in mesh.pages.groups)
            assert mesh.pages.slots.num_free == self.scheduler.config.max_num_seqs
            assert not mesh.placed
            assert not mesh.computing
            assert not mesh.prefill_load
            assert not mesh.arriving
        assert not self.device.staged


def test_whatever_happens_nothing_is_lost():
    Machine.steps = Machine.sleepers = Machine.handoffs_asleep = Machine.displaced = Watched.victims = 0
    Machine.expired.clear()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=320, stateful_step_count=70, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert Machine.steps >= 10_000
    assert Watched.victims >= 100
    assert Machine.sleepers >= 1_000
    assert Machine.handoffs_asleep >= 10
    assert Machine.displaced >= 100
    for stand in ("waiting", "asleep", "prefill", "asking for credit", "on its way", "decode"):
        assert Machine.expired[stand] > 0, stand
