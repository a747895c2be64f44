"""One turn of an engine after the other: messages to the scheduler, actions to an executor, tokens to their callers.

It has no thread, no queue and no clock of its own, so that whoever drives it says what comes next and when: a thread
that waits for messages (`engine_core.py`), or a simulation that goes from one instant to the next. Invariants: every
accepted request gets exactly one final `Update`; a mesh that raises, or whose messages cannot be read, is reset and its
requests start over, a bounded number of times. What a turn does is elsewhere: actions in `dispatcher.py`, tokens and
updates in `running_requests.py`. Not thread-safe, but for `figures`.
"""

from collections.abc import Callable, Iterable

from ..config import EngineConfig
from ..metrics.counters import HostTime
from ..protocol.actions import FinishReason, ResetMesh
from ..protocol.events import (
    AbortRequested,
    Arrived,
    MeshJoined,
    MigrateRequested,
    PreemptRequested,
    ServiceChanged,
    StepDone,
    Tick,
    TransferFailed,
)
from ..protocol.executor import Executor
from ..protocol.results import Completion, MeshLost, StepFailed, StepResult
from ..protocol.timeline import Timeline
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from .changes import Change, Changes, Freeze
from .dispatcher import Dispatcher
from .inspection import Observers, Question
from .running_request import RunningRequest
from .running_requests import RunningRequests
from .submission import Submission

type RequestEvent = PreemptRequested | MigrateRequested | AbortRequested | ServiceChanged
type Message = tuple[Submission, ...] | RequestEvent | Completion | Tick | Change | Question


class Loop:
    """What an engine does between two waits."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Callable[[], float],
        running: Callable[[Submission, Request, EngineConfig], RunningRequest] = RunningRequest,
    ) -> None:
        """Begin without requests; `clock` gives seconds, and `running` makes what keeps a request's tokens."""
        self.scheduler, self.executor, self._running = scheduler, executor, running
        self.requests = RunningRequests(scheduler.config.page_size)
        self.observers, self.host = Observers(), HostTime()
        self.changes = Changes(scheduler, executor, clock)
        self._dispatcher = Dispatcher(
            scheduler, executor, self.requests, self.observers, clock, self.host, self.changes.settled
        )
        self._entering: list[Submission] = []
        self.is_frozen = False  # nothing is dispatched, and what is due waits
        self._freezing: list[Freeze] = []

    def take(self, message: Message) -> None:
        """Take in one message; what it allows waits for `dispatch`."""
        if isinstance(message, Question):
            message.answer(self.scheduler, self.executor)
            return
        match message:
            case tuple():
                self._entering = list(message)
                while self._entering:  # one that raises is still there, and is answered with the engine's end
                    self._accept(self._entering[0])
                    del self._entering[0]
            case StepResult():
                self._take_step(message)
            case StepFailed(t=t, mesh=mesh, step=step, reason=reason):
                if self.scheduler.is_in_flight(mesh, step):  # not already lost with an earlier step
                    self._dispatcher.lose_mesh(t, mesh, reason)
            case MeshLost():
                self._lose_mesh(message)
            case MeshJoined(mesh=mesh):
                self.executor.perform(ResetMesh(mesh))  # from here on it performs what it is sent
                self.scheduler.on(message)
            case Freeze():
                self.is_frozen = True
                self._freezing.append(message)
            case Change():
                self.changes.ask(message)
            case _:
                self.scheduler.on(message)
        self.observers.received(message)  # after it is in, so that a request is answered even if this raises

    def dispatch(self) -> None:
        """Dispatch all that the messages allow, and send what is new to the callers."""
        if self.is_frozen:
            self.requests.flush()
            self._end_freezing()
            return
        self._dispatcher.dispatch()
        self.requests.flush()
        while self.changes.go_on():
            self._dispatcher.dispatch()
            self.requests.flush()

    def next_due(self) -> float | None:
        """Return the next instant at which a `Tick` has to come if nothing else does; None: there is none."""
        if self.is_frozen:
            return None
        due, change = self.scheduler.next_due(), self.changes.next_due()
        if change is None:
            return due
        return change if due is None or change < due else due

    def end(self, reason: FinishReason, why: str, left: Iterable[Submission], now: float) -> None:
        """End every request with this reason, those in `left` too, which were not taken in, and every change: each gets
        its last update."""
        self.changes.end(why)
        for freeze in self._freezing:
            freeze.refuse(why)
        entering = [submission for submission in self._entering if submission.facts.id not in self.requests]
        for submission in (*entering, *left):
            request = Request(submission.facts, -1, Timeline(submission.arrival))
            self.requests.add(self._running(submission, request, self.scheduler.config))
        self.requests.end_all(reason, why if reason == "error" else None, now)

    def _end_freezing(self) -> None:
        """Answer those that freeze the engine once no step is in flight."""
        if self._freezing and not any(mesh.in_flight for mesh in self.scheduler.meshes):
            for freeze in self._freezing:
                freeze.done.set()
            self._freezing.clear()

    def _accept(self, submission: Submission) -> None:
        self.scheduler.on(Arrived(submission.arrival, submission.facts))
        request = self.scheduler.requests[submission.facts.id]
        self.requests.add(self._running(submission, request, self.scheduler.config))

    def _lose_mesh(self, lost: MeshLost) -> None:
        """Take in that a mesh is lost, and that word of what it was sending may be lost as well.

        A transfer that fails costs its request a try. One of a mesh that is gone does not: there the request is lost
        with the mesh, and its transfers fail when nobody needs them any more.
        """
        transfers = self.scheduler.transfers_from(lost.mesh)
        if lost.is_gone:
            self._dispatcher.lose_mesh(lost.t, lost.mesh, lost.reason, is_gone=True)
        for transfer in transfers:
            self.scheduler.on(TransferFailed(lost.t, transfer, lost.reason))
        if not lost.is_gone:
            self._dispatcher.lose_mesh(lost.t, lost.mesh, lost.reason)

    def _take_step(self, result: StepResult) -> None:
        if self.scheduler.is_in_flight(result.mesh, result.step):
            outcomes = self.requests.take(result, self.scheduler.owner)
            self.scheduler.on(StepDone(result.t, result.mesh, result.step, outcomes))
