"""How a request ends or starts over: finish, preemption, a lost mesh or transfer.

Invariant: `_leave` is the only way out of the queue, of hand-offs and of the meshes, and frees all that a request
holds; besides them only `requests` lists it, until it finishes.
"""

from itertools import count

from ..protocol.actions import Finish, FinishReason
from ..protocol.cache_report import MissReason
from .admission import Admission
from .deadlines import Deadlines
from .handoffs import Handoffs
from .mesh_state import MeshState, SharedState, in_order
from .order import candidates as may_give_way
from .policy import Policy
from .request import Request, State

MOST_LOSSES = 10  # of its process in a row that a request outlives without a token in between


class Lifecycle:
    """How the requests of an engine begin, end and start over."""

    def __init__(
        self, shared: SharedState, policy: Policy, admission: Admission, handoffs: Handoffs, deadlines: Deadlines
    ):
        """Begin without runs."""
        self._shared, self._policy = shared, policy
        self._admission, self._handoffs, self._deadlines = admission, handoffs, deadlines
        self._config, self._meshes, self._requests = shared.config, shared.meshes, shared.requests
        self._counters, self._emit = shared.counters, shared.emit
        self._runs = count()

    def enter(self, request: Request) -> None:
        """Add a new request to `requests` and to the queue."""
        request.run = next(self._runs)
        self._requests[request.id] = request
        if not request.is_batch:
            self._shared.interactive.enter()
        self._admission.add(request)

    # ---- ends

    def finish(
        self, request: Request, state: State, reason: FinishReason, now: float, error: str | None = None
    ) -> None:
        """End a request; its full pages stay in the prefix cache."""
        if state is not State.FAILED:  # then its KV is lost
            self._shared.sessions.end(request, self._config.page_size)
        self._leave(request, keeps_pages=True)
        request.move_to(state)
        request.timeline.finish = now
        self._deadlines.ended(request)
        del self._requests[request.id]
        if not request.is_batch:
            self._shared.interactive.end(now)
        self._emit(Finish(request.id, reason, error))

    def _leave(self, request: Request, *, keeps_pages: bool) -> None:
        """Free all that a request holds, and wake those that wait for it.

        If `keeps_pages`, its full pages stay in the prefix cache.
        """
        self._admission.wake((request.id,))
        if request.state is State.WAITING:
            self._admission.remove(request)
            return
        self._handoffs.cancel(request)
        self.answer(request)
        placement, request.placement = request.placement, None
        if placement is None:
            return
        mesh = self._meshes[placement.mesh]
        if keeps_pages:
            known = request.prompt_len + request.confirmed
            mesh.pages.remember(placement, request.hashes, min(request.kv_len, known))
        self._admission.wake(mesh.remove(request, placement))

    def answer(self, request: Request) -> None:
        """Subtract the request from the load of its prefill mesh: its first token is read, or will not come."""
        mesh = self._meshes[request.prefilled_on]
        mesh.begun -= request.begun
        mesh.change_load(-request.unanswered, is_batch=request.is_batch)
        request.unanswered = request.begun = 0

    # ---- new beginnings

    def preempt(self, request: Request) -> None:
        """Free the request's KV, and return it to its place in the queue."""
        if request.state is not State.WAITING:
            self._counters.preemptions += 1
            self._start_over(request, keeps_pages=True)

    def route_again(self, request: Request) -> None:
        """Return a request that was placed, and of which nothing was computed, to its place in the queue."""
        self._start_over(request, keeps_pages=True)

    def end_wait_for(self, request: Request) -> None:
        """Wake those that sleep for what a request computes: its mesh will take no prompt of theirs."""
        assert request.placement is not None
        self._admission.wake(self._meshes[request.placement.mesh].end_wait(request.placement))

    def displace(self, request: Request) -> None:
        """Preempt a request for another."""
        request.preempted += 1
        self.preempt(request)

    def make_way(self, request: Request, mesh: MeshState, *, may_move: bool) -> None:
        """Free pages for a request on a full mesh, at the expense of the policy's victim.

        The victim moves to another mesh, loses the pages reserved for its arrival, or starts over; without `may_move`
        it starts over.
        """
        victim = self._choose(request, mesh)
        if may_move and self._handoffs.migrate(victim, None):
            return
        if may_move and victim.placement is not None and victim.placement.mesh != mesh.index:
            self._handoffs.release_credit(victim)
        else:
            (self.preempt if victim is request else self.displace)(victim)

    def _choose(self, request: Request, mesh: MeshState) -> Request:
        candidates = may_give_way(request, mesh.give_way(request))
        victim = self._policy.victim(candidates)
        if victim not in candidates:
            raise RuntimeError(f"policy {self._policy.name!r} chose {victim!r}, which is no candidate for its victim")
        return victim

    def _start_over(self, request: Request, *, keeps_pages: bool) -> None:
        """Return a request to WAITING, in a new run.

        The tokens that it has generated are prefilled with the prompt, or in deterministic mode decoded again.
        """
        self._leave(request, keeps_pages=keeps_pages)
        request.move_to(State.WAITING)
        request.run = next(self._runs)
        request.restarts += 1
        request.prefilled = request.dispatched = 0
        request.forced = request.confirmed if self._config.deterministic else 0
        request.to_prefill = request.prompt_len + request.confirmed - request.forced
        self._admission.add(request)

    # ---- failures

    def lose_transfer(self, number: int, reason: str, now: float) -> None:
        """Start the request over whose transfer failed, if it still needs the transfer."""
        transfer = self._handoffs.end_transfer(number)
        if transfer is None or transfer.request_id is None:
            return
        request = self._requests[transfer.request_id]
        request.suspects = transfer.source  # a mesh that is lost shows in its transfers first
        self._retry(request, transfer.source, reason, now)

    def lose_mesh(self, mesh: MeshState, reason: str, now: float, *, is_gone: bool = False) -> None:
        """Start all requests over whose KV was on a lost mesh, or on its way from it, or only on its way to it.

        Where it `is_gone`, with its whole process, that is hardly a request's fault, and costs none of its tries. One
        that was lost so `MOST_LOSSES` times without a token in between fails: it may be what ends the processes.
        """
        mesh.in_flight.clear()
        mesh.wake()
        leaving = {request.id: request for request in self._handoffs.leaving(mesh.index)}
        here = {request.id: request for request in mesh.placed} | leaving
        for request in sorted(here.values(), key=in_order):
            is_here = request.placement is not None and request.placement.mesh == mesh.index
            goes_here = request.handoff is not None and request.handoff.placement.mesh == mesh.index
            if is_here or request.id in leaving or (goes_here and request.placement is None):
                (self._lose_process if is_gone else self._lose)(request, mesh.index, reason, now)
            elif goes_here:
                self._handoffs.release_credit(request)
        mesh.pages.flush(MissReason.MESH_LOST)

    def _lose_process(self, request: Request, mesh: int, reason: str, now: float) -> None:
        if request.confirmed > request.confirmed_when_lost:
            request.losses = 0
        request.losses, request.confirmed_when_lost = request.losses + 1, request.confirmed
        if request.losses > MOST_LOSSES:
            why = f"{reason} (after {request.losses} losses without a token)"
            self.finish(request, State.FAILED, "error", now, why)
        else:
            request.lost_on, request.suspects = mesh, None
            self._start_over(request, keeps_pages=False)

    def _lose(self, request: Request, mesh: int, reason: str, now: float) -> None:
        if request.suspects == mesh:  # its transfer failed for the same reason, and has cost it a try already
            request.suspects = None
            self._start_over(request, keeps_pages=False)
        else:
            self._retry(request, mesh, reason, now)

    def _retry(self, request: Request, lost_on: int, reason: str, now: float) -> None:
        request.retries += 1
        if request.retries > self._config.max_retries:
            tries = f" (after {request.retries} tries)" if request.retries > 1 else ""
            self.finish(request, State.FAILED, "error", now, reason + tries)
        else:
            request.lost_on = lost_on
            self._counters.retries += 1
            self._start_over(request, keeps_pages=False)
