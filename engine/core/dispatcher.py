"""Performs what the scheduler decides: its actions, in order, to the executor, and what follows from those that fail.

Invariants: before an executor needs a request's tokens it has them (`Accept`); an action that raises costs the meshes
whose devices took part in it, or the one transfer that it is, and the scheduler learns of it before it decides again;
one in which no device took part is a bug, and stops the engine, as an `EngineError` does. For the dispatching thread
alone.
"""

from collections.abc import Callable, Sequence

from ..errors import EngineError
from ..metrics.counters import HostTime
from ..protocol.actions import (
    Action,
    Chunk,
    CopyPage,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    Fused,
    Prefill,
    ResetMesh,
    RolesSettled,
    Scatter,
    StartTransfer,
)
from ..protocol.events import MeshFailed, RequestFailed, TransferFailed
from ..protocol.executor import Executor
from ..protocol.results import describe
from ..scheduler.scheduler import Scheduler
from .busy_time import STEPS
from .constraints import masks_of
from .inspection import Observers
from .running_requests import RunningRequests

_WITH_CHUNKS = (Prefill, Fused)  # made once: they are asked for with every action
_WITH_ROWS = (Decode, Fused)


class Dispatcher:
    """The way from the scheduler's decisions to the executor."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        requests: RunningRequests,
        observers: Observers,
        clock: Callable[[], float],
        host: HostTime,
        settled: Callable[[RolesSettled], None],
    ) -> None:
        """Dispatch nothing yet; `host` counts the steps, `settled` takes answers to calls for roles."""
        self._scheduler, self._executor, self._requests = scheduler, executor, requests
        self._observers, self._clock, self._host, self._settled = observers, clock, host, settled
        self._stuck: dict[int, str] = {}  # requests that cannot be followed through their grammar any further, and why

    def dispatch(self) -> None:
        """Perform all that the scheduler decides.

        After a failure the remaining actions on that mesh are void; the scheduler then knows of it, and decides again.
        """
        has_failed = True
        while has_failed:
            has_failed, lost = False, set[int]()
            for action in self._decide():
                if lost and not lost.isdisjoint(_meshes(action)):
                    self._skip(action)
                    continue
                failure = self._try(action)
                if failure is not None:
                    has_failed = True
                    lost |= self._on_failure(action, failure)
            has_failed |= self._fail_stuck()

    def lose_mesh(self, t: float, mesh: int, reason: str) -> None:
        """Make a mesh's KV pool anew, and have the scheduler start its requests over."""
        self._executor.perform(ResetMesh(mesh))
        self._scheduler.on(MeshFailed(t, mesh, reason))

    def _decide(self) -> list[Action]:
        self._observers.deciding(self._scheduler)
        actions = self._scheduler.actions()
        self._observers.decided(self._scheduler, actions)
        return actions

    def _perform(self, action: Action) -> None:
        if isinstance(action, RolesSettled):  # which concerns no device
            self._settled(action)
            return
        if isinstance(action, _WITH_CHUNKS):
            self._accept_runs(action.chunks)
        if self._requests.dense and isinstance(action, _WITH_ROWS):
            self._accept_arrivals(action.rows)
        if self._requests.constrained and isinstance(action, STEPS):
            masks, stuck = masks_of(action, self._requests.constrained)
            self._stuck |= stuck
            if masks is not None:
                self._executor.perform(masks)
        self._executor.perform(action)
        self._observers.performed(action)
        if isinstance(action, STEPS):
            self._host.steps += 1
        elif isinstance(action, Finish):
            self._requests.finish(action)

    def _accept_runs(self, chunks: Sequence[Chunk]) -> None:
        """Give the executor a request's tokens, all that are known, before the first chunk of each of its runs."""
        for chunk in chunks:
            running = self._requests[chunk.request_id]
            if running.accepted_run != chunk.run:
                self._requests.conversations.name_token(running)
                self._executor.perform(running.accept(chunk.run))

    def _accept_arrivals(self, rows: Sequence[DecodeRow]) -> None:
        """Before a request's first step where a hand-off has brought it, give the executor its tokens, if it needs them
        for a dense row, which hand-offs leave behind. By then all tokens of earlier steps are here."""
        for row in rows:
            if row.request_id in self._requests.dense:
                running = self._requests[row.request_id]
                if not running.is_accepted_here:
                    self._executor.perform(running.accept(row.run))

    # ---- failures

    def _try(self, action: Action) -> str | None:
        """Perform an action; return what went wrong, None if nothing did.

        It returns text, so that the exception is gone by then, and with it the arrays that it refers to.
        """
        try:
            self._perform(action)
        except EngineError:
            raise
        except Exception as error:
            if not _meshes(action):  # no device had a part in it: a bug, which stops the engine
                raise
            return describe(error)
        return None

    def _fail_stuck(self) -> bool:
        """Report requests whose grammar cannot be followed; return whether there were any."""
        stuck, self._stuck = self._stuck, {}
        for request_id, reason in stuck.items():
            self._scheduler.on(RequestFailed(self._clock(), request_id, reason))
        return bool(stuck)

    def _skip(self, action: Action) -> None:
        """Leave out an action on a mesh that was lost, and let go of what it would have moved."""
        if isinstance(action, Scatter):
            self._executor.perform(DropTransfer(action.transfer))
        elif isinstance(action, StartTransfer):
            self._scheduler.on(TransferFailed(self._clock(), action.transfer, "its mesh was lost."))

    def _on_failure(self, action: Action, reason: str) -> set[int]:
        """Report an action that failed to the scheduler; return the meshes that are lost with it.

        A transfer fails alone. A step or scatter had the pool donated, so its mesh is lost.
        """
        if isinstance(action, StartTransfer):
            self._scheduler.on(TransferFailed(self._clock(), action.transfer, reason))
            return set()
        lost = _meshes(action)
        for mesh in lost:
            self.lose_mesh(self._clock(), mesh, reason)
        return lost


def _meshes(action: Action) -> set[int]:
    """Return the meshes whose devices take part in the action; none for one that only the host performs."""
    match action:
        case Prefill(mesh=mesh) | Decode(mesh=mesh) | Fused(mesh=mesh) | CopyPage(mesh=mesh):
            return {mesh}
        case Scatter(destination=mesh):
            return {mesh}
        case StartTransfer(source=source, destination=destination):
            return {source, destination}
        case _:
            return set()
