"""Until when requests are served: each deadline is on the agenda from when its request is accepted until it is met,
missed, or the request has ended otherwise.

A deadline is judged when it is certain, and never by forecast: its time has passed, or the prompt tokens that are left
would take longer than what is left of it, at the cost that was measured, alone on an empty mesh. What comes after the
first token says nothing: it may be the last. So the agenda has the instant from which that is so, as things stand, and
when it comes what is left is looked at again. Batch requests are not ended by when they are due: their job goes on,
late.
"""

from collections.abc import Iterator

from ..protocol.service import Service
from .agenda import FIRST_TOKEN, LAST_TOKEN, Agenda, Due
from .mesh_state import SharedState
from .request import Request
from .router import Router


class Deadlines:
    """The deadlines of one engine's requests."""

    def __init__(self, shared: SharedState, agenda: Agenda[Due], router: Router):
        """Begin without any; `agenda` says when one is to be judged."""
        self._agenda, self._router, self._costs = agenda, router, shared.costs
        self._page_size = shared.config.page_size
        tps = [spec.tp for spec in shared.config.topology.meshes]
        self._meshes = [tps.index(tp) for tp in sorted(set(tps))]  # one of each kind

    def enter(self, request: Request) -> None:
        """Take in what was asked of a request that is accepted."""
        if _has_any(request.facts.service):
            left = self._least_left(request)
            for kind, deadline in self._instants(request):
                self._agenda.set((kind, request.id), deadline - left)

    def is_missed(self, request: Request, kind: str, now: float) -> bool:
        """Judge a deadline whose entry has come; one that may still be met has a later entry from here on."""
        judged = dict(self._instants(request))[kind] - self._least_left(request)
        if now < judged:
            self._agenda.set((kind, request.id), judged)
        return now >= judged

    def answered(self, request: Request) -> None:
        """Note that a request's first token was read."""
        if request.facts.service.first_token_deadline is not None:
            self._agenda.drop((FIRST_TOKEN, request.id))

    def ended(self, request: Request) -> None:
        """Note that a request has ended."""
        if _has_any(request.facts.service):
            self._agenda.drop((LAST_TOKEN, request.id))
            self._agenda.drop((FIRST_TOKEN, request.id))

    def _instants(self, request: Request) -> Iterator[tuple[str, float]]:
        """Yield the request's deadlines, by kind."""
        service, arrival = request.facts.service, request.timeline.arrival
        if service.deadline is not None:
            yield LAST_TOKEN, arrival + service.deadline
        if service.first_token_deadline is not None and request.timeline.first_token is None:
            yield FIRST_TOKEN, arrival + service.first_token_deadline

    def _least_left(self, request: Request) -> float:
        """Return the seconds that the request needs at least until its next token."""
        # One that forks another computes a single token once that one's prompt is there.
        if request.dispatched or (request.facts.fork_of is not None and not request.restarts):
            return 0.0
        done = request.prefilled
        if request.placement is None:
            done = self._router.blocks_cached(request) * self._page_size
        tokens, costs = max(0, request.to_prefill - done), self._costs
        return min([costs.prefill(mesh, tokens) if costs.is_measured(mesh) else 0.0 for mesh in self._meshes])


def _has_any(service: Service) -> bool:
    return service.deadline is not None or service.first_token_deadline is not None
