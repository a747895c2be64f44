"""The event loop: one thread that feeds the scheduler, dispatches its actions and hands tokens to their callers.

Invariants: only this thread touches scheduler and executor, so an interrupt in a caller's thread can never tear a
dispatch; every accepted request gets exactly one final `Update`; a mesh that raises, or whose messages cannot be read,
is reset and its requests start over, a bounded number of times. It does not tokenise: callers turn tokens into text on
their own threads. It knows executors by their contract only (`protocol/executor.py`).
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Protocol

from ..errors import EngineError
from ..metrics.counters import HostTime
from ..metrics.metrics import Metrics, RequestLog
from ..protocol.actions import (
    Action,
    Chunk,
    CopyPage,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    FinishReason,
    Fused,
    Prefill,
    ResetMesh,
    Scatter,
    StartTransfer,
)
from ..protocol.events import (
    AbortRequested,
    Arrived,
    Hold,
    MeshFailed,
    MigrateRequested,
    Outcome,
    PreemptRequested,
    Resume,
    StepDone,
    TransferFailed,
)
from ..protocol.executor import Executor
from ..protocol.results import Completion, MeshLost, StepFailed, StepResult, describe
from ..protocol.timeline import Timeline
from ..scheduler.decision_log import DecisionLog
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from ..threads import EngineThread
from .inspection import Observer, Question
from .running_request import RunningRequest
from .submission import Outlet, Submission


class Compilations(Protocol):
    """A counter of compilations in this process, which counts until it is closed, but not those of the engine's own
    programs."""

    count: int

    @property
    def coming(self) -> tuple[str, ...]:
        """Name the sizes of steps whose programs are still being compiled."""
        ...

    def close(self) -> None:
        """Stop counting."""
        ...


@dataclass(frozen=True)
class _Close:
    pass


@dataclass(eq=False)
class _NewParams:
    """A call of `update_params` that waits for its turn; `done` is set once the parameters are in place."""

    params: Mapping[str, object]
    done: threading.Event = field(default_factory=threading.Event)
    error: str | None = None


type _RequestEvent = PreemptRequested | MigrateRequested | AbortRequested
type _Message = tuple[Submission, ...] | _RequestEvent | Completion | _NewParams | Question | _Close


class EngineCore:
    """An engine's event loop, from construction to `close`. Its public methods may be called from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        make_executor: Callable[[Callable[[Completion], None]], Executor],
        clock: Callable[[], float],
        compilations: Compilations,
        log: DecisionLog | None = None,
        settings: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Start the dispatching thread.

        Args:
            scheduler: decides what is dispatched.
            make_executor: makes the executor, given the function that takes its completions.
            clock: gives seconds.
            compilations: closed with the engine.
            log: what the scheduler writes, if anything; closed with the engine.
            settings: what the dispatching thread runs in.
        """
        self.clock = clock
        self.ids = itertools.count()  # of requests: `next` gives one that no other request of this engine has
        self._scheduler, self._decision_log, self._settings = scheduler, log, settings
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._executor = make_executor(self._inbox.put)
        self._running: dict[int, RunningRequest] = {}
        self._dense: set[int] = set()  # ids of those with a dense row
        self._with_update: list[RunningRequest] = []
        self._outlets: dict[Outlet, None] = {}  # to be flushed: an ordered set
        self._new_params: list[_NewParams] = []
        self._log, self._lock = RequestLog(), threading.Lock()
        self._host = HostTime()
        self._compilations = compilations
        self._entering: list[Submission] = []
        self._stopped: str | None = None
        self._observers: tuple[Observer, ...] = ()
        self._thread = EngineThread(target=self._run, name="twinmesh-dispatch", daemon=True)
        self._thread.start()

    # ---- any thread

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Accept requests, all or none; their updates come through their sinks.

        Raises:
            EngineError: the engine is closed or has failed.
        """
        self._put(tuple(submissions))

    def abort(self, request_id: int) -> None:
        """End a request early with finish_reason "abort"; unknown and finished ones are ignored."""
        self._inbox.put(AbortRequested(self.clock(), request_id))

    def preempt(self, request_id: int) -> None:
        """Make a request give up its KV and compute it again; unknown and waiting ones are ignored."""
        self._inbox.put(PreemptRequested(self.clock(), request_id))

    def migrate(self, request_id: int, destination: int | None = None) -> None:
        """Move a decoding request to mesh number `destination` (None: any other); ignored where there is no room."""
        self._inbox.put(MigrateRequested(self.clock(), request_id, destination))

    def update_params(self, params: Mapping[str, object]) -> None:
        """Let running requests finish, replace parameters on every mesh, void every cached page, and go on.

        The parameters, by name, are passed to the executor, which checks them. Requests that arrive meanwhile wait.
        Returns when the parameters are in place.

        Raises:
            ValueError: an unknown name, or another shape or dtype than the parameter has.
            EngineError: the engine is closed or has failed.
        """
        self._executor.check_params(params)
        message = _NewParams(params)
        self._put(message)
        message.done.wait()
        if message.error is not None:
            raise EngineError(message.error)

    def metrics(self) -> Metrics:
        """Return the figures so far."""
        with self._lock:  # the dispatching thread needs it: percentiles come after
            log, running = self._log.snapshot(), len(self._running)
        counters, traffic = self._scheduler.counters, self._executor.traffic
        made = self._compilations
        return log.metrics(running, made.count, counters, traffic, self._host, made.coming)

    @property
    def backlog(self) -> int:
        """Return how many messages wait for the dispatching thread: requests, results, and calls of other methods."""
        return self._inbox.qsize()

    def inspect[T](self, question: Callable[[Scheduler, Executor], T]) -> T:
        """Call `question(scheduler, executor)` on the dispatching thread, which alone touches them; return its result.

        For debugging and experiments. Observers run on that thread already and must not call this.

        Raises:
            EngineError: the engine is closed or has failed.
            Exception: whatever `question` raises; the engine goes on.
        """
        message = Question(question)
        self._put(message)
        answer: T = message.result()
        return answer

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Let an observer see what the engine takes in and decides, until the `with` block ends."""
        self.inspect(lambda *_: self._add_observer(observer))
        try:
            yield
        finally:
            with suppress(EngineError):  # closed meanwhile: it sees nothing any more
                self.inspect(lambda *_: self._remove_observer(observer))

    def close(self) -> None:
        """Abort running requests, wait for what is in flight, join the threads and free the arrays.

        Calling it again does nothing. On a thread that an engine owns, which may meet a dropped engine while it
        collects garbage, it asks for the end and does not wait.
        """
        self._inbox.put(_Close())
        if not isinstance(threading.current_thread(), EngineThread):
            self._thread.join()

    def check_health(self) -> None:
        """Check that the engine takes requests.

        Raises:
            EngineError: it is closed or has failed.
        """
        if self._stopped is not None:
            raise EngineError(self._stopped)

    def _put(self, message: tuple[Submission, ...] | _NewParams | Question) -> None:
        with self._lock:  # against the loop's end: what is accepted gets its answer
            self.check_health()
            self._inbox.put(message)

    # ---- the dispatching thread

    def _run(self) -> None:
        try:
            with self._settings():
                while self._turn():
                    pass
            self._stop("abort", "the engine is closed: make a new LLM.")
        except Exception as error:
            self._stop("error", f"the engine stopped after an internal failure ({describe(error)}): make a new LLM.")
        finally:
            self._executor.close()
            self._compilations.close()
            if self._decision_log is not None:
                self._decision_log.close()

    def _turn(self) -> bool:
        """Wait for a message, take in all there are, and dispatch what they allow; return False to close."""
        message = self._inbox.get()
        start = time.thread_time()
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
        if self._new_params and self._scheduler.is_drained:
            self._replace_params()
        self._host.seconds += time.thread_time() - start
        if not self._running:
            self._scheduler.check_integrity()
        return True

    def _add_observer(self, observer: Observer) -> None:
        self._observers += (observer,)

    def _remove_observer(self, observer: Observer) -> None:
        self._observers = tuple(other for other in self._observers if other is not observer)

    def _take(self, message: tuple[Submission, ...] | _RequestEvent | Completion | _NewParams | Question) -> None:
        if isinstance(message, Question):
            message.answer(self._scheduler, self._executor)
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
                if self._scheduler.is_in_flight(mesh, step):  # not already lost with an earlier step
                    self._lose_mesh(t, mesh, reason)
            case MeshLost(t=t, mesh=mesh, reason=reason):
                # Word of what it was sending may have been lost as well.
                for transfer in self._scheduler.transfers_from(mesh):
                    self._scheduler.on(TransferFailed(t, transfer, reason))
                self._lose_mesh(t, mesh, reason)
            case _NewParams():
                self._new_params.append(message)
                self._scheduler.on(Hold(self.clock()))
            case _:
                self._scheduler.on(message)
        for observer in self._observers:  # after it is in, so that a request is answered even if this raises
            observer.received(message)

    def _accept(self, submission: Submission) -> None:
        id_ = submission.facts.id
        self._scheduler.on(Arrived(submission.arrival, submission.facts))
        with self._lock:
            self._running[id_] = RunningRequest(submission, self._scheduler.requests[id_], self._scheduler.config)
        if submission.plan.is_dense:
            self._dense.add(id_)

    def _take_step(self, result: StepResult) -> None:
        """Take in a step's result: its tokens into their requests, and what they mean into the scheduler.

        The loop runs once for every row of every step, so it calls nothing that it does not need.
        """
        if not self._scheduler.is_in_flight(result.mesh, result.step):
            return
        outcomes: list[Outcome] = []
        for index, (row, sampled) in enumerate(zip(result.rows, result.tokens.T.tolist(), strict=True)):
            request = self._scheduler.owner(row)
            if request is None:  # it came too late
                continue
            running = self._running[request.id]
            if isinstance(row, Chunk):
                running.take_prompt_scores(row, result.prompt_scores.get(index))
                if not row.is_last:
                    continue
            if running.update is None:
                self._with_update.append(running)
            for step, token in enumerate(sampled):
                # A token that the request has already was generated again after a preemption.
                if row.kv_len + step < running.length:
                    continue
                if running.wants_scores:
                    running.take_scores(result, step, index)
                outcome = running.take_token(token)
                outcomes.append(outcome)
                if outcome.stopped:
                    break
        self._scheduler.on(StepDone(result.t, result.mesh, result.step, tuple(outcomes)))

    def _replace_params(self) -> None:
        for message in self._new_params:
            self._executor.replace_params(message.params)
            message.done.set()
        self._new_params.clear()
        self._scheduler.on(Resume(self.clock()))
        self._dispatch()
        self._flush()

    def _dispatch(self) -> None:
        """Perform all that the scheduler decides.

        After a failure the remaining actions on that mesh are void; the scheduler then knows of it, and decides again.
        """
        has_failed = True
        while has_failed:
            has_failed, lost = False, set[int]()
            for action in self._decide():
                if not lost.isdisjoint(_meshes(action)):
                    self._skip(action)
                    continue
                failure = self._try(action)
                if failure is not None:
                    has_failed = True
                    lost |= self._on_dispatch_error(action, failure)

    def _decide(self) -> list[Action]:
        for observer in self._observers:
            observer.deciding(self._scheduler)
        actions = self._scheduler.actions()
        for observer in self._observers:
            observer.decided(self._scheduler, actions)
        return actions

    def _skip(self, action: Action) -> None:
        """Leave out an action on a mesh that was lost, and let go of what it would have moved."""
        if isinstance(action, Scatter):
            self._executor.perform(DropTransfer(action.transfer))
        elif isinstance(action, StartTransfer):
            self._scheduler.on(TransferFailed(self.clock(), action.transfer, "its mesh was lost."))

    def _try(self, action: Action) -> str | None:
        """Perform an action; return what went wrong, None if nothing did.

        It returns text, so that the exception is gone by then, and with it the arrays that it refers to.
        """
        try:
            self._perform(action)
        except Exception as error:
            if not _meshes(action):  # no device had a part in it: a bug, which stops the engine
                raise
            return describe(error)
        return None

    def _perform(self, action: Action) -> None:
        if isinstance(action, Prefill | Fused):
            self._accept_runs(action.chunks)
        if self._dense and isinstance(action, Decode | Fused):
            self._accept_arrivals(action.rows)
        self._executor.perform(action)
        if isinstance(action, Prefill | Decode | Fused):
            self._host.steps += 1
        elif isinstance(action, Finish):
            running = self._running[action.request_id]
            self._dense.discard(action.request_id)
            with self._lock:
                del self._running[action.request_id]
                self._log.add(running.request.timeline, running.request.confirmed, action.reason)
            update = running.update or running.new_update()
            update.finish_reason, update.error = action.reason, action.error
            self._send(running)

    def _accept_runs(self, chunks: Sequence[Chunk]) -> None:
        """Give the executor a request's tokens, all that are known, before the first chunk of each of its runs."""
        for chunk in chunks:
            running = self._running[chunk.request_id]
            if running.accepted_run != chunk.run:
                self._executor.perform(running.accept(chunk.run))

    def _accept_arrivals(self, rows: Sequence[DecodeRow]) -> None:
        """Before a request's first step where a hand-off has brought it, give the executor its tokens, if it needs them
        for a dense row, which hand-offs leave behind. By then all tokens of earlier steps are here."""
        for row in rows:
            if row.request_id in self._dense:
                running = self._running[row.request_id]
                if running.accepted_at is not running.request.placement:
                    self._executor.perform(running.accept(row.run))

    def _on_dispatch_error(self, action: Action, reason: str) -> set[int]:
        """Report an action that failed to the scheduler; return the meshes that are lost with it.

        A transfer fails alone. A step or scatter had the pool donated, so its mesh is lost.
        """
        if isinstance(action, StartTransfer):
            self._scheduler.on(TransferFailed(self.clock(), action.transfer, reason))
            return set()
        lost = _meshes(action)
        for mesh in lost:
            self._lose_mesh(self.clock(), mesh, reason)
        return lost

    def _lose_mesh(self, t: float, mesh: int, reason: str) -> None:
        self._executor.perform(ResetMesh(mesh))
        self._scheduler.on(MeshFailed(t, mesh, reason))

    # ---- updates

    def _send(self, running: RunningRequest) -> None:
        update, running.update = running.update, None
        if update is not None:
            update.timeline, update.cached_tokens = running.request.timeline, running.request.cached
            outlet = running.submission.sink.put(update)
            if outlet is not None:
                self._outlets[outlet] = None

    def _flush(self) -> None:
        """Send tokens to their callers: once a turn, after the devices have their work."""
        for running in self._with_update:
            self._send(running)
        self._with_update.clear()
        self._flush_outlets()

    def _flush_outlets(self) -> None:
        for outlet in self._outlets:
            outlet.flush()
        self._outlets.clear()

    def _stop(self, reason: FinishReason, why: str) -> None:
        """Refuse new requests and end those that are here: every accepted request gets a final update."""
        with self._lock:
            self._stopped = why
        left = [submission for submission in self._entering if submission.facts.id not in self._running]
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, tuple):
                left += message
            elif isinstance(message, _NewParams):
                self._new_params.append(message)
            elif isinstance(message, Question):
                message.refuse(why)
        for waiting in self._new_params:
            waiting.error = why
            waiting.done.set()
        for submission in left:
            request = Request(submission.facts, -1, Timeline(submission.arrival))
            self._running[request.id] = RunningRequest(submission, request, self._scheduler.config)
        with self._lock:
            for running in self._running.values():
                request = running.request
                request.timeline.finish = self.clock()
                self._log.add(request.timeline, request.confirmed, reason)
                update = running.update or running.new_update()
                update.finish_reason, update.error = reason, why if reason == "error" else None
                self._send(running)
            self._running.clear()
        self._flush_outlets()


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
