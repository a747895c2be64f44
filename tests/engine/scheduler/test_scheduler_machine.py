"""A state machine over scheduler, pages and hand-offs: nothing is lost, held twice or read wrongly, come what may."""

from collections import Counter
from operator import attrgetter
from typing import ClassVar
from unittest.mock import patch

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
from twinmesh.engine.protocol.cache_report import MissReason
from twinmesh.engine.protocol.events import (
    AbortRequested,
    Hold,
    MeshFailed,
    MeshJoined,
    MigrateRequested,
    PreemptRequested,
    RequestFailed,
    Resume,
    ServiceChanged,
    SetRoles,
    Tick,
    TransferFailed,
)
from twinmesh.engine.protocol.service import SLO, Service
from twinmesh.engine.roles import ROLES, uncovered
from twinmesh.engine.scheduler.mesh_state import in_order
from twinmesh.engine.scheduler.policy import FirstComeFirstServed, ShortestPromptFirst
from twinmesh.engine.scheduler.request import FINAL, State
from twinmesh.engine.topology import Role

from .test_policy import AtRandom
from .test_scheduler import arrive, make

TOPOLOGIES = [
    "both=1", "both=2", "both(mode=fused)=1", "prefill=1,decode=1", "prefill=2,decode=2", "prefill=1,decode=2",
    "both=9", "prefill=9,decode=9",
    "pool=2", "pool=3", "pool=10",
]  # fmt: skip
SLOS = [None, SLO(tpot_ms=9000), SLO(ttft_ms=1)]
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


STANDS = ("asking for credit", "on its way", "asleep", "decode", "prefill", "waiting")  # the rarest first


def _due(request):
    """When the request's time is over at the latest."""
    deadline = request.facts.service.deadline
    return None if deadline is None else request.timeline.arrival + deadline


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


FLIPS = Counter()  # calls for roles by what went on meanwhile, and by their answers
ROLES_OF_MESHES = st.lists(st.sampled_from(ROLES), min_size=10, max_size=10)


class Machine(RuleBasedStateMachine):
    """Arrivals, results in any order that devices allow, aborts, preemptions, migrations and lost meshes, at random."""

    steps = sleepers = handoffs_asleep = displaced = lent = conditional_prefills = held_back = 0
    expired: ClassVar = Counter()
    reasons = frozenset()

    @initialize(
        topology=st.sampled_from(TOPOLOGIES),
        mode=st.sampled_from(MODES),
        windows=st.sampled_from([(None,), (None, 6), (3,)]),
        pages=st.integers(12, 18),
        spare=st.integers(0, 3),
        slots=st.integers(1, 4),
        policy=st.sampled_from(POLICIES),
        slo=st.sampled_from(SLOS),
    )
    def start(self, topology, mode, windows, pages, spare, slots, policy, slo):
        if mode.get("deterministic") and "fused" in topology:
            mode = {}
        watched = Watched(policy)
        self.scheduler, self.device = make(
            topology, pages, slots, windows=windows, spare=spare, length=48, policy=watched, slo=slo, **mode
        )
        watched.requests = self.scheduler.requests
        assert isinstance(self.device, FakeDevice)
        self.requests, self.t, self.is_held, self.calls = [], 0.0, False, 0

    def _advance(self):
        self.t += 1.0
        return self.t

    def _act(self):
        Machine.steps += 1
        Machine.held_back += any(mesh.holds_back for mesh in self.scheduler.meshes)
        self.scheduler.check_integrity()  # what others wait for ends with notice, before anything is decided
        first = min(self.scheduler.requests.values(), key=in_order, default=None)
        before = {request: request.preempted for request in self.scheduler.requests.values()}
        self.device.perform(self.scheduler.actions())
        Machine.displaced += sum(request.preempted - count for request, count in before.items())
        assert first is None or first.preempted == before[first], "the first of all is never a victim"
        assert all(
            request.dispatched <= request.confirmed + 1
            for request in self.scheduler.requests.values()
            if request.is_constrained
        ), "a constrained request runs ahead"
        self._check_that_what_is_awaited_is_under_way()
        self._check_that_nobody_is_held_up_by_one_less_urgent()
        self._check_that_nobody_was_forgotten()

    def _check_that_nobody_is_held_up_by_one_less_urgent(self):
        """One that is to bring a block runs at the urgency of the first that sleeps for it, or stands in line."""
        requests = self.scheduler.requests.values()
        awake = [r.order for r in requests if r.state is State.WAITING and r.sleeps_for is None]
        for request in requests:
            if request.state is State.WAITING and min(awake, default=request.order) < request.order:
                continue
            where = attrgetter("computing" if request.state is State.WAITING else "arriving")
            bringers = []
            for mesh in self.scheduler.meshes:
                placement = where(mesh).get(request.sleeps_for)
                if placement is not None:
                    bringers += [
                        r for r in mesh.placed if placement in (r.placement, r.handoff and r.handoff.placement)
                    ]
            if bringers and not self.is_held:  # of several, one that has come later may be slower
                assert min(r.order[:3] for r in bringers) <= request.order
                Machine.lent += any(len(r.order) > 3 for r in bringers)

    def _check_that_nobody_was_forgotten(self):
        """Nothing more can be done even if all are asked again, those included for which nothing has changed."""
        self.scheduler.meshes[0].shared.room.freed += 1
        for mesh in self.scheduler.meshes:
            mesh.wake()
        # But a decode mesh that may prefill a prompt as costs are now is no room that the prompt would wait for.
        with patch("twinmesh.engine.scheduler.router.with_decode_meshes", lambda request, ranked, decodes: ranked):
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

    @rule(
        prompt=st.sampled_from("pqr"),
        prompt_len=st.integers(1, 36),
        max_tokens=st.integers(1, 12),
        session=st.sampled_from("st"),
    )
    def a_turn_of_a_conversation_arrives(self, prompt, prompt_len, max_tokens, session):
        name = f"r{len(self.requests)}"
        self.requests.append(
            arrive(
                self.scheduler, self.device, name, prompt_len, max_tokens, self._advance(), prompt, session=session
            )
        )  # fmt: skip
        self._act()

    @precondition(lambda self: hasattr(self, "scheduler") and self.scheduler.next_due() is not None)
    @rule(pick=st.integers(0, 99))
    def let_time_come(self, pick):
        """The next that is due ends, or the next of those that stand somewhere."""
        due = self._due()
        stands = [None, *sorted(due)]
        self._let_time_come(due.get(stands[pick % len(stands)], self.scheduler.next_due()))

    @precondition(lambda self: hasattr(self, "scheduler") and self.scheduler.config.has_handoffs and not self.is_held)
    @rule()
    def requests_come_until_one_asks_for_credit(self):
        for prompt in "pqrs":
            self._arrive(prompt, 20, 12, 0, deadline=90)
        for _ in range(8):
            if "asking for credit" in self._due():
                return
            for mesh in [mesh for mesh, steps in enumerate(self.device.steps) if steps]:
                self.device.complete_step(mesh, self._advance())
            self._act()

    def _due(self):
        """When the first deadline of those that stand somewhere comes, by where they stand."""
        requests = self.scheduler.requests.values()
        due = [(_stand(request), at) for request in requests if (at := _due(request)) is not None]
        return {stand: min(at for other, at in due if other == stand) for stand, _ in due}

    def _let_time_come(self, t):
        states = {request.id: _stand(request) for request in self.scheduler.requests.values()}
        self.t = max(self.t, t)
        self.scheduler.on(Tick(self.t))
        Machine.expired.update(states[id_] for id_ in states.keys() - self.scheduler.requests.keys())
        self._act()

    @rule(prompt=st.sampled_from("pqr"), prompt_len=st.integers(1, 36), max_tokens=st.integers(1, 12))
    def arrive_in_batch(self, prompt, prompt_len, max_tokens):
        name, due = f"r{len(self.requests)}", (None, 5.0, 50.0)[prompt_len % 3]
        facts = self.scheduler, self.device, name, prompt_len, max_tokens, self._advance(), prompt
        self.requests.append(arrive(*facts, is_batch=True, due=due))
        self._act()

    @rule(prompt=st.sampled_from("pqr"), prompt_len=st.integers(1, 36), max_tokens=st.integers(1, 12))
    def arrive_constrained(self, prompt, prompt_len, max_tokens):
        facts = self.scheduler, self.device, f"r{len(self.requests)}", prompt_len, max_tokens, self._advance(), prompt
        self.requests.append(arrive(*facts, constrained=True))
        self._act()

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 99))
    def fail(self, pick):
        self.scheduler.on(RequestFailed(self._advance(), self._some(pick), "stuck"))
        self._act()

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 99), is_batch=st.booleans())
    def serve_otherwise(self, pick, is_batch):
        self.scheduler.on(ServiceChanged(self._advance(), self._some(pick), Service(is_batch=is_batch)))
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
        FLIPS["preemptions during a drain"] += self._is_draining
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

    @property
    def _is_draining(self):
        return any(mesh.draining for mesh in self.scheduler.meshes)

    @precondition(lambda self: hasattr(self, "scheduler") and self.scheduler.config.topology.is_pool)
    @rule(roles=ROLES_OF_MESHES, by_name=st.booleans(), time=st.integers(1, 40))
    def set_roles(self, roles, by_name, time):
        roles = roles[: len(self.scheduler.meshes)]
        covered = uncovered(roles) is None
        self._set_roles({} if by_name else Counter(roles), dict(enumerate(roles)) if by_name else {}, time)
        answer = self.device.settled.get(self.calls)
        assert covered == (answer is None or answer.outcome != "refused")
        if covered:
            assert Counter(mesh.role for mesh in self.scheduler.meshes) == Counter(roles)

    @precondition(lambda self: hasattr(self, "scheduler") and self._busy_in_a_pool())
    @rule(pick=st.integers(0, 99), time=st.integers(1, 40))
    def take_a_role_from_a_busy_mesh(self, pick, time):
        busy = self._busy_in_a_pool()
        mesh = busy[pick % len(busy)]
        decodes = any(request.state is State.DECODE for request in mesh.placed)
        self._set_roles({}, {mesh.index: Role.PREFILL if decodes else Role.DECODE}, time)

    @precondition(lambda self: hasattr(self, "scheduler") and self._is_draining)
    @rule(pick=st.integers(0, 99), what=st.sampled_from(["preempt", "abort", "lose"]))
    def end_what_drains(self, pick, what):
        draining = [mesh for mesh in self.scheduler.meshes if mesh.draining]
        mesh = draining[pick % len(draining)]
        if what == "lose" or not mesh.placed:
            self._lose(mesh.index)
            return
        FLIPS["preemptions during a drain"] += what == "preempt"
        request = mesh.placed[pick % len(mesh.placed)]
        self.scheduler.on((PreemptRequested if what == "preempt" else AbortRequested)(self._advance(), request.id))
        self._act()

    def _busy_in_a_pool(self):
        """The meshes of a pool that have a role to lose, and requests."""
        is_pool = self.scheduler.config.topology.is_pool
        return [mesh for mesh in self.scheduler.meshes if mesh.placed and is_pool]

    def _set_roles(self, counts, meshes, time):
        FLIPS["during a hand-off"] += bool(self.device.transfers)
        FLIPS["during a drain"] += self._is_draining
        self.calls += 1
        t = self._advance()
        self.scheduler.on(SetRoles(t, self.calls, t + time, dict(counts), meshes))
        self._act()

    @rule(pick=st.integers(0, 99), dice=st.integers(0, 3))
    def lose_mesh(self, pick, dice):
        if dice == 0:
            self._lose(pick % len(self.scheduler.meshes))

    def _lose(self, mesh):
        FLIPS["meshes lost during a drain"] += self._is_draining
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
            assert not mesh.batch_load
            assert not mesh.batch
            assert not mesh.arriving
            assert not mesh.draining
        assert not self.device.staged
        assert not self.scheduler.meshes[0].shared.interactive.count
        assert self.device.settled.keys() == set(range(1, self.calls + 1))
        Machine.conditional_prefills += self.scheduler.counters.conditional_prefills
        FLIPS.update(answer.outcome for answer in self.device.settled.values())
        self._check_reports()

    def _check_reports(self):
        """Of every prompt that began all tokens were cached or missed, and are counted."""
        reports = [(request.prompt_len, request.cache) for request in self.requests if request.cache is not None]
        for tokens, report in reports:
            assert report.cached_tokens + sum(miss.tokens for miss in report.missed) == tokens
        counters = self.scheduler.counters
        assert counters.prompt_tokens == sum(tokens for tokens, _ in reports)
        assert counters.prompt_tokens == counters.cached_tokens + sum(counters.missed_tokens.values())
        Machine.reasons |= {miss.reason for _, report in reports for miss in report.missed}


class Leaving(Machine):
    """Meshes go, each with all that it has, and join again; nothing is performed on one that is gone. Some requests
    are constrained, and take no step ahead wherever they are; some fail alone."""

    def _arrive(self, prompt, prompt_len, max_tokens, siblings, **service):
        super()._arrive(prompt, prompt_len, max_tokens, siblings, constrained=len(self.requests) % 3 == 0, **service)

    @precondition(lambda self: getattr(self, "requests", None))
    @rule(pick=st.integers(0, 99))
    def request_fails(self, pick):
        name = self._some(pick)
        FLIPS["failed"] += name in self.scheduler.requests
        self.scheduler.on(RequestFailed(self._advance(), name, "its grammar is too much"))
        assert name not in self.scheduler.requests
        self._act()

    def _act(self):
        gone = {mesh.index for mesh in self.scheduler.meshes if mesh.is_gone}
        super()._act()
        for request in self.scheduler.requests.values():
            if request.is_constrained and request.state is State.DECODE:
                FLIPS["constrained"] += 1
                assert request.dispatched - request.confirmed <= 1, "a constrained request was dispatched ahead"
        assert not any(self.scheduler.meshes[index].in_flight or self.scheduler.meshes[index].placed for index in gone)

    @precondition(lambda self: hasattr(self, "scheduler"))
    @rule(pick=st.integers(0, 99))
    def mesh_goes(self, pick):
        mesh = self.scheduler.meshes[pick % len(self.scheduler.meshes)]
        if not mesh.is_gone:
            FLIPS["gone"] += 1
            FLIPS["gone with requests"] += bool(mesh.placed)
            self.device.lose(mesh.index)
            self.scheduler.on(MeshFailed(self._advance(), mesh.index, "boom", is_gone=True))
            FLIPS["all gone"] += all(mesh.is_gone for mesh in self.scheduler.meshes)
            self._act()

    @precondition(lambda self: hasattr(self, "scheduler"))
    @rule(pick=st.integers(0, 99))
    def mesh_joins(self, pick):
        gone = [mesh for mesh in self.scheduler.meshes if mesh.is_gone]
        if gone:
            self._join(gone[pick % len(gone)])

    def _join(self, mesh):
        self.scheduler.on(MeshJoined(self._advance(), mesh.index))
        self._act()

    @precondition(lambda self: hasattr(self, "scheduler") and self.scheduler.config.topology.is_pool)
    @rule(roles=ROLES_OF_MESHES, by_name=st.booleans(), time=st.integers(1, 40))
    def set_roles(self, roles, by_name, time):
        """A call that would leave a phase to meshes that are gone may be refused."""
        roles = roles[: len(self.scheduler.meshes)]
        self._set_roles({} if by_name else Counter(roles), dict(enumerate(roles)) if by_name else {}, time)

    def teardown(self):
        if hasattr(self, "scheduler"):
            for mesh in self.scheduler.meshes:
                if mesh.is_gone:
                    self._join(mesh)
        super().teardown()


def test_meshes_that_go_and_join_again_lose_nothing():
    FLIPS.clear()
    run_state_machine_as_test(
        Leaving,
        settings=settings(
            max_examples=20, stateful_step_count=50, derandomize=True, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    for what in ("gone", "gone with requests", "all gone", "constrained", "failed"):
        assert FLIPS[what] > 0, what


def what_has_not_happened():
    """What runs of `Machine` are to hold and have not held, or not often enough."""
    at_least = {
        "steps": (Machine.steps, 20_000), "victims": (Watched.victims, 100), "asleep": (Machine.sleepers, 1_000),
        "hand-offs of those asleep": (Machine.handoffs_asleep, 10), "displaced": (Machine.displaced, 30),
        "lent": (Machine.lent, 100), "conditional prefills": (Machine.conditional_prefills, 1),
        "held back": (Machine.held_back, 100),
    }  # fmt: skip
    expected = ("during a hand-off", "during a drain", "preemptions during a drain", "meshes lost during a drain")
    return [
        *(name for name, (count, least) in at_least.items() if count < least),
        *(reason for reason in MissReason if reason not in Machine.reasons),
        *(stand for stand in STANDS if not Machine.expired[stand]),
        *(what for what in (*expected, "reached", "superseded", "refused", "late") if not FLIPS[what]),
    ]


def test_whatever_happens_nothing_is_lost():
    Machine.steps = Machine.sleepers = Machine.handoffs_asleep = Machine.displaced = Machine.lent = Watched.victims = 0
    Machine.conditional_prefills = Machine.held_back = 0
    Machine.expired.clear()
    Machine.reasons = frozenset()
    FLIPS.clear()
    # Hypothesis draws from what is imported as well, so that the rarest things need more runs in one process than in
    # another. It draws otherwise for a class of another name.
    for machine in (Machine, *(type(f"Machine{number}", (Machine,), {}) for number in range(1, 5))):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=240,
                stateful_step_count=70,
                derandomize=True,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        if not what_has_not_happened():
            break
    assert what_has_not_happened() == []
