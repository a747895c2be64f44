"""Workers that are actors of a Ray cluster: one for each mesh, or for the meshes that `mesh_hosts` puts on one host.

Ray places them, says when one has died, and carries bytes. A placement group reserves what the meshes need, so that an
engine starts whole or not at all: GPUs where the cluster has any, else a CPU for each device. What goes to an actor is
one call for all that has gathered; what comes from it are the answers to calls that wait there, two at a time, so that
one always waits. Ray does not promise the order of calls to an actor with threads, so they are numbered.

An actor is no more restarted by Ray than it outlives its driver: it belongs to the driver's job, and the crew decides
what is started again. Weights never go through Ray's store: each worker reads its own.

Relies on the extra `ray`; it is imported when workers are made.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from ...host.extras import need
from ...host.threads import EngineThread
from ...protocol.worker import DriverEnd, Place, WorkerHandle
from ...topology import Topology
from .ray_cluster import first_line, hosts_of, join, parts_of, reserve, wants_of

_END_SECONDS = 10.0  # until a killed actor is seen to have ended
MOST_BYTES = 32 << 20  # after which a call to an actor takes no further message
_WAITING_CALLS = 2  # of `WorkerActor.take`
_THREADS = 4  # of an actor: those calls, one that brings messages, and one to spare


class RayWorkers:
    """The actors of one engine; a `WorkerBackend` (`protocol/worker.py`)."""

    def __init__(
        self,
        topology: Topology,
        serve: Callable[[DriverEnd], None],
        address: str | None = None,
        mesh_hosts: Sequence[str] | None = None,
    ) -> None:
        """Join or start a cluster and reserve what the meshes need; start no worker yet.

        Args:
            topology: the meshes.
            serve: what runs in a worker, a function of a module (`startup/worker_main.serve`).
            address: of a cluster, as `ray.init` takes it; None: the one that this process has joined, else a new one
                on this machine, which ends with the engine.
            mesh_hosts: for each mesh the address or name of the host that it has to be on; meshes of one host share a
                worker. None: a worker for each mesh, wherever there is room.

        Raises:
            ValueError: Ray is not installed, the cluster cannot be joined, or has too little; in one sentence.
        """
        self._ray = ray = need("ray", "ray", "workers='ray'")
        self._serve = serve
        parts = parts_of(topology, mesh_hosts)
        devices = [sum(topology.meshes[mesh].tp for mesh in meshes) for meshes in parts.values()]
        self._group: Any = None
        self._has_started = join(ray, address, sum(devices))
        try:
            self._wants = wants_of(ray, devices, list(parts) if mesh_hosts else None)
            self._group = reserve(ray, self._wants)
            self._hosts = hosts_of(ray, self._group)
        except BaseException:
            self._leave()
            raise
        where = list(zip(parts.values(), self._hosts, strict=True))
        self.places: Sequence[Place] = [
            Place(own, tuple(mesh for others, there in where if there == here for mesh in others))
            for own, here in where
        ]
        self._actors: list[Actor] = []

    def name(self, worker: int) -> str:
        """Name a worker by where it is."""
        return f"worker {worker} (an actor on {self._hosts[worker]})"

    def start(
        self, worker: int, epoch: int, received: Callable[[bytes], None], ended: Callable[[str], None]
    ) -> WorkerHandle:
        """Start the actor of a worker."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        want = self._wants[worker]
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=worker)
        made = self._ray.remote(WorkerActor).options(
            num_cpus=want.get("CPU", 0), num_gpus=want.get("GPU", 0), scheduling_strategy=where,
            max_restarts=0, max_task_retries=0, max_concurrency=_THREADS,
        )  # fmt: skip
        actor = Actor(self._ray, made.remote(worker, self._serve), received, ended)
        self._actors = [one for one in self._actors if one.is_alive] + [actor]
        return actor

    def close(self) -> None:
        """End all actors, wait for their end, give back what was reserved, and end a cluster that was started here."""
        for actor in self._actors:
            actor.kill()
        for actor in self._actors:
            actor.join()
        self._leave()

    def _leave(self) -> None:
        if self._group is not None:
            with suppress(Exception):  # where the cluster is gone, so is all of this
                self._ray.util.remove_placement_group(self._group)
        if self._has_started:
            self._ray.shutdown()


class Actor:
    """One actor; a `WorkerHandle`."""

    def __init__(self, ray: Any, actor: Any, received: Callable[[bytes], None], ended: Callable[[str], None]) -> None:
        self._ray, self._actor, self._received, self._on_end = ray, actor, received, ended
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._killed = threading.Event()
        self._reader = EngineThread(target=self._read, name="twinmesh-ray-reader", daemon=True)
        self._writer = EngineThread(target=self._write, name="twinmesh-ray-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    @property
    def is_alive(self) -> bool:
        """Return whether its end has not been seen."""
        return self._reader.is_alive()

    def send(self, data: bytes) -> None:
        """Have the bytes brought to it, after those before."""
        self._queue.put(data)

    def kill(self) -> None:
        """Have Ray kill it, and listen to it no more, also where Ray does not reach it."""
        if not self._killed.is_set():
            self._killed.set()
            self._queue.put(None)

    def join(self) -> None:
        """Wait until it has ended, for a while: of one that Ray does not reach nothing is ever heard."""
        self._writer.join()
        self._reader.join(_END_SECONDS)

    def _write(self) -> None:
        """Bring what has gathered, call by call, and at the end have it killed: Ray may take its time over both."""
        first = 0
        while (data := self._queue.get()) is not None:
            messages, size = [data], len(data)
            while size < MOST_BYTES and not self._queue.empty() and (more := self._queue.get()) is not None:
                messages.append(more)
                size += len(more)
            if self._killed.is_set():
                break
            self._bring(first, messages)
            first += len(messages)
        with suppress(Exception):  # it is dead already
            self._ray.kill(self._actor, no_restart=True)

    def _bring(self, first: int, messages: list[bytes]) -> None:
        with suppress(Exception):  # it is dead, which the reader finds out
            self._actor.put.remote(first, messages)

    def _read(self) -> None:
        waiting = deque(self._actor.take.remote(number) for number in range(_WAITING_CALLS))
        try:
            for number in itertools.count(_WAITING_CALLS):
                messages = self._ray.get(waiting.popleft())
                waiting.append(self._actor.take.remote(number))
                for message in messages:
                    if not self._killed.is_set():
                        self._received(message)
                if self._killed.is_set():
                    break
            why = "it was killed."
        except Exception as error:
            why = _how(error)
        self._on_end(why)


class WorkerActor:
    """What runs on the worker's host: `serve`, and the calls that carry its messages."""

    def __init__(self, worker: int, serve: Callable[[DriverEnd], None]) -> None:
        self._serve = serve
        self.host: str | None = need("ray", "ray", "workers='ray'").util.get_node_ip_address()
        self._incoming: SimpleQueue[bytes | None] = SimpleQueue()
        self._ordered, self._adding = Ordered(self._incoming.put), threading.Lock()
        self._outgoing: list[bytes] = []
        self._calls, self._changed, self._is_over = 0, threading.Condition(), False
        self._thread = EngineThread(target=self._run, name=f"twinmesh-worker-{worker}", daemon=True)
        self._thread.start()

    def put(self, first: int, messages: list[bytes]) -> None:
        """Take messages from the driver, of which the first has this number."""
        with self._adding:
            self._ordered.add(first, messages)

    def take(self, number: int) -> list[bytes]:
        """Wait until there are messages to the driver and call `number` - 1 has had its own; return all there are.

        Raises:
            RuntimeError: the worker has ended, and has nothing more to say.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._calls == number and (self._outgoing or self._is_over))
            if not self._outgoing:
                raise RuntimeError("it has ended.")
            messages, self._outgoing = self._outgoing, []
            self._calls += 1
            self._changed.notify_all()
        return messages

    def receive(self) -> bytes | None:
        """Wait for the next message; for `serve`."""
        return self._incoming.get()

    def send(self, data: bytes) -> None:
        """Send bytes; for `serve`."""
        with self._changed:
            self._outgoing.append(data)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._serve(self)
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()


@dataclass
class Ordered:
    """Passes messages on by their numbers, from 0, whatever order batches of them come in."""

    take: Callable[[bytes], None]

    def __post_init__(self) -> None:
        self._next, self._early = 0, dict[int, Sequence[bytes]]()

    def add(self, first: int, messages: Sequence[bytes]) -> None:
        """Take in a batch whose first message has the number `first`."""
        self._early[first] = messages
        while (batch := self._early.pop(self._next, None)) is not None:
            self._next += len(batch)
            for message in batch:
                self.take(message)


def _how(error: Exception) -> str:
    """Say in a sentence how an actor has ended."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return first_line(cause)
    return f"its actor is gone: {first_line(error)}"
