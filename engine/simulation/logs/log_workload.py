"""The load of a run that was logged: the same requests again, with the answers' lengths that they had.

A request comes at the time at which it was called for, or after the end of the one that it waited for: a line of a
batch, whose caller keeps only so many at once, and the next turn of a conversation, which nobody can take before the
one before it is answered. A call that waited for something that no log tells of, such as the user's own loop around
`generate`, comes at its time. Completions of one prompt (n > 1) become requests that begin with the same blocks.
"""

from dataclasses import dataclass

from msgspec.structs import replace

from ...protocol.actions import FinishReason
from ..incidents import Aborted, Incident
from ..workload import Workload, WorkRequest
from .logged_run import LoggedRequest, LoggedRun

# Requests that might have had more tokens: they are given the most they may have, and end as they did.
_CUT_SHORT: tuple[FinishReason, ...] = ("abort", "deadline")


@dataclass(frozen=True)
class LoggedLoad:
    """A run's load."""

    workload: Workload
    ids: tuple[int, ...]  # the request's id in the log, by its number in the workload
    incidents: tuple[Incident, ...]  # callers who gave up, at the times at which they did


def load_of(run: LoggedRun) -> LoggedLoad:
    """Make a workload of a run's requests."""
    return _Maker(run).make()


class _Maker:
    """The requests of one run, in the order of a workload: those with a time in its order, others behind what they wait
    for."""

    def __init__(self, run: LoggedRun) -> None:
        self._run, self._start = run, run.start
        self._latest: dict[str, LoggedRequest] = {}  # of each conversation
        self._numbers: dict[int, int] = {}  # by id
        self._blocks: dict[bytes, int] = {}

    def make(self) -> LoggedLoad:
        requests = sorted(self._run.requests.values(), key=lambda request: (request.called, request.facts.id))
        self._numbers = {request.facts.id: number for number, request in enumerate(requests)}
        made = tuple([self._request(request) for request in requests])
        ids = tuple([request.facts.id for request in requests])
        aborts = [
            Aborted(abort.t - self._start, self._numbers[abort.request_id])
            for abort in self._run.aborts
            if abort.request_id in self._run.requests and self._run.requests[abort.request_id].reason == "abort"
        ]
        return LoggedLoad(Workload(self._run.name, made, self._run.header.config.page_size), ids, tuple(aborts))

    def _request(self, request: LoggedRequest) -> WorkRequest:
        facts = request.facts
        before = self._waited_for(request)
        if facts.service.session is not None:
            self._latest[facts.service.session] = request
        at: float | None = request.called - self._start
        after, pause = None, 0.0
        if before is not None and before.finish is not None:
            at, after, pause = None, self._numbers[before.facts.id], max(0.0, request.called - before.finish)
        output = facts.max_tokens if request.reason in _CUT_SHORT else max(1, request.tokens)
        service, blocks = facts.service, self._ids(request)
        if service.due is not None:  # an instant, on the engine's clock
            service = replace(service, due=service.due - self._start)
        return WorkRequest(facts.prompt_len, output, at, after, pause, blocks, service.session, service)

    def _waited_for(self, request: LoggedRequest) -> LoggedRequest | None:
        """Find the request whose end this one waited for; None: it came at a time of its own."""
        after = None if request.stamps is None else request.stamps.after
        if after is not None:
            return self._run.requests.get(after)
        session = request.facts.service.session
        before = None if session is None else self._latest.get(session)
        if before is None or before.finish is None or before.finish > request.called:
            return None
        return before

    def _ids(self, request: LoggedRequest) -> tuple[int, ...]:
        """Return an id for each page of the request, as far as anybody may share it; the first that nobody knows is
        its own."""
        if not request.facts.block_hashes and not request.hashes:
            return ()
        known = [self._blocks.setdefault(block, len(self._blocks)) for block in request.hashes]
        return (*known, -1 - request.facts.id)
