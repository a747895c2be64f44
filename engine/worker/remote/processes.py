"""Workers that are processes of this machine: each an interpreter of its own, reached through a pair of sockets.

They are started as `python -c`, not by `multiprocessing`'s start methods: those run the caller's main module again,
which a program has to be written for, or fork a process that has threads. What goes over the sockets are messages of
`multiprocessing.connection`, whole or not at all. A worker ends when its end of the sockets is closed, for whatever
reason the driver has ended.

On machines with GPUs each worker sees those of its own meshes alone (CUDA_VISIBLE_DEVICES), counted through the
topology in order, from those that the driver may use.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from queue import SimpleQueue

from ...host.threads import EngineThread
from ...protocol.worker import Place, WorkerHandle
from ...topology import Topology

_CLOSE_SECONDS = 10.0  # that a worker may take to end by itself
_MAIN = "import sys; sys.path[:] = sys.argv[2:]; from {module} import main; main(int(sys.argv[1]))"


class WorkerProcesses:
    """The worker processes of one engine; a `WorkerBackend` (`protocol/worker.py`)."""

    def __init__(self, topology: Topology, count: int | None = None, per_mesh: int = 1) -> None:
        """Start none yet.

        The meshes are divided, in order, over `count` processes; None: one for each mesh. Or each mesh is divided over
        `per_mesh` processes, which follow each other.
        """
        meshes = range(len(topology.meshes))
        count = len(meshes) if count is None else count
        cuts = [len(meshes) * index // count for index in range(count + 1)]
        self.places: Sequence[Place] = [
            Place(tuple(meshes[first:stop]), tuple(meshes)) for first, stop in pairwise(cuts) for _ in range(per_mesh)
        ]
        self._per_mesh = per_mesh
        self._devices = [spec.tp for spec in topology.meshes]
        self._processes: dict[int, _Process] = {}  # by worker, the one that was started last
        self._ended: list[_Process] = []  # those before, until their end is seen

    def name(self, worker: int) -> str:
        """Name a worker by its process."""
        process = self._processes.get(worker)
        return f"worker {worker}" if process is None else f"worker {worker} (process {process.pid})"

    def pid(self, worker: int) -> int:
        """Return the process of a worker, the last that was started."""
        return self._processes[worker].pid

    def start(
        self, worker: int, epoch: int, received: Callable[[bytes], None], ended: Callable[[str], None]
    ) -> WorkerHandle:
        """Start the process of a worker."""
        before = self._processes.get(worker)
        self._ended = [one for one in (*self._ended, *filter(None, [before])) if one.is_alive]
        process = self._processes[worker] = _Process(f"twinmesh-worker-{worker}", self.environment(worker))
        process.listen(received, ended)
        return process

    def close(self) -> None:
        """Have all processes end, and wait for it; one that does not is killed."""
        processes = [*self._ended, *self._processes.values()]
        for process in processes:
            process.hang_up()
        for process in processes:
            process.wait(_CLOSE_SECONDS)

    def environment(self, worker: int) -> dict[str, str]:
        """Return the environment of a worker's process: the driver's, with the GPUs of its meshes alone."""
        import jax  # which a worker, that takes `DriverConnection` from here, imports when its reader runs

        meshes = self.places[worker].meshes
        count = sum(self._devices[mesh] for mesh in meshes) // self._per_mesh
        first = sum(self._devices[: meshes[0]]) + worker % self._per_mesh * count
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = [str(index) for index in range(first + count)] if given is None else given.split(",")
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible[first : first + count])}
        if jax.config.jax_platforms:  # which the program may have chosen
            environment["JAX_PLATFORMS"] = jax.config.jax_platforms
        return environment


class _Process:
    """One process; a `WorkerHandle`."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        """Start it. It is in a group of its own, so that a Ctrl-C in the terminal is the driver's alone.

        Raises:
            ValueError: the system does not let it be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            module = f"{__package__.rpartition('.worker')[0]}.startup.worker_main"
            arguments = [str(theirs.fileno()), *map(os.path.abspath, sys.path)]
            command = [sys.executable, "-c", _MAIN.format(module=module), *arguments]
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, process_group=0
                )
            except OSError as error:
                ours.close()
                raise ValueError(f"{name} could not be started: {error.strerror or error}.") from None
        self._connection = Connection(ours.detach())
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._name = name

    @property
    def pid(self) -> int:
        """Return the number of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Return whether it has not ended."""
        return self._process.poll() is None

    def listen(self, received: Callable[[bytes], None], ended: Callable[[str], None]) -> None:
        """Start the threads that read and write."""
        self._received, self._on_end = received, ended
        self._reader = EngineThread(target=self._read, name=f"{self._name}-reader", daemon=True)
        self._writer = EngineThread(target=self._write, name=f"{self._name}-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def send(self, data: bytes) -> None:
        """Have the bytes written, after those before."""
        self._queue.put(data)

    def kill(self) -> None:
        """End the process with SIGKILL, which also ends one that is stopped."""
        self._process.kill()
        self._queue.put(None)

    def hang_up(self) -> None:
        """Let the process see the end of its driver."""
        self._queue.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the process has ended and its threads have, and kill it after so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._queue.put(None)
        self._reader.join()
        self._writer.join()
        self._connection.close()

    def _write(self) -> None:
        try:
            while (data := self._queue.get()) is not None:
                self._connection.send_bytes(data)
            # The process sees the end; what it still sends is read until it closes its own.
            _shut_down(self._connection)
        except OSError:
            pass  # it is dead, which the reader finds out

    def _read(self) -> None:
        try:
            while True:
                self._received(self._connection.recv_bytes())
        except (EOFError, OSError):
            pass
        self._on_end(_how(self._process.wait()))


def _shut_down(connection: Connection) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_WR)


def _how(code: int) -> str:
    """Say in a sentence how a process has ended."""
    if code >= 0:
        return f"it ended with code {code}."
    try:
        return f"it was ended by {signal.Signals(-code).name}."
    except ValueError:
        return f"it was ended by signal {-code}."


class DriverConnection:
    """What a worker process has of its driver; a `DriverEnd`."""

    host: str | None = None  # all workers are on this machine

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)

    def receive(self) -> bytes | None:
        """Wait for the next message; None: the driver is gone."""
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def send(self, data: bytes) -> None:
        """Send bytes; for one thread at a time."""
        with suppress(OSError):  # `receive` says that the driver is gone
            self._connection.send_bytes(data)
