"""The event loop: one thread that feeds the scheduler, dispatches its actions and hands tokens to their callers.

Invariants: only this thread touches scheduler and executor, so an interrupt in a caller's thread can never tear a
dispatch; every accepted request gets exactly one final `Update`; a mesh that raises takes its own requests with it and
no others. It does not tokenise: callers turn tokens into text on their own threads.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from .compilation import CompileCounter
from .executor import Completion, Executor, Payload, StepFailed, StepResult, describe
from .metrics import Metrics, RequestLog
from .protocol import (
    AbortRequested,
    Action,
    Arrived,
    Chunk,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    FinishReason,
    MeshFailed,
    Outcome,
    Prefill,
    Scatter,
    StartTransfer,
    StepDone,
    TransferFailed,
)
from .request import Request
from .scheduler import Scheduler
from .waiter import EngineThread


class EngineError(RuntimeError):
    """The engine is closed, or stopped by an internal failure."""


@dataclass
class Update:
    """News of one request: tokens sampled since the last update, and why it ended (None: it goes on)."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None


type Sink = SimpleQueue[Update]


@dataclass(frozen=True)
class Submission:
    """A request on its way in: facts for the scheduler, payload for the executor, where its updates go."""

    request: Request
    payload: Payload
    stop_ids: frozenset[int]
    sink: Sink


@dataclass(frozen=True)
class _Close:
    pass


class EngineCore:
    """Runs from construction to `close`. `submit`, `abort`, `metrics` and `close` may be called from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Callable[[Callable[[Completion], None]], Executor],
        clock: Callable[[], float],
    ) -> None:
        """`executor` makes the executor, given where completions go; `clock` gives seconds."""
        self.clock = clock
        self._scheduler = scheduler
        self._inbox: SimpleQueue[Submission | AbortRequested | Completion | _Close] = SimpleQueue()
        self._executor = executor(self._inbox.put)
        self._live: dict[str, Submission] = {}
        self._updates: dict[str, Update] = {}
        self._log, self._lock = RequestLog(), threading.Lock()
        self._compiles = CompileCounter()
        self._stopped: str | None = None
        self._thread = EngineThread(target=self._run, name="twinmesh-dispatch", daemon=True)
        self._thread.start()

    # ---- any thread

    def submit(self, submission: Submission) -> None:
        """Accept a request; its updates come through its sink.

        Raises:
            EngineError: the engine is closed or has failed.
        """
        with self._lock:  # against the loop's end: what is accepted gets its final update
            if self._stopped is not None:
                raise EngineError(self._stopped)
            self._inbox.put(submission)

    def abort(self, request_id: str) -> None:
        """End a request early with finish_reason "abort"; unknown and finished ones are ignored."""
        self._inbox.put(AbortRequested(self.clock(), request_id))

    def metrics(self) -> Metrics:
        """Figures so far."""
        with self._lock:  # the dispatching thread needs it: percentiles come after
            log, running = self._log.snapshot(), len(self._live)
        return log.metrics(running, self._compiles.count, self._executor.handoff_bytes)

    def close(self) -> None:
        """Abort what runs, wait for what is in flight, join the threads, free the arrays. Idempotent.

        An engine's own thread, which may find a dropped engine while it collects garbage, asks and does not wait.
        """
        self._inbox.put(_Close())
        if not isinstance(threading.current_thread(), EngineThread):
            self._thread.join()

    # ---- the dispatching thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._stop("abort", "the engine is closed: make a new LLM.")
        except Exception as error:
            self._stop("error", f"the engine stopped after an internal failure ({describe(error)}): make a new LLM.")
        finally:
            self._executor.close()
            self._compiles.close()

    def _turn(self) -> bool:
        """Wait for news, take in all there is, dispatch what it allows. False: close."""
        message = self._inbox.get()
        while True:
            if isinstance(message, _Close):
                return False
            self._take(message)
            try:
                message = self._inbox.get_nowait()
            except Empty:
                break
        self._dispatch()
        self._flush()
        if not self._live:
            self._scheduler.check_integrity()
        return True

    def _take(self, message: Submission | AbortRequested | Completion) -> None:
        match message:
            case Submission(request=request, payload=payload):
                with self._lock:
                    self._live[request.id] = message
                self._executor.payloads[request.id] = payload
                self._scheduler.on(Arrived(request.timeline.arrival, request))
            case StepResult():
                self._take_step(message)
            case StepFailed(t=t, mesh=mesh, step=step, reason=reason):
                if self._scheduler.is_in_flight(mesh, step):  # not already lost with an earlier step
                    self._lose_mesh(t, mesh, reason)
            case _:
                self._scheduler.on(message)

    def _take_step(self, result: StepResult) -> None:
        outcomes = []
        rows: tuple[Chunk | DecodeRow, ...] = result.rows
        for row, token in zip(rows, result.tokens.tolist(), strict=False):
            if isinstance(row, Chunk) and not row.is_last:
                continue
            request = self._scheduler.owner(result.mesh, row)
            if request is not None:
                self._update(request.id).token_ids.append(token)
                outcomes.append(Outcome(request.id, token in self._live[request.id].stop_ids))
        self._scheduler.on(StepDone(result.t, result.mesh, result.step, tuple(outcomes)))

    def _dispatch(self) -> None:
        """Perform actions until there are none; after a failure the rest of that mesh's are void."""
        while actions := self._scheduler.actions():
            lost: set[int] = set()
            for action in actions:
                if not lost.isdisjoint(_meshes(action)):
                    if isinstance(action, Scatter):
                        self._executor.perform(DropTransfer(action.transfer))
                    continue
                failure = self._try(action)
                if failure is not None:
                    lost |= self._on_dispatch_error(action, failure)

    def _try(self, action: Action) -> str | None:
        """What went wrong, if anything. Back in the caller the exception, and the arrays it holds, are gone."""
        try:
            self._perform(action)
        except Exception as error:
            if not _meshes(action):  # no device had a part in it: a bug, which stops the engine
                raise
            return describe(error)
        return None

    def _perform(self, action: Action) -> None:
        self._executor.perform(action)
        if isinstance(action, Finish):
            with self._lock:
                submission = self._live.pop(action.request_id)
                self._log.add(submission.request, action.reason)
            update = self._update(action.request_id)
            update.finish_reason, update.error = action.reason, action.error
            self._send(submission, update)

    def _on_dispatch_error(self, action: Action, reason: str) -> set[int]:
        """A transfer fails alone; a step or scatter had the pool donated and takes its mesh with it."""
        if isinstance(action, StartTransfer):
            self._scheduler.on(TransferFailed(self.clock(), action.transfer, reason))
            return set()
        lost = _meshes(action)
        for mesh in lost:
            self._lose_mesh(self.clock(), mesh, reason)
        return lost

    def _lose_mesh(self, t: float, mesh: int, reason: str) -> None:
        self._executor.reset_mesh(mesh)
        self._scheduler.on(MeshFailed(t, mesh, reason))

    def _update(self, request_id: str) -> Update:
        return self._updates.setdefault(request_id, Update(request_id))

    def _send(self, submission: Submission, update: Update) -> None:
        del self._updates[update.request_id]
        submission.sink.put(update)

    def _flush(self) -> None:
        """Tokens go out once a turn, after the devices have their work."""
        for request_id, update in list(self._updates.items()):
            self._send(self._live[request_id], update)

    def _stop(self, reason: FinishReason, why: str) -> None:
        """Refuse what comes, end what is here: whatever was accepted gets a final update."""
        with self._lock:
            self._stopped = why
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Submission):
                self._live[message.request.id] = message
        with self._lock:
            for request_id, submission in self._live.items():
                submission.request.timeline.finish = self.clock()
                self._log.add(submission.request, reason)
                update = self._updates.get(request_id, Update(request_id))
                update.finish_reason, update.error = reason, why if reason == "error" else None
                submission.sink.put(update)
            self._live.clear()


def _meshes(action: Action) -> set[int]:
    """Meshes whose device order the action is part of."""
    match action:
        case Prefill(mesh=mesh) | Decode(mesh=mesh) | Scatter(destination=mesh):
            return {mesh}
        case StartTransfer(source=source, destination=destination):
            return {source, destination}
        case _:
            return set()
