"""Meshes in virtual time: each performs its steps and gathers one after the other, as long as the costs say.

A step takes the costs of its program, times the slowdown of the steps that other meshes compute meanwhile, exactly as
these begin and end: what is left of it goes on faster or slower from then on. True times may differ from the costs by a
factor (`speed`) and by seeded noise, of which the scheduler sees only what it measures. A gather takes no time of its
own, but its turn: behind the steps before it. Here is no scheduler: who dispatches what is not known.
"""

from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from ..protocol.actions import Decode, Fused, Prefill, StartTransfer
from ..scheduler.cost_model import CostModel, ProgramCost
from .virtual_time import VirtualTime

type Step = Prefill | Decode | Fused


class TrueTimes(NamedTuple):
    """How step times differ from the costs that everybody believes."""

    noise: float = 0.0  # standard deviation of the logarithm of each step's time; the mean stays
    speed: float = 1.0  # steps take so many times as long
    seed: int = 0


class _Running:
    """A step that a mesh computes."""

    __slots__ = ("begun", "left", "program", "since", "slowdown", "step", "version")

    def __init__(self, step: Step, program: ProgramCost, seconds: float, now: float) -> None:
        self.step, self.program, self.left = step, program, seconds  # seconds of work, were it alone
        self.begun = self.since = now
        self.slowdown, self.version = 0.0, 0  # 0: its end is not planned


class _Mesh:
    """One mesh: what it computes and what waits for its turn."""

    __slots__ = ("busy", "has_failed", "queue", "ready", "running")

    def __init__(self) -> None:
        self.running: _Running | None = None
        self.queue = deque[Step | StartTransfer]()
        self.ready = 0.0  # it computes nothing before
        self.has_failed = False  # what is dispatched from here on fails, until it is reset
        self.busy = 0.0  # seconds of the steps that it has ended


class VirtualMeshes:
    """The meshes of one engine."""

    def __init__(
        self,
        time: VirtualTime,
        costs: Sequence[CostModel],
        true: TrueTimes,
        ended: Callable[[Step], None],
        gathered: Callable[[StartTransfer], None],
    ) -> None:
        """Begin idle.

        Args:
            time: the time that they run in.
            costs: of each mesh.
            true: how true times differ from them.
            ended: called with each step when it ends on its device.
            gathered: called with each transfer whose pages are gathered, from when on it is on its link.
        """
        self._time, self._costs, self._ended, self._gathered = time, costs, ended, gathered
        self._meshes = [_Mesh() for _ in costs]
        self._noise, self._speed, self._random = true.noise, true.speed, Random(true.seed)
        programs = [p for c in costs for kind in (c.prefill, c.decode, c.fused) for p in kind.values()]
        self._is_slowed = any(p.beside_prefill or p.beside_decode for p in programs)
        self._prefills = self._decodes = 0  # steps that run, of either kind

    @property
    def busy(self) -> list[float]:
        """Return the seconds that each mesh has computed, steps under way included."""
        now = self._time.now
        return [mesh.busy + (now - mesh.running.begun if mesh.running else 0.0) for mesh in self._meshes]

    def perform(self, index: int, action: Step | StartTransfer) -> None:
        """Take a step or gather, which begins when those before it are done."""
        mesh = self._meshes[index]
        if mesh.running is None and not mesh.queue and mesh.ready <= self._time.now:
            self._begin(mesh, action)
        else:
            mesh.queue.append(action)

    def has_failed(self, index: int) -> bool:
        """Return whether a mesh has failed and was not reset since."""
        return self._meshes[index].has_failed

    def fail(self, index: int) -> list[Step | StartTransfer]:
        """Let a mesh fail; return what it was doing and what waited for its turn, in order."""
        mesh = self._meshes[index]
        lost: list[Step | StartTransfer] = [*mesh.queue]
        if mesh.running is not None:
            running, mesh.running = mesh.running, None
            mesh.busy += self._time.now - running.begun
            lost.insert(0, running.step)
            running.version += 1
            self._count(running.step, -1)
        mesh.queue.clear()
        mesh.has_failed = True
        return lost

    def reset(self, index: int) -> None:
        """Let a mesh work again that had failed."""
        self._meshes[index].has_failed = False

    def pause(self, index: int, until: float) -> None:
        """Let a mesh begin nothing before `until`."""
        mesh = self._meshes[index]
        if until > mesh.ready:
            mesh.ready = until
            self._time.at(until, self._go_on, mesh)

    def _go_on(self, mesh: _Mesh) -> None:
        """Begin what waits, up to the first step."""
        while mesh.running is None and mesh.queue and mesh.ready <= self._time.now:
            self._begin(mesh, mesh.queue.popleft())

    def _begin(self, mesh: _Mesh, action: Step | StartTransfer) -> None:
        if isinstance(action, StartTransfer):
            self._gathered(action)
            return
        costs = self._costs[action.mesh]
        seconds = costs.step(action) * self._speed
        if self._noise:
            seconds *= self._random.lognormvariate(-self._noise * self._noise / 2, self._noise)
        mesh.running = running = _Running(action, costs.program(action), seconds, self._time.now)
        if self._is_slowed:
            self._count(action, 1)
        else:
            self._time.at(self._time.now + seconds, self._end, (mesh, running, 0))

    def _end(self, planned: tuple[_Mesh, _Running, int]) -> None:
        """End a step, unless its end was planned anew since, or it was lost."""
        mesh, running, version = planned
        if running.version != version:
            return
        mesh.running = None
        mesh.busy += self._time.now - running.begun
        if self._is_slowed:
            self._count(running.step, -1)
        self._ended(running.step)
        if mesh.queue:
            self._go_on(mesh)

    # ---- steps that slow each other down

    def _count(self, step: Step, change: int) -> None:
        """Take in that a step begins or ends, and plan the ends of all others anew."""
        if not self._is_slowed:
            return
        if isinstance(step, Decode):
            self._decodes += change
        else:
            self._prefills += change
        now = self._time.now
        for mesh in self._meshes:
            running = mesh.running
            if running is None:
                continue
            decodes = isinstance(running.step, Decode)
            slowdown = running.program.slowdown(self._prefills - (not decodes), self._decodes - decodes)
            if slowdown == running.slowdown:
                continue
            if running.slowdown:
                running.left -= (now - running.since) / running.slowdown
            running.slowdown, running.since = slowdown, now
            running.version += 1
            end = now + max(0.0, running.left) * slowdown
            self._time.at(end, self._end, (mesh, running, running.version))
