"""Stamps the decision log: when requests came in, and when steps and transfers were where (`protocol/stamps.py`).

An observer, so that an engine without a log does none of it. What a device has done is known by what its waiter saw: it
can begin a step once it has it and has done the one before. For the dispatching thread alone.
"""

from collections.abc import Callable, Sequence

from ..protocol.actions import Action, Decode, Fused, Prefill, StartTransfer
from ..protocol.events import MeshFailed, TransferFailed, TransferReady
from ..protocol.results import MeshLost, StepFailed, StepResult
from ..protocol.stamps import RequestStamps, StepStamps, TransferStamps
from ..scheduler.decision_log import DecisionLog
from ..scheduler.scheduler import Scheduler
from .inspection import Observer
from .submission import Submission


class _Mesh:
    """The steps and transfers of one mesh that have not come back."""

    __slots__ = ("done", "last", "steps", "waiting")

    def __init__(self) -> None:
        self.steps: dict[int, tuple[float, float]] = {}  # decided, dispatched
        self.last = -1  # the step dispatched last
        self.done = 0.0  # when the last step to come back was done
        self.waiting: dict[int, list[int]] = {}  # by step, transfers that begin when it is done


class _Sent:
    """A transfer under way."""

    __slots__ = ("begun", "destination", "sent", "size", "source")

    def __init__(self, action: StartTransfer, size: int, sent: float):
        self.source, self.destination, self.size, self.sent = action.source, action.destination, size, sent
        self.begun = sent


class Stamper(Observer):
    """Writes stamps into a log."""

    def __init__(self, log: DecisionLog, scheduler: Scheduler, clock: Callable[[], float]) -> None:
        """Stamp what comes from here on; `clock` gives seconds."""
        self._log, self._scheduler, self._clock = log, scheduler, clock
        self._meshes = [_Mesh() for _ in scheduler.meshes]
        self._sent: dict[int, _Sent] = {}
        self._decided = 0.0

    def received(self, message: object) -> None:
        """Stamp requests that entered, and what came back."""
        match message:
            case StepResult():
                self._step_done(message)
            case tuple():
                self._entered(message)
            case TransferReady(t=t, transfer=number):
                self._arrived(number, t)
            case TransferFailed(transfer=number):
                self._sent.pop(number, None)
            case StepFailed(mesh=mesh) | MeshLost(mesh=mesh) | MeshFailed(mesh=mesh):
                self._meshes[mesh].steps.clear()

    def deciding(self, scheduler: Scheduler) -> None:
        """Note when the scheduler is asked."""
        self._decided = self._clock()

    def performed(self, action: Action) -> None:
        """Note when a step or transfer was dispatched."""
        if isinstance(action, Prefill | Decode | Fused):
            mesh = self._meshes[action.mesh]
            mesh.steps[action.step], mesh.last = (self._decided, self._clock()), action.step
        elif isinstance(action, StartTransfer):
            source = self._meshes[action.source]
            size = self._scheduler.transfer_bytes(action)
            self._sent[action.transfer] = _Sent(action, size, self._clock())
            if source.last in source.steps:
                source.waiting.setdefault(source.last, []).append(action.transfer)

    def _entered(self, submissions: Sequence[Submission]) -> None:
        accepted = self._clock()
        for one in submissions:
            tokenised = one.arrival if one.tokenised is None else one.tokenised
            entered = tokenised if one.entered is None else one.entered
            self._log.stamp(RequestStamps(one.facts.id, tokenised, entered, accepted, one.after))

    def _step_done(self, result: StepResult) -> None:
        mesh = self._meshes[result.mesh]
        stamps = mesh.steps.pop(result.step, None)
        before, mesh.done = mesh.done, max(mesh.done, result.t)
        for number in mesh.waiting.pop(result.step, ()):
            if number in self._sent:
                self._sent[number].begun = max(self._sent[number].sent, result.t)
        if stamps is not None:  # else a mesh was lost meanwhile
            decided, dispatched = stamps
            begun = min(max(dispatched, before), result.t)
            self._log.stamp(StepStamps(result.mesh, result.step, decided, dispatched, begun, result.t, self._clock()))

    def _arrived(self, number: int, t: float) -> None:
        sent = self._sent.pop(number, None)
        if sent is not None:
            begun = min(sent.begun, t)
            self._log.stamp(
                TransferStamps(number, sent.source, sent.destination, sent.size, sent.sent, begun, t, self._clock())
            )
