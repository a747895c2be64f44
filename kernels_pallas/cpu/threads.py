"""The cores of this process, and how many of them the kernels of each mesh may use.

Meshes of one process share its cores. A mesh is at work from the dispatch of a step until its result is there; the
devices of all meshes at work have equal shares, of at least one thread. So a decode mesh has all cores for its kernels
while nobody prefills, and with a prefill beside it no more than its part: a thread too many would only stand where
another mesh's runs, and a call waits for every thread that has begun a piece of it. A prompt's calls, of many rows, may
use all cores in any case: nobody's next token waits for them. The two numbers stand in words of the process, which
kernels read at each call; they change no bit of a result.

XLA's own pool knows no meshes: a prefill's products take all of its threads, as many as there are cores, so that a
thread of decode's runs beside more of them than there are cores. `lower_pool_priority` makes the kernel prefer
decode's. Not here: XLA's operations choose their number of threads by themselves.
"""

import contextlib
import functools
import os
import threading
from pathlib import Path

import numpy as np

POOL = "tf_XLAEigen"  # what XLA calls the threads of the pool that operations share their work on
_NICENESS = 5  # of 19, more than the caller's; a thread with that one beside it gets three quarters of a core
_LINE = 64


def count_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may keep busy: those it may run on, and no more than its cgroup's quota.

    A part of a core is not counted, but at least one core is: threads that use up a quota are all stopped for a while.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([usable, *map(int, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """Read how many cores' time the process's cgroup and those around it may use, as far as that is limited."""
    found: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            said = " ".join(_read(base / group / file) for file in files).split()
            if len(said) == 2 and all(number.isdigit() for number in said) and int(said[1]) > 0:
                found.append(int(said[0]) / int(said[1]))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


class Cores:
    """The process's cores, shared by the devices that are at work."""

    def __init__(self, count: int) -> None:
        """Give all of them to whoever calls first."""
        self.count, self._devices = count, 0
        self._lock = threading.Lock()
        self._room = np.zeros(3 * _LINE, np.uint8)
        start = -int(self._room.ctypes.data) % _LINE
        self._words = self._room[start : start + 16].view(np.int64)
        self.add(0)

    @property
    def address(self) -> int:
        """The address of two words: the number of threads that a call may use, and that one over many rows may."""
        return int(self._words.ctypes.data)

    @property
    def threads(self) -> int:
        """The number of threads, the caller's included, that a call over few rows may use now."""
        return int(self._words[0])

    def add(self, devices: int) -> None:
        """Count devices as at work, or with a negative number no longer."""
        with self._lock:
            self._devices += devices
            self._words[:] = max(1, self.count // max(1, self._devices)), self.count


class StepsUnderWay:
    """The steps of one mesh that are dispatched and not done; while there are any, the mesh is at work."""

    def __init__(self, devices: int, cores: Cores) -> None:
        """Begin with none, on a mesh of so many CPU devices."""
        self._devices, self._cores, self._steps, self._lock = devices, cores, 0, threading.Lock()

    def begin(self) -> None:
        """Count a step that was dispatched."""
        self._add(1)

    def end(self) -> None:
        """Count one off."""
        self._add(-1)

    def _add(self, steps: int) -> None:
        with self._lock:
            before, self._steps = self._steps, self._steps + steps
            if (before > 0) != (self._steps > 0):
                self._cores.add(self._devices * steps)


@functools.cache
def process_cores() -> Cores:
    """Return the process's own, counted on the first call. They are never freed: kernels read their word."""
    return Cores(count_cores())


def lower_pool_priority(task: Path = Path("/proc/self/task"), *, only: str | None = POOL) -> int:
    """Let all other threads of the process go before those of XLA's pool; returns how many there are now.

    For a process, of whatever priority, that prefills on one CPU device and decodes on another. JAX must have found its
    devices. It lasts as long as the process, which without privileges may not raise it again. Elsewhere than on Linux
    it does nothing. With `only=None` it lowers all threads of the process, behind those of other processes: for one
    that prefills alone, while others on the same cores decode.
    """
    lowered, niceness = 0, min(os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS, 19)
    for thread in sorted(task.iterdir()) if task.is_dir() else ():
        with contextlib.suppress(OSError):  # it has ended
            if only is None or (thread / "comm").read_text().strip() == only:
                number = int(thread.name)
                if os.getpriority(os.PRIO_PROCESS, number) < niceness:
                    os.setpriority(os.PRIO_PROCESS, number, niceness)
                lowered += 1
    return lowered
