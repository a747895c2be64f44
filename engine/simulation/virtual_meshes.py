"""Meshes in virtual time: each performs its steps, gathers and scatters one after the other, as the costs say.

A step takes the costs of its program, times the slowdown of the steps that other meshes compute meanwhile, exactly as
these begin and end: what is left of it goes on faster or slower from then on. True times may differ from the costs by a
factor (`speed`) and by seeded noise, of which the scheduler sees only what it measures. A gather or scatter takes its
turn, behind what was given before it, and the mesh computes nothing meanwhile. Here is no scheduler: who dispatches
what is not known.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from ..protocol.actions import Decode, Fused, Prefill, StartTransfer
from ..scheduler.cost_model import CostModel, ProgramCost
from .virtual_time import VirtualTime

type Step = Prefill | Decode | Fused


class TrueTimes(NamedTuple):
    """How step times differ from the costs that everybody believes."""

    noise: float = 0.0  # standard deviation of the logarithm of each step's time; the mean stays
    speed: float = 1.0  # steps take so many times as long
    seed: int = 0


class Moving(NamedTuple):
    """A gather or a scatter: for so long the mesh computes no step."""

    gather: StartTransfer | None  # the transfer whose pages it gathers; None: it scatters
    seconds: float


class _Running:
    """A step that a mesh computes."""

    __slots__ = ("begun", "end", "left", "program", "since", "slowdown", "step", "version")

    def __init__(self, step: Step, program: ProgramCost, seconds: float, now: float) -> None:
        self.step, self.program, self.left = step, program, seconds  # seconds of work, were it alone
        self.begun = self.since = now
        self.end = now + seconds  # where nothing slows it down
        self.slowdown, self.version = 0.0, 0  # 0: its end is not planned


class _Mesh:
    """One mesh: what it computes and what waits for its turn."""

    __slots__ = ("busy", "drawn", "has_failed", "is_out", "queue", "random", "ready", "running")

    def __init__(self, random: Random) -> None:
        self.random = random
        self.drawn = deque[float]()  # noise of its next steps that was drawn already
        self.running: _Running | None = None
        self.queue = deque[Step | Moving]()
        self.ready = 0.0  # it computes nothing before
        self.is_out = False  # somebody else sees to its steps
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
        # Noise of each mesh by itself: it does not depend on how the steps of meshes follow each other.
        self._meshes = [_Mesh(Random(f"{true.seed} {index}")) for index in range(len(costs))]
        self._noise, self._speed = true.noise, true.speed
        programs = [p for c in costs for kind in (c.prefill, c.decode, c.fused) for p in kind.values()]
        self._is_slowed = any(p.beside_prefill or p.beside_decode for p in programs)
        self._prefills = self._decodes = 0  # steps that run, of either kind

    @property
    def busy(self) -> list[float]:
        """Return the seconds that each mesh has computed, steps under way included."""
        now = self._time.now
        return [mesh.busy + (now - mesh.running.begun if mesh.running else 0.0) for mesh in self._meshes]

    def perform(self, index: int, action: Step | Moving) -> None:
        """Take a step, gather or scatter, which begins when those before it are done."""
        mesh = self._meshes[index]
        if mesh.is_out:
            raise RuntimeError(f"mesh {index} is given {action} while its steps are foreseen")
        if mesh.running is None and not mesh.queue and mesh.ready <= self._time.now:
            self._begin(mesh, action, is_idle=True)
        else:
            mesh.queue.append(action)

    def has_failed(self, index: int) -> bool:
        """Return whether a mesh has failed and was not reset since."""
        return self._meshes[index].has_failed

    def fail(self, index: int) -> list[Step | StartTransfer]:
        """Let a mesh fail; return what it was doing and what waited for its turn, in order."""
        mesh = self._meshes[index]
        waiting = [action.gather if isinstance(action, Moving) else action for action in mesh.queue]
        lost = [action for action in waiting if action is not None]
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

    def _begin(self, mesh: _Mesh, action: Step | Moving, *, is_idle: bool = False) -> None:
        if isinstance(action, Moving):
            if action.gather is not None:
                self._gathered(action.gather)
            if action.seconds:
                mesh.ready = self._time.now + action.seconds
                self._time.at(mesh.ready, self._go_on, mesh)
            return
        costs = self._costs[action.mesh]
        seconds = costs.step(action) * self._speed
        if self._noise:
            seconds *= mesh.drawn.popleft() if mesh.drawn else self._draw(mesh)
        if is_idle:
            seconds += costs.host.idle
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

    def _draw(self, mesh: _Mesh) -> float:
        return mesh.random.lognormvariate(-self._noise * self._noise / 2, self._noise)

    # ---- decode steps that are known to follow each other

    @property
    def can_foresee(self) -> bool:
        """Return whether it can be told when steps end: neither other steps nor pages that come or go slow them."""
        return not self._is_slowed and not any(costs.link.gather or costs.link.scatter for costs in self._costs)

    def two_decodes(self, index: int) -> tuple[Decode, Decode, float, float] | None:
        """Return the two decode steps that a mesh has, one that runs, with its begin and end, and one behind it; None:
        it has something else."""
        mesh = self._meshes[index]
        running = mesh.running
        if running is None or len(mesh.queue) != 1:
            return None
        queued = mesh.queue[0]
        if not isinstance(running.step, Decode) or not isinstance(queued, Decode):
            return None
        return running.step, queued, running.begun, running.end

    def take_out(self, index: int) -> None:
        """Take both steps out of a mesh: somebody else sees to them, and to what follows, until `put_back`."""
        mesh = self._meshes[index]
        assert mesh.running is not None
        mesh.running.version += 1  # its end is not planned any more
        mesh.running = None
        mesh.queue.clear()
        mesh.is_out = True

    def ends(
        self, index: int, end: float, second: tuple[int, int, int], later: tuple[int, int, int], count: int
    ) -> tuple["array[float]", list[float]]:
        """Tell when `count` decode steps end that follow each other, the first of them at `end`, and draw their noise.

        `second` and `later` are bucket, rows, and KV tokens of the second step, and of the third; each that follows has
        a token more of each row. The noise is of the second and those behind it; what is not used goes to `put_back`.
        """
        mesh, costs = self._meshes[index], self._costs[index].decode
        steps = np.empty(count)  # seconds of each, as `CostModel.step` adds them up, to the last bit
        bucket, rows, tokens = second
        program = costs[bucket]
        steps[1:2] = (program.fixed + (program.row * rows + program.context * tokens)) * self._speed
        bucket, rows, tokens = later
        program = costs[bucket]
        seconds = program.context * np.arange(tokens, tokens + rows * (count - 2), rows, dtype=np.float64)
        seconds += program.row * rows
        seconds += program.fixed
        seconds *= self._speed
        steps[2:] = seconds
        noise = list[float]()
        if self._noise:
            noise = [mesh.drawn.popleft() if mesh.drawn else self._draw(mesh) for _ in range(count - 1)]
            steps[1:] *= noise
        steps[0] = end
        return array("d", np.add.accumulate(steps, out=steps).tobytes()), noise

    def count_busy(self, index: int, begun: float, ends: Iterable[float], noise: Sequence[float]) -> None:
        """Take in when steps that were foreseen have ended, the first of them `begun` then, and the noise of those that
        have not begun."""
        mesh = self._meshes[index]
        for end in ends:
            mesh.busy += end - begun
            begun = end
        mesh.drawn.extendleft(reversed(noise))

    def put_back(self, index: int, running: Decode, begun: float, end: float, queued: Decode | None) -> None:
        """Have the mesh see to its steps itself again: one that runs, and one behind it, if any."""
        mesh, costs = self._meshes[index], self._costs[index]
        mesh.is_out = False
        mesh.running = _Running(running, costs.program(running), end - begun, begun)
        mesh.running.end = end
        if queued is not None:
            mesh.queue.append(queued)
        if end > self._time.now:
            self._time.at(end, self._end, (mesh, mesh.running, 0))
        else:
            self._end((mesh, mesh.running, 0))

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
