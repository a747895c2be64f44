"""What became of each request: a slice from its arrival to its end, and in it those of its phases.

Phases are those of its timeline (`protocol/timeline.py`): queued until its first chunk was dispatched, prefill until
its first token was read, hand-off until its KV was where it decodes, decode. One that starts over is queued again.
Requests share lanes, so there are as many as were about at once.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ...protocol.actions import Action, DropTransfer, Finish, Fused, Prefill, Scatter, StartTransfer
from ...protocol.events import Arrived, RequestFacts, StepDone, TransferFailed, TransferReady
from ...protocol.stamps import RequestStamps
from ...scheduler.request import Request, State
from ...scheduler.scheduler import Scheduler
from .timeline_tracks import Begin, Count, End, Lane, Lanes, Mark, Notes, Track

Phase = Literal["queued", "prefill", "hand-off", "decode"]


@dataclass(slots=True, eq=False)
class _Drawn:
    """A request that has not ended."""

    lane: Lane
    arrival: float
    max_tokens: int
    phase: Phase = "queued"
    tokens: int = 0
    finish: float | None = None  # when its last token was read
    stamps: RequestStamps | None = None


class RequestTimeline:
    """The requests of one run."""

    def __init__(self, scheduler: Scheduler, emit: Callable[[Mark], None], first: int) -> None:
        """Begin without requests; the tracks come in order from `first` on; `emit` takes the marks."""
        self._scheduler, self._emit = scheduler, emit
        self._counters = Track("waiting", None, first, "requests"), Track("running", None, first + 1, "requests")
        self._lanes = Lanes("requests", Track("requests", None, first + 2), 0)
        self._requests: dict[int, _Drawn] = {}
        self._owners: dict[int, int] = {}  # transfer -> request, of those under way
        self._waiting = 0
        self._counted: tuple[int, ...] = ()
        self._changes: tuple[int, ...] = ()

    def happened(self, event: object, now: float) -> None:
        """Take in an event that the scheduler has taken in."""
        if isinstance(event, Arrived):
            self._arrived(event.t, event.facts)
        elif isinstance(event, StepDone):
            for outcome in event.outcomes:
                drawn = self._requests.get(outcome.request_id)
                if drawn is not None:
                    drawn.tokens += 1
                    if outcome.stopped or drawn.tokens == drawn.max_tokens:
                        drawn.finish = now
            self._look({outcome.request_id for outcome in event.outcomes}, now)
        elif isinstance(event, TransferReady) and event.transfer in self._owners:
            self._look((self._owners[event.transfer],), now)
        elif isinstance(event, TransferFailed):
            self._owners.pop(event.transfer, None)
        self._look_at_all(now)

    def decided(self, actions: Sequence[Action], now: float) -> None:
        """Take in what was decided."""
        touched = set[int]()
        for action in actions:
            match action:
                case Prefill() | Fused():
                    touched.update([chunk.request_id for chunk in action.chunks])
                case StartTransfer(transfer=number):
                    id_ = self._scheduler.request_of(number)
                    if id_ is not None:
                        self._owners[number] = id_
                        touched.add(id_)
                case Scatter(transfer=number) if number in self._owners:
                    touched.add(self._owners.pop(number))
                case DropTransfer(transfer=number):
                    self._owners.pop(number, None)
                case Finish():
                    self._finish(action, now)
        self._look(touched, now)
        self._look_at_all(now)
        self._count(now)

    def stamped(self, stamps: object) -> None:
        """Keep what is told with the end of the queue."""
        if isinstance(stamps, RequestStamps) and (drawn := self._requests.get(stamps.request_id)) is not None:
            drawn.stamps = stamps

    def end(self, now: float) -> None:
        """End what is open when the log ends."""
        for id_ in list(self._requests):
            self._close(id_, now, "the log ends")

    # ---- one request

    def _arrived(self, t: float, facts: RequestFacts) -> None:
        lane = self._lanes.take(t)
        self._requests[facts.id] = _Drawn(lane, t, facts.max_tokens)
        self._waiting += 1
        self._emit(Begin(lane.track, t, f"request {facts.id}", _facts(facts)))
        self._emit(Begin(lane.track, t, "queued"))

    def _look(self, ids: Iterable[int], now: float) -> None:
        """Draw the phases of requests of which something has happened."""
        for id_ in ids:
            drawn, request = self._requests.get(id_), self._scheduler.requests.get(id_)
            if drawn is not None and request is not None and (phase := _phase(request)) != drawn.phase:
                self._change(drawn, request, phase, now)

    def _look_at_all(self, now: float) -> None:
        """Look at all where requests that no line names may have started over."""
        counters = self._scheduler.counters
        changes = counters.preemptions, counters.retries, counters.migrations, counters.flips
        if changes != self._changes:
            self._changes = changes
            self._look(list(self._requests), now)

    def _change(self, drawn: _Drawn, request: Request, phase: Phase, now: float) -> None:
        track, mesh = drawn.lane.track, request.placement.mesh if request.placement is not None else None
        self._waiting += (phase == "queued") - (drawn.phase == "queued")
        self._emit(End(track, now, _queued(drawn) if drawn.phase == "queued" else ()))
        drawn.phase = phase
        notes: Notes = () if mesh is None else (("mesh", mesh),)
        if phase == "prefill" and request.cache is not None:
            notes += (("cached tokens", request.cache.cached_tokens), ("prefix cache", str(request.cache)))
        if phase == "queued":
            notes += (("starts over", request.restarts),)
        self._emit(Begin(track, now, phase, notes))

    def _finish(self, action: Finish, now: float) -> None:
        self._close(action.request_id, now, action.reason, () if action.error is None else (("error", action.error),))

    def _close(self, id_: int, now: float, why: str, more: Notes = ()) -> None:
        drawn = self._requests.pop(id_, None)
        if drawn is None:
            return
        self._waiting -= drawn.phase == "queued"
        end = max(drawn.arrival, now if drawn.finish is None else drawn.finish)
        self._emit(End(drawn.lane.track, end))
        self._emit(End(drawn.lane.track, end, (("ended", why), ("generated tokens", drawn.tokens), *more)))
        self._lanes.give_back(drawn.lane, end)

    def _count(self, now: float) -> None:
        counts = self._waiting, len(self._requests) - self._waiting
        if counts == self._counted:
            return
        self._counted = counts
        for track, count in zip(self._counters, counts, strict=True):
            self._emit(Count(track, now, count))


def _phase(request: Request) -> Phase:
    if request.state is State.WAITING or (request.unanswered and not request.has_begun):
        return "queued"
    if request.unanswered:
        return "prefill"
    return "hand-off" if request.state is State.HANDOFF else "decode"


def _facts(facts: RequestFacts) -> Notes:
    service = facts.service
    notes: Notes = (("prompt tokens", facts.prompt_len), ("most tokens", facts.max_tokens))
    if service.is_batch:
        notes += (("class", "batch"),)
    if service.priority:
        notes += (("priority", service.priority),)
    if service.session is not None:
        notes += (("session", service.session),)
    return notes if facts.fork_of is None else (*notes, ("fork of", facts.fork_of))


def _queued(drawn: _Drawn) -> Notes:
    """Say what of the time in the queue passed before the scheduler knew of the request."""
    stamps = drawn.stamps
    if stamps is None:
        return ()
    times = ("tokenised", stamps.tokenised), ("entered", stamps.entered), ("accepted", stamps.accepted)
    notes: Notes = tuple((f"{what} after, ms", round(1e3 * (t - drawn.arrival), 3)) for what, t in times)
    return notes if stamps.after is None else (*notes, ("waited for the end of request", stamps.after))
