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
import os
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

_PLACE_SECONDS = 60.0  # until a placement group is there
_END_SECONDS = 10.0  # until a killed actor is seen to have ended
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
        parts = _parts(topology, mesh_hosts)
        devices = [sum(topology.meshes[mesh].tp for mesh in meshes) for meshes in parts.values()]
        self._has_started = _join(ray, address, sum(devices))
        try:
            self._wants = _wants(ray, devices, list(parts) if mesh_hosts else None)
            self._group = _reserve(ray, self._wants)
        except BaseException:
            self._leave()
            raise
        self._hosts = _hosts_of(ray, self._group)
        where = list(zip(parts.values(), self._hosts, strict=True))
        self.places: Sequence[Place] = [
            Place(own, tuple(mesh for others, there in where if there == here for mesh in others))
            for own, here in where
        ]
        self._actors: list[_Actor] = []

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
        actor = _Actor(self._ray, made.remote(worker, self._serve), received, ended)
        self._actors = [one for one in self._actors if one.is_alive] + [actor]
        return actor

    def close(self) -> None:
        """End all actors, wait for their end, give back what was reserved, and end a cluster that was started here."""
        for actor in self._actors:
            actor.kill()
        for actor in self._actors:
            actor.join()
        with suppress(Exception):  # where the cluster is gone, so is all of this
            self._ray.util.remove_placement_group(self._group)
        self._leave()

    def _leave(self) -> None:
        if self._has_started:
            self._ray.shutdown()


class _Actor:
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
            messages = [data]
            while not self._queue.empty() and (more := self._queue.get()) is not None:
                messages.append(more)
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


def _parts(topology: Topology, mesh_hosts: Sequence[str] | None) -> dict[Any, tuple[int, ...]]:
    """Divide the meshes over workers: by host, or each its own."""
    meshes = range(len(topology.meshes))
    if mesh_hosts is None:
        return {mesh: (mesh,) for mesh in meshes}
    if len(mesh_hosts) != len(meshes):
        raise ValueError(
            f"mesh_hosts names {len(mesh_hosts)} hosts and topology {topology} has {len(meshes)} meshes: name one for "
            "each mesh, in order."
        )
    return {host: tuple(mesh for mesh in meshes if mesh_hosts[mesh] == host) for host in dict.fromkeys(mesh_hosts)}


def _join(ray: Any, address: str | None, devices: int) -> bool:
    """Join a cluster; return whether it was started here, and has to be ended."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address is None:
        # Of a cluster of this machine alone the CPUs are only counted, and a device may share one. Ray would run its
        # workers behind whatever else the machine does.
        cpus = max(devices, os.cpu_count() or 1)
        quiet |= {"num_cpus": cpus, "include_dashboard": False, "_system_config": {"worker_niceness": 0}}
    try:
        ray.init(address=address or "local", **quiet)
    except Exception as error:
        where = "on this machine" if address is None else f"at {address}"
        raise ValueError(f"Ray {ray.__version__} does not start or join a cluster {where}: {_first(error)}") from None
    return True


def _wants(ray: Any, devices: Sequence[int], hosts: Sequence[str] | None) -> list[dict[str, float]]:
    """Say what each worker needs of Ray's resources, and refuse more than the cluster has."""
    there = ray.cluster_resources()
    has_gpus = there.get("GPU", 0) > 0
    wants = [{"CPU": 1.0, "GPU": float(n)} if has_gpus else {"CPU": float(n)} for n in devices]
    for kind in ("GPU", "CPU"):
        asked = sum(want.get(kind, 0) for want in wants)
        if asked > there.get(kind, 0):
            raise ValueError(
                f"the meshes need {asked:g} {kind}s and the Ray cluster has {there.get(kind, 0):g}: use fewer or "
                "smaller meshes, or add nodes."
            )
    if hosts is not None:
        for want, host in zip(wants, hosts, strict=True):
            want[f"node:{_address_of(ray, host)}"] = 0.001
    return wants


def _address_of(ray: Any, host: str) -> str:
    """Find a host of the cluster by its address or name."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    for node in alive:
        if host in (node["NodeManagerAddress"], node["NodeManagerHostname"], node.get("NodeName")):
            return str(node["NodeManagerAddress"])
    there = ", ".join(sorted(f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})" for node in alive))
    raise ValueError(f"mesh_hosts names {host!r}, which is no node of the Ray cluster: there are {there}.")


def _reserve(ray: Any, wants: Sequence[dict[str, float]]) -> Any:
    """Reserve what each worker needs, all or nothing."""
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(list(wants), strategy="PACK")
    if group.wait(_PLACE_SECONDS):
        return group
    remove_placement_group(group)
    free = {kind: value for kind, value in ray.available_resources().items() if kind in ("CPU", "GPU")}
    asked = "; ".join(", ".join(f"{value:g} {kind}" for kind, value in want.items()) for want in wants)
    left = ", ".join(f"{value:g} {kind}" for kind, value in free.items()) or "none"
    raise ValueError(
        f"the Ray cluster has no room for the meshes within {_PLACE_SECONDS:g} s: they need, worker by worker, "
        f"{asked}; free are {left}: wait for others to end, or add nodes."
    )


def _hosts_of(ray: Any, group: Any) -> list[str]:
    """Find the address of each worker's host."""
    from ray.util.placement_group import placement_group_table

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    placed = placement_group_table(group)["bundles_to_node_id"]
    return [addresses[placed[index]] for index in range(len(placed))]


def _first(error: BaseException) -> str:
    """Return what an error says, its first line as a sentence."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."


def _how(error: Exception) -> str:
    """Say in a sentence how an actor has ended."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return _first(cause)
    return f"its actor is gone: {_first(error)}"
