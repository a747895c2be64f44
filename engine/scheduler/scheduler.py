"""Which mesh does what next: events in through `on`, actions out through `actions`.

Invariants: a prompt's pages and slot on its prefill mesh are reserved at once before its first chunk, its decode slot
and pages (credit) at once before its first transfer; a transfer is scattered only once it is ready; pages and slots are
freed as soon as the last action that reads them has been given out, because each mesh performs actions in order. A
decoding request takes pages as it grows; where none are left another gives its own up, never the first in the policy's
order, which always goes on. A result belongs to a request's run: one of an earlier run changes nothing.
No clock, randomness or I/O: a replay of the same events gives the same actions (`decision_log.py`).
"""

from collections.abc import Sequence

from ..config import EngineConfig, PoolSize
from ..protocol.actions import Action, Chunk, DecodeRow, StartTransfer
from ..protocol.cache_report import MissReason
from ..protocol.events import (
    AbortRequested,
    Arrived,
    Event,
    Hold,
    MeshFailed,
    MigrateRequested,
    Outcome,
    PreemptRequested,
    RequestFacts,
    RequestFailed,
    Resume,
    ServiceChanged,
    SetRoles,
    StepDone,
    TransferFailed,
    TransferReady,
)
from ..protocol.service import Service
from ..protocol.timeline import Timeline
from .admission import Admission
from .agenda import PLAN, ROLES_CALL, Agenda, Due
from .batching import Batching
from .cost import PRIORS, Priors
from .deadlines import Deadlines
from .drains import Drains
from .handoffs import Handoffs
from .lifecycle import Lifecycle
from .mesh_state import MeshState, shared_state
from .notes import Note
from .order import Order, place_in_order, weigh
from .planning import Planning
from .policy import FCFS, Policy, check_policy
from .preemption import Preemption
from .request import Request, State
from .roles import Roles
from .router import Router
from .staging import Staging
from .steady import Steady, find_steady, may_be_steady


class Scheduler:
    """One engine's decisions over all its meshes.

    Raises:
        ValueError: a policy that cannot be used.
    """

    def __init__(self, config: EngineConfig, pools: Sequence[PoolSize], policy: Policy = FCFS, priors: Priors = PRIORS):
        """Begin without requests; `pools[i]` is the size of mesh i's KV memory, `priors` what work costs before any was
        measured."""
        check_policy(policy, config)
        self._out: list[Action] = []
        self._shared = shared = shared_state(config, pools, self._out.append, priors)
        self.config, self.policy, self.counters = config, policy, shared.counters
        self.pools = tuple(pools)
        self.costs, self.meshes, self.requests = shared.costs, shared.meshes, shared.requests
        self._router = Router(shared, policy)
        self._handoffs = Handoffs(shared, self._router, Staging(shared, pools))
        self._admission = Admission(shared, self._router, self._handoffs.inheritance)
        self._agenda = Agenda[Due]()
        self._deadlines = Deadlines(shared, self._agenda, self._router)
        self._lifecycle = Lifecycle(shared, policy, self._admission, self._handoffs, self._deadlines)
        self._preemption = Preemption(shared, self._lifecycle)
        self._batching = Batching(shared, self._admission, self._handoffs, self._lifecycle)
        drains = Drains(shared, self._router, self._handoffs, self._lifecycle)
        self._roles = Roles(shared, drains, self._agenda)
        self._planning = (
            Planning(shared, self._roles, self._agenda, self._admission, self._handoffs) if config.plans_roles else None
        )
        self._now = 0.0
        self._arrivals = self._tokens_arrived = 0

    # ---- events

    def on(self, event: Event) -> None:
        """Take in an event; decisions wait for `actions`."""
        self.pass_time(event.t)
        match event:
            case Arrived(t=t, facts=facts):
                self._let_happen_what_is_due()  # before it: whoever sends a request finds it here
                self._on_arrival(t, facts)
                return
            case AbortRequested(request_id=id_) if id_ in self.requests:
                self._lifecycle.finish(self.requests[id_], State.ABORTED, "abort", self._now)
            case PreemptRequested(request_id=id_) if id_ in self.requests:
                self._lifecycle.preempt(self.requests[id_])
            case MigrateRequested(request_id=id_, destination=destination) if id_ in self.requests:
                self._handoffs.migrate(self.requests[id_], destination)
            case ServiceChanged(request_id=id_, service=service) if id_ in self.requests:
                self._serve(self.requests[id_], service)
            case StepDone(t=t, mesh=mesh, step=step, outcomes=outcomes):
                self._on_step_done(self.meshes[mesh], step, t, outcomes)
            case TransferReady(t=t, transfer=number):
                self.costs.end_transfer(number, t)
                self._handoffs.transfer_ready(number, self._now)
            case TransferFailed(transfer=number, reason=reason):
                self.costs.end_transfer(number, None)
                self._lifecycle.lose_transfer(number, reason, self._now)
            case RequestFailed(request_id=id_, reason=reason) if id_ in self.requests:
                self._lifecycle.finish(self.requests[id_], State.FAILED, "error", self._now, reason)
            case MeshFailed(mesh=mesh, reason=reason):
                self.costs.lose_mesh(mesh)
                self._batching.forget(self.meshes[mesh])
                self._lifecycle.lose_mesh(self.meshes[mesh], reason, self._now)
            case SetRoles():
                self._roles.set_roles(event)
                if self._planning is not None:
                    self._planning.asked(self._now)
            case Hold():
                self._admission.is_held = True
            case Resume():
                self._on_resume()
        self._let_happen_what_is_due()  # afterwards: tokens that came with the event count; `Tick` does nothing else

    def find_steady(self, mesh: int, running: list[Request], queued: list[Request]) -> Steady | None:
        """Look whether a mesh only decodes, whose two steps in flight are decode steps of these rows; None: it does
        not, or nobody can tell."""
        can_tell = may_be_steady(self._shared)
        return find_steady(self.meshes[mesh], running, queued) if can_tell else None

    @property
    def has_several_levels(self) -> bool:
        """Return whether requests of more than one class or priority have a place: some may have to give way."""
        return self._shared.levels.are_several

    def pass_time(self, t: float) -> None:
        """Take in that it is `t`, unless it was later already."""
        self._now = self.costs.now = max(self._now, t)  # stamps of several threads may arrive out of order
        self._shared.index.lost.now = self._now

    def next_due(self) -> float | None:
        """Return the next instant that matters, in seconds; None: there is none. An event of that time, a `Tick` if
        there is no other, lets happen what is due then."""
        return self._agenda.next_due()

    def owner(self, row: Chunk | DecodeRow) -> Request | None:
        """Find the running request that a result for this row belongs to; None when it came too late."""
        request = self.requests.get(row.request_id)
        return request if request is not None and request.run == row.run else None

    @property
    def seated(self) -> list[int]:
        """List the requests that were given their first seat by the last `actions`."""
        return self._admission.seated

    def count_cached(self, request_id: int) -> int:
        """Count the prompt tokens of a waiting request that some mesh has cached now."""
        request = self.requests.get(request_id)
        return 0 if request is None else self._router.blocks_cached(request) * self.config.page_size

    def is_in_flight(self, mesh: int, step: int) -> bool:
        """Return whether this step's result is still awaited."""
        return step in self.meshes[mesh].in_flight

    def transfer_bytes(self, action: StartTransfer) -> int:
        """Return the bytes that a transfer moves."""
        return self._handoffs.staging.bytes_on(action.source, action.bucket)

    def request_of(self, transfer: int) -> int | None:
        """Return the id of the request whose KV a transfer moves; None: it is over, or not needed any more."""
        return self._handoffs.request_of(transfer)

    def transfers_from(self, mesh: int) -> list[int]:
        """List the transfers that leave this mesh and have not arrived."""
        return self._handoffs.under_way_from(mesh)

    def roles(self) -> list[str]:
        """Return the role of each mesh, with what is left of the one before, as in "decode (draining prefill)"."""
        return self._roles.shown()

    @property
    def plan(self) -> str | None:
        """Say what the planner of the roles found last, and why, in a sentence; None: nothing yet, or there is none."""
        last = self._planning.last if self._planning is not None else None
        return None if last is None else last.sentence

    @property
    def is_held(self) -> bool:
        """Return whether only requests that start over are admitted."""
        return self._admission.is_held

    @property
    def is_drained(self) -> bool:
        """Return whether no request has started; while admission is held, none will."""
        return all(request.restarts == 0 and request.state is State.WAITING for request in self.requests.values())

    def _on_arrival(self, t: float, facts: RequestFacts) -> None:
        request = Request(
            facts, self._arrivals, Timeline(t), self._tokens_arrived, facts.service.slo or self.config.slo,
            accepted=self._now, to_prefill=facts.prompt_len,
        )  # fmt: skip
        self._arrivals += 1
        self._tokens_arrived += facts.prompt_len
        request.order = self._place_in_order(request)
        if self.config.prefix_cache:
            request.hashes = list(facts.block_hashes)
        self._lifecycle.enter(request)
        self._deadlines.enter(request)
        if self._planning is not None:
            self._planning.arrived(request, self._now)

    def _place_in_order(self, request: Request) -> Order:
        """Find the request's place in the order, which is never before the request that it forks."""
        weigh(request, self.config)
        fork_of = request.facts.fork_of
        return place_in_order(request, self.policy, None if fork_of is None else self.requests.get(fork_of))

    def _serve(self, request: Request, service: Service) -> None:
        """Let a request start over, served in this way, with those that fork it: one that forks another which is here
        is served as that one is, so that it never comes before it."""
        if request.facts.fork_of is None or request.facts.fork_of not in self.requests:
            for one in (request, *dict.fromkeys(request.siblings)):
                if one.id in self.requests and one.facts.service != service:
                    self._serve_otherwise(one, service)

    def _serve_otherwise(self, request: Request, service: Service) -> None:
        self._lifecycle.preempt(request)
        self._admission.remove(request)
        self._deadlines.ended(request)
        before = request.is_batch
        request.serve(service)
        self._shared.interactive.change(before, request.is_batch, self._now)
        self._deadlines.enter(request)
        request.order = self._place_in_order(request)
        self._admission.put_back(request)

    def _on_step_done(self, mesh: MeshState, step: int, t: float, outcomes: Sequence[Outcome]) -> None:
        if step not in mesh.in_flight:  # dispatched before the mesh failed
            return
        mesh.in_flight.remove(step)
        self._batching.ended(mesh, step, self.costs.end_step(mesh.index, step, t))
        mesh.wake()
        now, requests = self._now, self.requests
        for outcome in outcomes:
            request = requests[outcome.request_id]
            request.confirmed += 1
            request.timeline.stamp_token(now)
            if request.unanswered:
                self._answer(request)
            if outcome.block_hash is not None:
                self._know_block(request, outcome.block_hash)
            if outcome.stopped or request.confirmed == request.max_tokens:
                self.costs.outputs.add(request.confirmed)
                if self._planning is not None:
                    self._planning.ended(request, now)
                self._lifecycle.finish(request, State.FINISHED, "stop" if outcome.stopped else "length", now)
            elif request.handoff is not None:
                self._handoffs.complete(request, now)

    def _answer(self, request: Request) -> None:
        """Take in that the first token of a run was read."""
        self._lifecycle.answer(request)
        self._deadlines.answered(request)
        if request.timeline.prefill_end is None:
            request.timeline.prefill_end = self._now

    def _know_block(self, request: Request, block_hash: bytes) -> None:
        if self.config.prefix_cache:
            (request.unshared if self.config.deterministic else request.hashes).append(block_hash)

    def _let_happen_what_is_due(self) -> None:
        for kind, id_ in self._agenda.pop_due(self._now):
            if kind == ROLES_CALL:
                self._roles.end_time(id_)
            elif kind == PLAN:
                assert self._planning is not None
                self._planning.due(self._now)
            elif id_ in self.requests:  # of two deadlines that have come at once, the second finds it gone
                self._judge(self.requests[id_], kind)

    def _judge(self, request: Request, deadline: str) -> None:
        """End a request that misses this deadline."""
        if self._deadlines.is_missed(request, deadline, self._now):
            self._lifecycle.finish(request, State.EXPIRED, "deadline", self._now)

    def _on_resume(self) -> None:
        self._admission.is_held = False
        for mesh in self.meshes:
            mesh.pages.flush(MissReason.WEIGHTS_CHANGED)
        self._shared.index.lost.void()

    # ---- decisions

    def actions(self) -> list[Action]:
        """Return everything that can be dispatched now, in order. Freed pages may let more in, hence the loop."""
        admission, handoffs, preemption, emitted = self._admission, self._handoffs, self._preemption, self._out
        before = (-1, -1)
        preemption.begin()
        admission.seated.clear()
        while self._shared.due or before != (len(emitted), self.counters.preemptions):
            before = len(emitted), self.counters.preemptions
            admission.admit(self._now)
            while preemption.for_prompt(admission.first_refused):
                admission.admit(self._now)
            due = sorted(self._shared.due)
            self._shared.due.clear()
            for index in due:
                while self._batching.dispatch_step(self.meshes[index], self._now):
                    handoffs.dispatch()  # at once: behind the mesh's next step, a gather would wait for that too
            handoffs.dispatch()
            while preemption.for_credit(handoffs.first_refused):
                handoffs.dispatch()
            self._roles.look(due)
        out = emitted.copy()
        emitted.clear()
        return out

    def keep_notes(self) -> None:
        """Have notes made of why it is decided so, for `take_notes`."""
        self._shared.notes.keep()

    def take_notes(self) -> list[Note]:
        """Return the notes of what was taken in and decided since the last call, in order; empty unless kept."""
        return self._shared.notes.take()

    def check_integrity(self) -> None:
        """Raise if a page or slot is lost or doubled, or held by anything but a request that is here, or if a request
        sleeps for something that is not under way."""
        for mesh in self.meshes:
            placements = {
                request.id: placement
                for request in self.requests.values()
                for placement in (request.placement, None if request.handoff is None else request.handoff.placement)
                if placement is not None and placement.mesh == mesh.index
            }
            mesh.pages.check(placements)
            placed = {request.id for request in mesh.placed}
            if placed != set(placements) or len(mesh.placed) != len(placed):
                raise RuntimeError(f"mesh {mesh.index}: placements of {set(placements)}, listed {placed}")
            load = sum(request.unanswered for request in self.requests.values() if request.prefilled_on == mesh.index)
            begun = sum(request.begun for request in self.requests.values() if request.prefilled_on == mesh.index)
            if (mesh.prefill_load, mesh.begun) != (load, begun) or mesh.to_compute < 0:
                raise RuntimeError(
                    f"mesh {mesh.index}: {mesh.begun} of {mesh.prefill_load} tokens begun, not {begun} of {load}"
                )
            mesh.check()
        self.costs.check([mesh.in_flight for mesh in self.meshes])
        self._shared.levels.check((request.level, mesh.index) for mesh in self.meshes for request in mesh.placed)
        self._router.check()
        self._shared.sessions.check()
        self._admission.check()
        self._handoffs.check()
        self._roles.check()
