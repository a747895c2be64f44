"""Meshes of a pool change roles on the fake device: what becomes of their requests, in the middle of whatever."""

from io import StringIO

import pytest
from helpers.fake_device import FakeDevice
from twinmesh.engine.config import EngineConfig, PoolSize
from twinmesh.engine.protocol.actions import DropTransfer, StartTransfer
from twinmesh.engine.protocol.events import AbortRequested, MeshFailed, MeshJoined, MigrateRequested, SetRoles, Tick
from twinmesh.engine.roles import starting_roles
from twinmesh.engine.scheduler.decision_log import DecisionLog, RecordingScheduler
from twinmesh.engine.scheduler.lifecycle import MOST_LOSSES
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.simulation.logs.replay import replay
from twinmesh.engine.topology import Role, Topology

from .test_scheduler import PAGE, arrive, only, step

QUICK, SLOW = 0.0, 1e6  # seconds of every transfer: moving a request is always better, or never


@pytest.fixture(autouse=True)
def prompts_go_to_meshes_that_prefill(monkeypatch):
    """Decode meshes without answers would take short prompts (`test_conditional_prefill.py`), which is not tested."""
    monkeypatch.setattr("twinmesh.engine.scheduler.router.with_decode_meshes", lambda request, ranked, decodes: ranked)


class Pool:
    """A pool on a fake device; its calls for roles are numbered from 1."""

    def __init__(self, roles, pages=16, slots=4, length=32, links=QUICK, staging=16, log=None, **changes):
        meshes = sum(int(part.split("=")[1]) for part in roles.split(","))
        topology = Topology.parse(f"pool={meshes}")
        config = EngineConfig(
            topology, length, PAGE, slots, roles=starting_roles(roles, topology),
            **{"prefill_buckets": (4, 8), "prefill_rows": 3, "decode_buckets": (slots,)} | changes,
        )  # fmt: skip
        pools = [PoolSize((pages,), (1,), staging)] * meshes
        if log is None:
            self.scheduler = Scheduler(config, pools)
            self.scheduler.costs.transfer = lambda source, destination, size: links
        else:
            self.scheduler = RecordingScheduler(config, pools, DecisionLog(log))
        self.device = FakeDevice(self.scheduler, {})
        self.calls, self.t = 0, 0.0

    def arrive(self, name, prompt_len=6, max_tokens=12, **changes):
        return arrive(self.scheduler, self.device, name, prompt_len, max_tokens, self.t, **changes)

    def step(self):
        self.scheduler.check_integrity()
        return step(self.scheduler, self.device)

    def set_roles(self, roles, time=30.0):
        """Call for roles, and decide; return the call's number."""
        self.calls += 1
        counts = {} if isinstance(roles, dict) else dict(part.split("=") for part in roles.split(","))
        meshes = roles if isinstance(roles, dict) else {}
        counts = {role: int(count) for role, count in counts.items()}
        self.scheduler.on(SetRoles(self.t, self.calls, self.t + time, counts, meshes))
        self.actions = self.step()
        return self.calls

    def answer(self, call):
        answer = self.device.settled.get(call)
        return None if answer is None else answer.outcome

    def decode(self, request):
        """Let the pool run until this request decodes."""
        for _ in range(100):
            self.step()
            if request.state is State.DECODE:
                return request
            self.run_once()
        raise AssertionError(request.state)

    def run_once(self, transfers=True):
        """Let the device finish one step of every mesh, and what is under way."""
        self.t += 0.001
        for mesh, steps in enumerate(self.device.steps):
            if steps:
                self.device.complete_step(mesh, self.t)
        while transfers and self.device.transfers:
            self.device.complete_transfer(0, self.t)
        self.step()

    def finish(self):
        self.device.drain(self.t)
        self.scheduler.check_integrity()
        assert not self.scheduler.requests
        assert not any(mesh.draining for mesh in self.scheduler.meshes)
        return self.device.finished

    @property
    def roles(self):
        return self.scheduler.roles()


def mesh_of(request):
    return request.placement.mesh


# ---- a flip


def test_a_flip_with_nothing_to_drain_is_over_at_its_event():
    pool = Pool("prefill=1,decode=3")
    call = pool.set_roles("prefill=2,decode=2")
    assert pool.answer(call) == "reached"
    assert pool.roles == ["prefill", "prefill", "decode", "decode"]
    assert pool.scheduler.counters.flips == 1
    assert pool.scheduler.next_due() is None


def test_roles_that_are_there_already_are_reached_without_a_flip():
    pool = Pool("both=1,decode=2")
    assert pool.answer(pool.set_roles("both=1,decode=2")) == "reached"
    assert pool.answer(pool.set_roles({0: "both"})) == "reached"
    assert not pool.scheduler.counters.flips


def test_roles_may_be_mixed():
    pool = Pool("both=1,decode=1")
    requests = [pool.arrive(f"r{index}", prompt_len=12) for index in range(4)]
    for request in requests:
        pool.decode(request)
        assert request.prefilled_on == 0
    assert {mesh_of(request) for request in requests} <= {0, 1}
    assert pool.finish() == dict.fromkeys(["r0", "r1", "r2", "r3"], "length")


def test_meshes_with_least_to_drain_flip_and_as_few_as_can():
    pool = Pool("prefill=1,decode=3")
    for name in "abc":
        pool.decode(pool.arrive(name))
    idle = ({1, 2, 3} - {mesh_of(r) for r in pool.scheduler.requests.values()}) or {1}
    busy = [len(mesh.placed) for mesh in pool.scheduler.meshes]
    pool.set_roles("prefill=2,decode=2")
    (flipped,) = [index for index in (1, 2, 3) if pool.roles[index].startswith("prefill")]
    assert busy[flipped] == min(busy[1:])
    assert flipped == min(index for index in (1, 2, 3) if busy[index] == busy[flipped])
    assert flipped in idle or busy[flipped] > 0
    pool.finish()


def test_of_equal_meshes_the_first_take_the_first_roles():
    pool = Pool("both=3")
    pool.set_roles("prefill=1,decode=2")
    assert [mesh.role for mesh in pool.scheduler.meshes] == ["prefill", "decode", "decode"]


def test_roles_by_mesh_leave_the_others_as_they_are():
    pool = Pool("prefill=1,decode=3")
    assert pool.answer(pool.set_roles({3: "prefill", 2: "both"})) == "reached"
    assert pool.roles == ["prefill", "decode", "both", "prefill"]


def test_the_last_mesh_of_a_phase_keeps_it_until_another_has_it():
    pool = Pool("prefill=1,decode=1")
    call = pool.set_roles({0: "decode"})
    assert pool.answer(call) == "refused"
    assert "leave no mesh to prefill: the roles are prefill=1,decode=1" in pool.device.settled[call].why
    assert pool.answer(pool.set_roles({0: "decode", 1: "prefill"})) == "reached"
    assert pool.roles == ["decode", "prefill"]


def test_prompts_go_to_the_mesh_that_has_gained_prefill():
    pool = Pool("prefill=1,decode=1")
    pool.set_roles({0: "decode", 1: "prefill"})
    request = pool.arrive("a")
    pool.step()
    assert request.prefilled_on == 1
    pool.decode(request)
    assert mesh_of(request) == 0
    pool.finish()


def test_cached_pages_stay_usable_after_a_flip_and_back():
    pool = Pool("prefill=1,decode=1")
    pool.arrive("a", prompt_len=12, max_tokens=2, prompt="p")
    pool.finish()
    pool.set_roles({0: "both"})
    pool.set_roles({0: "decode", 1: "both"})
    pool.set_roles({0: "prefill", 1: "decode"})
    request = pool.arrive("b", prompt_len=12, max_tokens=2, prompt="p")
    pool.step()
    assert request.cache.cached_tokens >= 8
    pool.finish()


# ---- requests in the middle of a flip


def test_a_request_that_waits_for_credit_decodes_where_decoding_has_come():
    pool = Pool("prefill=1,decode=1", pages=8)
    long = pool.decode(pool.arrive("long", prompt_len=24, max_tokens=8))  # takes the decode pages
    waits = pool.arrive("waits", prompt_len=16)
    pool.step()
    assert waits.state is State.HANDOFF
    assert waits.handoff is None
    pool.set_roles("both=2")
    assert waits.state is State.DECODE
    assert mesh_of(waits) == 0
    assert not only(pool.actions, StartTransfer)
    assert mesh_of(long) == 1
    pool.finish()


def test_credit_that_was_not_used_is_given_back_by_a_mesh_that_stops_decoding():
    pool = Pool("prefill=1,decode=2", staging=8)
    _, _, third = (pool.arrive(name, prompt_len=8, max_tokens=20) for name in "abc")
    while third.state is not State.HANDOFF:
        pool.step()
        pool.run_once(transfers=False)
    assert third.handoff is not None
    assert not third.handoff.has_sent  # there is no staging left
    flipped = third.handoff.placement.mesh
    pool.set_roles({flipped: "prefill"})
    assert third.handoff is None or third.handoff.placement.mesh == 3 - flipped
    pool.decode(third)
    assert mesh_of(third) == 3 - flipped
    pool.finish()


def test_what_was_sent_arrives_on_a_draining_mesh_and_then_migrates_once():
    pool = Pool("prefill=1,decode=2")
    request = pool.arrive("a", max_tokens=20)
    pool.step()
    first = request.handoff.placement.mesh
    assert pool.device.transfers
    call = pool.set_roles({first: "prefill"})
    assert pool.roles[first] == "prefill (draining decode)"
    assert not only(pool.actions, DropTransfer)
    assert pool.answer(call) is None
    pool.run_once()  # it arrives, and leaves at once
    assert pool.scheduler.counters.migrations == 1
    while pool.answer(call) is None:
        pool.run_once()
    assert pool.answer(call) == "reached"
    assert pool.roles[first] == "prefill"
    pool.finish()
    assert pool.scheduler.counters.migrations == 1


def test_a_source_finishes_the_prompts_that_it_has_begun():
    pool = Pool("prefill=1,decode=2")
    request = pool.arrive("a", prompt_len=28, max_tokens=3)
    while not request.has_begun or request.handoff is None or not request.handoff.has_sent:
        pool.step()
        if request.dispatched:
            break
        pool.run_once(transfers=False)
    call = (
        pool.set_roles({0: "decode", 1: "prefill"})
        if request.handoff.placement.mesh == 2
        else pool.set_roles({0: "decode", 2: "prefill"})
    )
    del call
    pool.finish()
    assert pool.device.finished == {"a": "length"}


def test_prompts_of_which_nothing_was_computed_are_routed_again():
    pool = Pool("prefill=2,decode=1", slots=4)
    requests = [pool.arrive(f"r{index}", prompt_len=8, max_tokens=2) for index in range(6)]
    pool.step()
    unbegun = [r for r in requests if r.placement is not None and mesh_of(r) == 0 and not r.has_begun]
    assert unbegun
    pool.set_roles({0: "decode"})
    assert all(r.state is State.WAITING or r.prefilled_on == 1 for r in unbegun)
    assert not pool.scheduler.counters.preemptions
    pool.finish()


# ---- drains


def test_the_longest_leave_first_two_at_a_time():
    pool = Pool("both=2", slots=4, pages=32)
    requests = [pool.arrive(f"r{n}", prompt_len=4, max_tokens=n) for n in (8, 20, 12, 16)]
    pool.set_roles({1: "prefill"})
    while any(r.state is not State.DECODE for r in requests) or any(mesh_of(r) for r in requests):
        pool.run_once()
    pool.set_roles({1: "both"})
    call = pool.set_roles({0: "prefill"})
    assert [r.max_tokens for r in requests if r.state is State.HANDOFF] == [20, 16]
    pool.run_once(transfers=False)
    assert sum(r.state is State.HANDOFF for r in requests) == 2
    while pool.answer(call) is None:
        pool.run_once()
    assert pool.scheduler.counters.migrations > 2
    pool.finish()


def test_what_is_finished_sooner_than_moved_stays():
    pool = Pool("both=1,decode=2", links=SLOW)
    request = pool.decode(pool.arrive("a"))
    pool.scheduler.on(MigrateRequested(0.0, request.id, 1))
    pool.decode(request)
    call = pool.set_roles({1: "prefill"})
    assert pool.roles[1] == "prefill (draining decode)"
    pool.finish()
    assert pool.answer(call) == "reached"
    assert pool.scheduler.counters.migrations == 1


def test_with_every_page_taken_a_request_leaves_when_pages_are_freed():
    pool = Pool("both=2", pages=8)
    first, second = pool.arrive("a", prompt_len=27, max_tokens=5), pool.arrive("b", prompt_len=27, max_tokens=5)
    pool.decode(first), pool.decode(second)
    assert {mesh_of(first), mesh_of(second)} == {0, 1}
    call = pool.set_roles({mesh_of(first): "prefill"})
    assert pool.answer(call) is None
    assert first.state is State.DECODE
    pool.scheduler.on(AbortRequested(pool.t, second.id))
    pool.step()
    assert first.state is State.HANDOFF
    while pool.answer(call) is None:
        pool.run_once()
    assert not pool.scheduler.counters.preemptions
    pool.finish()


def test_a_mesh_that_fails_while_it_drains_has_drained():
    pool = Pool("both=3", links=SLOW)
    request = pool.decode(pool.arrive("a"))
    lost = mesh_of(request)
    call = pool.set_roles({lost: "prefill"})
    assert pool.answer(call) is None
    pool.device.lose(lost)
    pool.scheduler.on(MeshFailed(pool.t, lost, "boom"))
    pool.step()
    assert pool.answer(call) == "reached"
    assert pool.roles[lost] == "prefill"
    assert pool.finish() == {"a": "length"}


# ---- meshes that are gone


def go(pool, mesh):
    pool.device.lose(mesh)
    pool.scheduler.on(MeshFailed(pool.t, mesh, "boom", is_gone=True))
    pool.step()


def join(pool, mesh):
    pool.scheduler.on(MeshJoined(pool.t, mesh))
    pool.step()


@pytest.mark.parametrize(("gone", "stands_in"), [(0, 1), (1, 0)])
def test_the_mesh_that_is_left_does_both_until_the_one_that_is_gone_is_back(gone, stands_in):
    pool = Pool("prefill=1,decode=1")
    pool.decode(pool.arrive("a"))
    pool.arrive("b")
    go(pool, gone)
    assert pool.scheduler.meshes[stands_in].role is Role.BOTH
    assert pool.roles[gone].endswith("(gone)")
    assert pool.finish() == {"a": "length", "b": "length"}
    pool.arrive("c")
    join(pool, gone)
    assert pool.finish()["c"] == "length"
    assert pool.roles == ["prefill", "decode"]
    assert not pool.scheduler.counters.retries


def test_without_any_mesh_requests_wait_until_one_joins():
    pool = Pool("prefill=1,decode=1")
    for mesh in (0, 1):
        go(pool, mesh)
    pool.arrive("a")
    assert not pool.step()
    assert pool.set_roles("prefill=1,decode=1") in pool.device.settled
    join(pool, 1)
    assert pool.finish() == {"a": "length"}


def test_a_request_that_ends_every_process_fails_and_one_that_gets_on_outlives_any_number_of_losses():
    pool = Pool("both=2", max_retries=0)
    request = pool.decode(pool.arrive("a", max_tokens=20))
    for _ in range(5):
        before = request.confirmed
        while request.confirmed == before:
            pool.run_once()
            pool.step()
        lost = mesh_of(request)
        go(pool, lost)
        join(pool, lost)
    assert not request.retries
    for _ in range(MOST_LOSSES):  # before anything is read
        assert request.state is not State.FAILED
        lost = mesh_of(request)
        go(pool, lost)
        join(pool, lost)
    assert request.state is State.FAILED
    assert not request.retries
    assert pool.finish() == {"a": "error"}


# ---- calls beside calls


def test_the_last_call_wins_and_ends_drains_that_it_does_not_need():
    pool = Pool("prefill=1,decode=2", links=SLOW)
    requests = [pool.decode(pool.arrive(name, max_tokens=20)) for name in "ab"]
    assert {mesh_of(r) for r in requests} == {1, 2}
    earlier = pool.set_roles("prefill=2,decode=1")
    assert pool.roles == ["prefill", "prefill (draining decode)", "decode"]
    later = pool.set_roles("prefill=1,decode=2")
    assert pool.answer(earlier) == "superseded"
    assert pool.answer(later) == "reached"
    assert pool.roles == ["prefill", "decode", "decode"]  # the mesh that drained, not the first
    pool.finish()


def test_back_and_forth_while_requests_run_loses_nothing():
    pool = Pool("prefill=1,decode=1", pages=32)
    for index in range(12):
        pool.arrive(f"r{index}", prompt_len=9, max_tokens=9)
    swaps = [{0: "decode", 1: "prefill"}, {0: "prefill", 1: "decode"}]
    for index in range(20):
        pool.set_roles(swaps[index % 2])
        pool.run_once()
    assert len(pool.finish()) == 12
    assert [pool.answer(call) for call in range(1, 21)].count(None) == 0
    assert pool.answer(20) == "reached"


def test_a_flip_in_the_middle_of_another_waits_for_both():
    pool = Pool("prefill=1,decode=3", links=SLOW)
    requests = [pool.decode(pool.arrive(name, max_tokens=20)) for name in "abc"]
    assert {mesh_of(r) for r in requests} == {1, 2, 3}
    first = pool.set_roles({1: "prefill"})
    second = pool.set_roles({2: "prefill"})
    assert pool.answer(first) == "superseded"
    assert pool.roles == ["prefill", "prefill (draining decode)", "prefill (draining decode)", "decode"]
    pool.finish()
    assert pool.answer(second) == "reached"
    assert pool.roles == ["prefill", "prefill", "prefill", "decode"]


# ---- time


def test_room_that_has_come_is_offered_to_every_mesh_that_waits_for_some():
    pool = Pool("decode=1,both=2", pages=12, length=48)
    for name in ("a", "b"):
        pool.decode(pool.arrive(name, 15, 30))
        pool.scheduler.on(MigrateRequested(pool.t, name, 0))
        pool.run_once()
    long, short = (pool.decode(pool.arrive(name, length, 12)) for name, length in (("long", 32), ("short", 4)))
    assert (mesh_of(long), mesh_of(short)) == (1, 2)
    pool.set_roles("prefill=2,decode=1")
    assert pool.roles[1:] == ["prefill (draining decode)"] * 2
    assert long.state is short.state is State.DECODE
    pool.scheduler.on(AbortRequested(pool.t, "a"))
    pool.step()
    assert (long.state, short.state) == (State.DECODE, State.HANDOFF)
    pool.finish()


def test_room_that_is_made_on_a_mesh_that_drains_is_enough():
    pool = Pool("both=2", pages=12, slots=2, length=48)
    pool.arrive("a", 1, 1)
    pool.step()
    pool.arrive("b", 9, 1, prompt="q")
    second = pool.arrive("c", 9, 1, prompt="q", fork_of="b")
    pool.step()
    pool.scheduler.on(AbortRequested(pool.t, "a"))
    pool.step()
    batch = pool.arrive("d", 1, 1, is_batch=True)
    pool.step()
    pool.arrive("e", 33, 1)
    pool.step()
    pool.set_roles({0: "prefill", 1: "decode"})
    assert (second.state, mesh_of(second)) == (State.PREFILL, 0)
    assert (batch.state, batch.preempted) == (State.WAITING, 1)
    pool.finish()


def test_nobody_sleeps_for_a_prompt_on_a_mesh_that_takes_no_prompts_any_more():
    pool = Pool("both=3", prefill_buckets=(4,), length=48)
    pool.arrive("a", 24, prompt="p")
    pool.step()
    waiting = pool.arrive("b", 24, prompt="p")
    pool.step()
    assert waiting.sleeps_for is not None
    pool.set_roles({0: "decode"})
    assert waiting.state is State.PREFILL
    assert mesh_of(waiting) != 0
    pool.finish()


def late(pool, call):
    """Let the time of a call be over; return what it says."""
    pool.t = pool.scheduler.next_due()
    pool.scheduler.on(Tick(pool.t))
    pool.step()
    assert pool.answer(call) == "late"
    assert pool.scheduler.next_due() is None
    return pool.device.settled[call].why


def test_a_drain_that_takes_too_long_says_what_holds_it_and_leaves_the_roles():
    pool = Pool("prefill=1,decode=2", links=SLOW)
    request = pool.decode(pool.arrive("a", max_tokens=20))
    mesh = mesh_of(request)
    call = pool.set_roles({mesh: "prefill"}, time=5.0)
    assert pool.scheduler.next_due() == pool.t + 5.0
    why = late(pool, call)
    assert f"mesh {mesh} still decodes request a with 2 pages" in why
    assert why.endswith("which were expected to finish there sooner than to move; the roles are prefill=1,decode=2.")
    assert pool.roles == ["prefill", "decode", "decode"]
    pool.finish()


def test_want_of_room_is_named():
    pool = Pool("both=2", pages=8)
    first, second = pool.arrive("a", prompt_len=27, max_tokens=5), pool.arrive("b", prompt_len=27, max_tokens=5)
    pool.decode(first), pool.decode(second)
    assert "for which no other mesh that decodes has room" in late(pool, pool.set_roles({0: "prefill"}))
    pool.finish()


def test_meshes_that_have_flipped_stay_so_while_both_phases_are_covered():
    pool = Pool("prefill=1,decode=3", links=SLOW)
    request = pool.decode(pool.arrive("a", max_tokens=20))
    holds = mesh_of(request)
    idle = min({1, 2, 3} - {holds})
    late(pool, pool.set_roles({holds: "prefill", idle: "prefill"}))
    assert pool.roles[holds] == "decode"
    assert pool.roles[idle] == "prefill"
    pool.finish()


def test_a_mesh_that_has_flipped_goes_back_if_a_phase_would_be_without_one():
    pool = Pool("prefill=1,decode=1", links=SLOW)
    pool.decode(pool.arrive("a", max_tokens=20))
    call = pool.set_roles({0: "decode", 1: "prefill"})
    assert pool.roles == ["decode", "prefill (draining decode)"]
    late(pool, call)
    assert pool.roles == ["prefill", "decode"]
    assert pool.finish() == {"a": "length"}


def test_a_time_that_is_over_already_is_enough_for_a_flip_without_a_drain():
    pool = Pool("prefill=1,decode=2")
    assert pool.answer(pool.set_roles("prefill=2,decode=1", time=0.0)) == "reached"


def test_a_late_call_that_was_superseded_changes_nothing():
    pool = Pool("prefill=1,decode=2", links=SLOW)
    request = pool.decode(pool.arrive("a", max_tokens=20))
    pool.set_roles({mesh_of(request): "prefill"}, time=1.0)
    pool.set_roles({mesh_of(request): "prefill"}, time=100.0)
    pool.scheduler.on(Tick(pool.t + 2.0))
    pool.step()
    assert pool.roles[mesh_of(request)] == "prefill (draining decode)"
    pool.finish()


@pytest.mark.parametrize("mode", [{}, {"deterministic": True, "prefill_buckets": (8,)}, {"decode_steps": 3}])
def test_every_request_finishes_whatever_the_roles_become(mode):
    pool = Pool("prefill=1,decode=2", pages=12, **mode)
    calls = ["both=3", "prefill=2,decode=1", {0: "decode", 1: "both"}, "both=1,decode=2", "prefill=1,decode=2"]
    for index in range(30):
        pool.arrive(f"r{index}", prompt_len=1 + index % 20, max_tokens=1 + index % 9, prompt="pq"[index % 2])
        pool.run_once(transfers=index % 3 > 0)
        if index % 2:
            pool.set_roles(calls[index // 2 % len(calls)])
    assert len(pool.finish()) == 30
    assert None not in [pool.answer(call) for call in range(1, pool.calls + 1)]


def test_flips_and_drains_are_replayed_and_say_why():
    log = StringIO()
    pool = Pool("both=1,decode=2", pages=12, log=log)
    swaps = [{0: "decode", 1: "both"}, "both=3", "prefill=1,decode=2", "both=1,decode=2", {2: "prefill"}]
    for index in range(20):
        pool.arrive(index, prompt_len=1 + index, max_tokens=9, prompt="pq"[index % 2])
        pool.run_once(transfers=index % 3 > 0)
        pool.set_roles(swaps[index % len(swaps)], time=0.002)
    pool.finish()
    found = replay(StringIO(log.getvalue()))
    assert found.scheduler.roles() == pool.roles
    assert found.scheduler.counters.flips == pool.scheduler.counters.flips > 20
    assert '"type":"DrainChoice"' in log.getvalue()


@pytest.mark.parametrize("pages", range(5, 12))
def test_nobody_is_preempted_in_vain_on_a_mesh_that_drains_its_answers(pages):
    """Pages are left to the answers that drain there, as to all that grow."""
    pool = Pool("both=1,decode=1", links=SLOW, length=48)
    pool.decode(pool.arrive("answer", 24, prompt="p"))
    batch = pool.arrive("batch", 23, prompt="p", is_batch=True)
    pool.step()
    pool.set_roles("prefill=1,decode=1")
    urgent = pool.arrive("urgent", pages * PAGE)
    pool.step()
    assert (urgent.placement is not None) >= (batch.preempted > 0)
