"""Compiles the programs of all meshes on threads of its own, those that serving cannot begin without first.

Invariants: a step's size shows in `Programs.ready` once everything that it may call is there, so that the dispatching
thread sees a size whole or not at all; only `wait` waits for a compilation, never a step. Once nothing is left nothing
compiles any more, and `CompileCounter` proves it.
"""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax.monitoring
from jax.stages import Compiled

from ..host.progress import Progress
from ..host.threads import EngineThread
from ..protocol.results import describe
from ..worker.compile_program import compile_program
from ..worker.mesh_plan import MeshPlan
from ..worker.programs import Bundle, Job, Programs, bundles, jobs_of_masks

_EVENTS = frozenset({"/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"})


class Make(Protocol):
    """What makes a program of a mesh: compiles it, or reads it from where it is kept."""

    def __call__(self, plan: MeshPlan, kind: str, /, *size: object) -> Compiled:
        """Make the program that `compile_program` would make."""
        ...


class _Pending:
    """A bundle of one mesh, and how many of its programs are still to come."""

    def __init__(self, mesh: int, plan: MeshPlan, programs: Programs, bundle: Bundle) -> None:
        self.plan, self.programs, self.bundle, self.left = plan, programs, bundle, len(bundle.jobs)
        what = f"{bundle.phase} {bundle.size}" if bundle.phase else "what every step needs"
        self.name = f"{what} on mesh {mesh}"
        self.has_failed = False

    def take(self, job: Job, made: Compiled) -> None:
        """Give the mesh a program, and with the last one the size."""
        self.programs.add(job, made)
        self.left -= 1
        phase, ready = self.bundle.phase, self.programs.ready
        if not self.left and phase is not None:
            ready[phase] = tuple(sorted((*ready.get(phase, ()), self.bundle.size)))


class _Task(NamedTuple):
    """A program to be made, and the bundle that it is of."""

    pending: _Pending
    job: Job

    @property
    def name(self) -> str:
        """Name the program as the line of progress does."""
        return " ".join(map(str, (self.job.kind, *self.job.size)))


class Compilation:
    """The programs of an engine's meshes while they are being compiled, `threads` at a time.

    With `serve_early` the engine can serve once the largest size of each phase is there, and the others follow.
    """

    def __init__(
        self,
        plans: Sequence[MeshPlan],
        threads: int,
        *,
        make: Make = compile_program,
        needs: Callable[[Job], bool] = lambda job: True,
        serve_early: bool = False,
    ) -> None:
        """Begin. `needs` may leave programs out that will not be asked for."""
        self._programs, self._make = [Programs() for _ in plans], make
        self._plans, self._masks_lock, self._has_masks = plans, threading.Lock(), False
        first: list[_Pending] = []
        rest: list[_Pending] = []
        for mesh, (plan, programs) in enumerate(zip(plans, self._programs, strict=True)):
            for into, listed in zip((first, rest), bundles(plan, needs), strict=True):
                into += [_Pending(mesh, plan, programs, bundle) for bundle in listed]
        first.sort(key=lambda pending: pending.bundle.phase is None)  # steps take longest
        self._all = [*first, *rest]
        self._awaited = first if serve_early else self._all
        self._queue = deque(_Task(pending, job) for pending in self._all for job in pending.bundle.jobs)
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._making = list[str]()  # programs that threads are at
        self.threads = [EngineThread(target=self._work, name="twinmesh-compile", daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def wait(self, *, progress: bool = False) -> list[Programs]:
        """Wait until every mesh can serve, and return their programs; `progress` names them on stderr.

        Raises:
            Exception: what a compilation raised. Nothing is compiled any more then.
        """
        total = self._left
        try:
            with Progress("compiling", total, "programs", shown=progress) as line, self._changed:
                done = 0
                while self._error is None and self._left:
                    self._changed.wait()
                    line.advance(total - self._left - done, ", ".join(self._making))
                    done = total - self._left
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._error is not None:
            self.close()
            raise self._error
        return self._programs

    @property
    def coming(self) -> tuple[str, ...]:
        """Name what is still being compiled; steps that it is for run in larger sizes meanwhile."""
        return tuple(pending.name for pending in self._all if pending.left and not pending.has_failed)

    def prepare_masks(self) -> None:
        """Make, on the calling thread, what a mesh needs once requests constrain their tokens, unless it is there.

        Raises:
            Exception: what a compilation raised. The next call tries again.
        """
        with self._masks_lock:
            if self._has_masks:
                return
            late = [
                _Pending(mesh, plan, programs, Bundle(None, 0, jobs_of_masks(plan)))
                for mesh, (plan, programs) in enumerate(zip(self._plans, self._programs, strict=True))
            ]
            before = self._all
            self._all = [*before, *late]  # `coming` has them: these are the engine's own
            try:
                for pending in late:
                    for job in pending.bundle.jobs:
                        pending.take(job, self._make(pending.plan, job.kind, *job.size))
            finally:
                self._all = before
            self._has_masks = True

    def close(self) -> None:
        """Begin no other compilation, and wait for those under way."""
        with self._changed:
            self._queue.clear()
            for pending in self._all:
                pending.has_failed |= pending.left > 0
        for thread in self.threads:
            thread.join()

    @property
    def _left(self) -> int:
        return sum(pending.left for pending in self._awaited)

    def _work(self) -> None:
        while (task := self._next()) is not None:
            try:
                made = self._make(task.pending.plan, task.job.kind, *task.job.size)
            except Exception as error:
                self._fail(task.pending, error)
            else:
                with self._changed:
                    task.pending.take(task.job, made)
            finally:
                with self._changed:
                    self._making.remove(task.name)
                    self._changed.notify_all()

    def _next(self) -> _Task | None:
        with self._changed:
            while self._queue:
                task = self._queue.popleft()
                if not task.pending.has_failed:
                    self._making.append(task.name)
                    self._changed.notify_all()
                    return task
        return None

    def _fail(self, pending: _Pending, error: Exception) -> None:
        """End the start, or where a larger size serves in this one's place, say so and go on."""
        with self._changed:
            pending.has_failed = True
            if pending in self._awaited:
                self._error = self._error or error
                self._queue.clear()
                self._changed.notify_all()
                return
        warnings.warn(
            f"{pending.name} could not be compiled ({describe(error)}): a larger size goes on in its place.",
            stacklevel=2,
        )


class CompileCounter:
    """A counter of traces and backend compilations in this process, whatever causes them, until `close`.

    It begins to count when everything that an engine needs is compiled, and closes what compiles that.
    """

    def __init__(self, compilation: Compilation | None = None) -> None:
        self.count, self._compilation = 0, compilation
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def coming(self) -> tuple[str, ...]:
        """Name what the engine is still compiling."""
        return () if self._compilation is None else self._compilation.coming

    def prepare_masks(self) -> None:
        """Have what masks over tokens need compiled; it is no compilation that counts."""
        if self._compilation is not None:
            self._compilation.prepare_masks()

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _EVENTS and not self.coming:
            with self._lock:
                self.count += 1

    def close(self) -> None:
        """Stop compiling and counting."""
        if self._compilation is not None:
            self._compilation.close()
        jax.monitoring.unregister_event_duration_listener(self._on_event)
