"""Until when requests are served: each deadline is on the agenda from when its request is accepted until it is met,
passed, or the request has ended otherwise.

A deadline is judged when it is certain, and never by forecast. Batch requests are not ended by when they are due:
their job goes on, late.
"""

from ..protocol.service import Service
from .agenda import Agenda
from .request import Request

LAST_TOKEN, FIRST_TOKEN = "deadline", "first token deadline"  # kinds of entries of the agenda


class Deadlines:
    """The deadlines of one engine's requests."""

    def __init__(self, agenda: Agenda[tuple[str, int]]):
        """Begin without any; `agenda` says when one has come."""
        self._agenda = agenda

    def enter(self, request: Request) -> None:
        """Take in what was asked of a request that is accepted."""
        service, arrival = request.facts.service, request.timeline.arrival
        if service.deadline is not None:
            self._agenda.set((LAST_TOKEN, request.id), arrival + service.deadline)
        if service.first_token_deadline is not None:
            self._agenda.set((FIRST_TOKEN, request.id), arrival + service.first_token_deadline)

    def answered(self, request: Request) -> None:
        """Note that a request's first token was read."""
        if request.facts.service.first_token_deadline is not None:
            self._agenda.drop((FIRST_TOKEN, request.id))

    def ended(self, request: Request) -> None:
        """Note that a request has ended."""
        if _has_any(request.facts.service):
            self._agenda.drop((LAST_TOKEN, request.id))
            self._agenda.drop((FIRST_TOKEN, request.id))


def _has_any(service: Service) -> bool:
    return service.deadline is not None or service.first_token_deadline is not None
