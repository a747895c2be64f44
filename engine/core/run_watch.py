"""Watches a run under load, real or simulated: samples of the engine's state, roles, and when requests were taken in.

An observer on the dispatching thread: what it does takes its time from a real engine, so a sample walks the requests at
most ten times a second. It decides nothing.
"""

from collections.abc import Callable, Sequence

from ..metrics.counters import Counters
from ..metrics.series import MOST, MeshSeries, Series
from ..protocol.cache_report import MissReason
from ..scheduler.request import State
from ..scheduler.scheduler import Scheduler
from .acceptances import Acceptances
from .role_changes import RoleChanges

_PERIOD = 0.1  # seconds from one sample to the next, at first


class RunWatch(Acceptances):
    """What is seen of one run. `scheduler` is read on the dispatching thread alone: make it there (`core.inspect`)."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float], busy: Callable[[], Sequence[float]]) -> None:
        """Begin with nothing.

        Args:
            scheduler: the engine's.
            clock: gives seconds, real or virtual ones.
            busy: gives the seconds in which each mesh has computed so far.
        """
        super().__init__(clock)
        self._busy = busy
        self._started = list(busy())
        self._before = _Counted(scheduler.counters)
        self._period, self._last = _PERIOD, -_PERIOD
        self._samples: list[_Sample] = []
        self.changes = RoleChanges(scheduler, clock())

    def decided(self, scheduler: Scheduler, actions: Sequence[object]) -> None:
        """See roles, and take a sample if it is time."""
        now = self._clock()
        self.changes.look(scheduler, now)
        if now - self._last >= self._period:
            self._last = now
            self._samples.append(_Sample(scheduler, now, self.busy(), self._before))
            if len(self._samples) >= MOST:
                del self._samples[1::2]
                self._period *= 2

    def busy(self) -> list[float]:
        """Return the seconds in which each mesh has computed since this began."""
        return [now - before for now, before in zip(self._busy(), self._started, strict=True)]

    def series(self) -> Series:
        """Return the samples so far; times are on the clock."""
        samples = self._samples
        meshes = range(len(self._started))
        return Series(
            t=[sample.t for sample in samples],
            waiting=[sample.waiting for sample in samples],
            oldest=[sample.oldest for sample in samples],
            running=[sample.running for sample in samples],
            prompt_tokens=[sample.counted.prompt for sample in samples],
            cached_tokens=[sample.counted.cached for sample in samples],
            missed_tokens={
                reason.value: [sample.counted.missed[reason] for sample in samples]
                for reason in MissReason
                if samples and samples[-1].counted.missed[reason]
            },
            meshes=[
                MeshSeries(
                    busy=[sample.busy[mesh] for sample in samples],
                    kv_used=[sample.kv_used[mesh] for sample in samples],
                    placed=[sample.placed[mesh] for sample in samples],
                )
                for mesh in meshes
            ],
            roles=list(self.changes.roles),
        )


class _Counted:
    """Counts of prompts, from some time on."""

    __slots__ = ("cached", "missed", "prompt")

    def __init__(self, counters: Counters, before: "_Counted | None" = None) -> None:
        self.prompt: int = counters.prompt_tokens - (before.prompt if before else 0)
        self.cached: int = counters.cached_tokens - (before.cached if before else 0)
        self.missed: dict[MissReason, int] = {
            reason: count - (before.missed[reason] if before else 0) for reason, count in counters.missed_tokens.items()
        }


class _Sample:
    """The state at one time."""

    __slots__ = ("busy", "counted", "kv_used", "oldest", "placed", "running", "t", "waiting")

    def __init__(self, scheduler: Scheduler, now: float, busy: list[float], before: _Counted) -> None:
        state = State.WAITING
        arrivals = [one.timeline.arrival for one in scheduler.requests.values() if one.state is state]
        self.t, self.busy, self.counted = now, busy, _Counted(scheduler.counters, before)
        self.waiting, self.running = len(arrivals), len(scheduler.requests)
        self.oldest = max(0.0, now - min(arrivals)) if arrivals else 0.0
        self.kv_used = [1.0 - mesh.pages.room for mesh in scheduler.meshes]
        self.placed = [len(mesh.placed) for mesh in scheduler.meshes]
