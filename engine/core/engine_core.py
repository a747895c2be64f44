"""The thread of an engine: it waits for what callers send and executors report, and takes the loop's turns.

Invariants: only this thread touches scheduler and executor, so an interrupt in a caller's thread can never tear a
dispatch; what is accepted gets its answer, also where the engine ends. It does not tokenise: callers turn tokens into
text on their own threads. It knows executors by their contract only (`protocol/executor.py`). What a turn does is
`loop.py`'s.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal

from ..errors import EngineError, Overloaded
from ..host.threads import EngineThread
from ..metrics.counters import Compilations
from ..metrics.metrics import Metrics
from ..protocol.actions import FinishReason
from ..protocol.events import (
    AbortRequested,
    MigrateRequested,
    PreemptRequested,
    ServiceChanged,
    Tick,
)
from ..protocol.executor import Executor
from ..protocol.results import Completion, describe
from ..protocol.service import Service, is_positive
from ..roles import read_goal
from ..scheduler.decision_log import DecisionLog
from ..scheduler.scheduler import Scheduler
from .changes import Change, Freeze, NewParams, NewRoles, Pause, Restart
from .inspection import Observer, Question
from .integrity import IdleCheck
from .loop import Loop, Message
from .mesh_work import MeshWork
from .stamper import Stamper
from .submission import Submission
from .waiting_room import RoomKeeper, WaitingRoom

_LONGEST_WAIT = 3600.0  # seconds at a time: what is due in centuries is more than a queue can be told to wait


@dataclass(frozen=True)
class _Close:
    pass


type _Message = Message | _Close


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
            log: what the scheduler writes, if anything, and gets stamps; closed with the engine.
            settings: what the dispatching thread runs in.
        """
        self.clock = clock
        self.ids = itertools.count()  # of requests: `next` gives one that no other request of this engine has
        self._scheduler, self._decision_log, self._settings = scheduler, log, settings
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._executor = make_executor(self._inbox.put)
        self._loop = Loop(scheduler, self._executor, clock)
        self._work = MeshWork(len(scheduler.meshes), clock)
        self._loop.observers.add(self._work)
        self._room = WaitingRoom(scheduler.config.max_waiting, scheduler.config.max_waiting_tokens, clock)
        if self._room.is_bounded:
            self._loop.observers.add(RoomKeeper(self._room, scheduler))
        if log is not None:
            self._loop.observers.add(Stamper(log, scheduler, clock))
        self._check = IdleCheck(scheduler.check_integrity, time.thread_time)
        self._compilations = compilations
        self._lock = threading.Lock()  # against the loop's end
        self._stopped: str | None = None
        self._thread = EngineThread(target=self._run, name="twinmesh-dispatch", daemon=True)
        self._thread.start()

    # ---- any thread

    def submit(self, submissions: Sequence[Submission], *, may_refuse: bool = False) -> None:
        """Accept requests, all or none; their updates come through their sinks. Where the room for those that wait is
        bounded and full, it waits for room, or refuses them if it `may_refuse`.

        Raises:
            EngineError: the engine is closed or has failed.
            Overloaded: there is no room.
        """
        try:
            (self._room.enter_or_refuse if may_refuse else self._room.enter_when_there_is_room)(submissions)
            self._put(tuple(submissions))
        except Overloaded:
            raise
        except BaseException:  # an interrupt too: they may not be in the inbox, and then nobody else counts them off
            self._room.leave([submission.facts.id for submission in submissions])
            raise

    def abort(self, request_id: int) -> None:
        """End a request early with finish_reason "abort"; unknown and finished ones are ignored."""
        self._inbox.put(AbortRequested(self.clock(), request_id))

    def preempt(self, request_id: int) -> None:
        """Make a request give up its KV and compute it again; unknown and waiting ones are ignored."""
        self._inbox.put(PreemptRequested(self.clock(), request_id))

    def migrate(self, request_id: int, destination: int | None = None) -> None:
        """Move a decoding request to mesh number `destination` (None: any other); ignored where there is no room."""
        self._inbox.put(MigrateRequested(self.clock(), request_id, destination))

    def serve(self, request_id: int, service: Service) -> None:
        """Serve a request in another way from here on; unknown and finished ones are ignored."""
        self._inbox.put(ServiceChanged(self.clock(), request_id, service))

    def update_params(self, params: Mapping[str, object]) -> None:
        """Let running requests finish, replace parameters on every mesh, void every cached page, and go on.

        The parameters, by name, are passed to the executor, which checks them. Requests that arrive meanwhile wait.
        Returns when the parameters are in place.

        Raises:
            ValueError: an unknown name, or another shape or dtype than the parameter has; or running requests are
                frozen, which would have to end first.
            EngineError: the engine is closed or has failed.
        """
        if self._loop.is_frozen:
            raise ValueError(
                'generation is paused with mode="keep", and running requests end with the parameters that they began '
                'with: call resume_generation first, or pause with mode="wait".'
            )
        self._executor.check_params(params)
        self._wait_for(NewParams(params))

    def set_roles(self, roles: str | Mapping[int, str], drain_timeout: float) -> Literal["reached", "superseded"]:
        """Change the roles of a pool's meshes, and wait until each has its role and nothing else to do.

        `roles` are counts as text, or meshes by number. Parameters that are being updated go first, within the
        `drain_timeout`, which is in seconds from this call. "superseded": a later call has taken this one's place.

        Raises:
            ValueError: no pool, roles that cannot serve, or a time that is not above 0.
            TimeoutError: meshes had work left when the time was over; says which, and the roles that are now.
            EngineError: the engine is closed or has failed.
        """
        goal = read_goal(roles, self._scheduler.config.topology)
        if not is_positive(drain_timeout):
            raise ValueError(f"drain_timeout={drain_timeout!r} is not usable: it must be a number of seconds above 0.")
        call = NewRoles(goal, self.clock() + drain_timeout)
        self._wait_for(call)
        if call.outcome == "refused":
            raise ValueError(call.why)
        if call.outcome == "late":
            raise TimeoutError(call.why)
        return "reached" if call.outcome == "reached" else "superseded"

    def freeze(self) -> None:
        """Dispatch nothing from here on until `restart`, and wait for the steps that are in flight.

        Raises:
            EngineError: the engine is closed or has failed.
        """
        self._wait_for(Freeze())

    def drain(self) -> None:
        """Let no request begin until `restart`, and wait until none runs that has begun.

        Raises:
            EngineError: the engine is closed or has failed.
        """
        self._loop.is_frozen = False
        self._wait_for(Pause())

    def restart(self) -> None:
        """Go on after `freeze` or `drain`, which voids cached pages; does nothing where neither was called.

        Raises:
            EngineError: the engine is closed or has failed.
        """
        self._loop.is_frozen = False
        self._wait_for(Restart())

    def roles(self) -> list[str]:
        """Return the role of each mesh, with what it still drains, as in "decode (draining prefill)"."""
        return self._scheduler.roles()

    def _wait_for(self, change: Change) -> None:
        self._put(change)
        change.done.wait()
        if change.error is not None:
            raise EngineError(change.error)

    def prepare_masks(self) -> None:
        """Have what constrained requests need compiled, before the first of them is submitted; later calls return at
        once. It takes about as long as a start takes for the stages of sampling, and steps go on meanwhile."""
        self._compilations.prepare_masks()

    def metrics(self) -> Metrics:
        """Return the figures so far."""
        scheduler, made = self._scheduler, self._compilations
        log, unfinished = self._loop.requests.figures(self.clock())
        return log.metrics(
            unfinished, made.count, scheduler.counters, self._executor.traffic, self._loop.host, made.coming,
            self.roles(), scheduler.plan, self._work.figures(scheduler),
        )  # fmt: skip

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
        self.inspect(lambda *_: self._loop.observers.add(observer))
        try:
            yield
        finally:
            with suppress(EngineError):  # closed meanwhile: it sees nothing any more
                self.inspect(lambda *_: self._loop.observers.remove(observer))

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

    def _put(self, message: tuple[Submission, ...] | Change | Question) -> None:
        with self._lock:  # what is accepted gets its answer
            self.check_health()
            self._inbox.put(message)

    # ---- the dispatching thread

    def _run(self) -> None:
        try:
            with self._settings():
                while self._turn():
                    pass
            self._stop("abort", "the engine is closed: make a new LLM.")
        except EngineError as error:
            self._stop("error", str(error))
        except BaseException as error:  # whatever it is, callers wait for their answers
            self._stop("error", f"the engine stopped after an internal failure ({describe(error)}): make a new LLM.")
        finally:
            self._executor.close()
            self._compilations.close()
            if self._decision_log is not None:
                self._decision_log.close()

    def _turn(self) -> bool:
        """Wait for a message, take in all there are, and dispatch what they allow; return False to close."""
        message = self._next_message()
        start = time.thread_time()
        while True:
            if isinstance(message, _Close):
                return False
            self._loop.take(message)
            try:
                message = self._inbox.get_nowait()
            except Empty:
                break
        self._loop.dispatch()
        self._loop.host.seconds += time.thread_time() - start
        if not self._loop.requests:
            self._check.idle()
        return True

    def _next_message(self) -> _Message:
        """Wait for a message, no longer than until something is due."""
        due = self._loop.next_due()
        if due is None:
            return self._inbox.get()
        while (wait := due - self.clock()) > _LONGEST_WAIT:
            with suppress(Empty):
                return self._inbox.get(timeout=_LONGEST_WAIT)
        try:
            return self._inbox.get(timeout=max(0.0, wait))
        except Empty:
            return Tick(max(due, self.clock()))  # rounding may have ended the wait a little early

    def _stop(self, reason: FinishReason, why: str) -> None:
        """Refuse new requests and end those that are here: every accepted request gets a final update."""
        with self._lock:
            self._stopped = why
        self._room.stop()
        left: list[Submission] = []
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, tuple):
                left += message
            elif isinstance(message, Change | Question):
                message.refuse(why)
        self._loop.end(reason, why, left, self.clock())
