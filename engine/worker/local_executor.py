"""Performs commands on this process's devices: owns parameters, KV pools and whatever is in flight.

One thread calls `perform`; per mesh, programs are dispatched in that order, which is what makes it safe to hand on a
page or a slot at once. Results come back through `post`, from waiter threads. It decides nothing. One mesh's part is in
`mesh_worker.py`.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ...kernels_pallas.cpu.threads import StepsUnderWay, process_cores
from ...models.checkpoints.host_memory import FileMaps
from ...models.errors import CheckpointError
from ..errors import EngineError
from ..protocol.actions import (
    Accept,
    AllowTokens,
    AssignPages,
    Chunk,
    Command,
    CopyPage,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    Fused,
    Prefill,
    ResetMesh,
    Scatter,
    StartTransfer,
)
from ..protocol.events import TransferFailed, TransferReady
from ..protocol.results import Completion, StepFailed, StepResult, Traffic, describe
from ..sharding.weights import replace
from .kv_transfer import Staging, plan, send
from .mesh_worker import Dispatched, MeshWorker
from .request_records import RequestRecords
from .waiter import Waiter


class _Staged(NamedTuple):
    """A transfer in its destination's staging."""

    staging: Staging
    source_tp: int  # the degree of tensor parallelism where it came from
    bucket: int
    destination: int


class LocalExecutor:
    """The meshes of this process; an `Executor` (`protocol/executor.py`)."""

    def __init__(
        self,
        meshes: Sequence[MeshWorker],
        post: Callable[[Completion], None],
        clock: Callable[[], float],
        maps: FileMaps | None = None,
    ) -> None:
        """Start the waiter threads.

        Args:
            meshes: the topology's, in order.
            post: takes completions from any thread.
            clock: gives their times in seconds.
            maps: the files that weights lie in, if any do.
        """
        self.meshes, self._maps = list(meshes), maps
        self._placer = meshes[0].placer  # to check with, also once the meshes are gone
        self.records = RequestRecords()
        self.traffic, self._traffic_lock = Traffic(), threading.Lock()
        self._staged: dict[int, _Staged] = {}
        self._post, self._clock = post, clock
        # How many cores kernels on CPUs may use hangs on which meshes have steps under way.
        self._under_way = [StepsUnderWay(_cpu_devices(mesh), process_cores()) for mesh in self.meshes]
        self._step_waiters = [Waiter(f"twinmesh-steps-{index}") for index in range(len(self.meshes))]
        # Per source, because what leaves one source leaves in order; two sources must not wait for each other.
        self._transfer_waiters = {
            index: Waiter(f"twinmesh-transfers-{index}")
            for index, mesh in enumerate(self.meshes)
            if mesh.plan.destinations
        }

    @property
    def num_staged(self) -> int:
        """Return the number of transfers that are on their way or wait for their scatter."""
        return len(self._staged)

    @property
    def threads(self) -> list[threading.Thread]:
        """Return the threads that wait for results."""
        return [waiter.thread for waiter in (*self._step_waiters, *self._transfer_waiters.values())]

    def perform(self, command: Command) -> None:
        """Dispatch one command without waiting for the device.

        Raises:
            EngineError: a step, and a file that weights lie in has changed.
        """
        if isinstance(command, Prefill | Decode | Fused):
            self._check_files()
        match command:
            case Accept():
                self.records.accept(command)
            case AllowTokens():
                self.meshes[command.mesh].allow(command)
            case AssignPages():
                self.meshes[command.mesh].inputs.assign(command)
            case CopyPage():
                self.meshes[command.mesh].copy_page(command)
            case Prefill(chunks=chunks):
                self._report(command, chunks, self.meshes[command.mesh].prefill(command, self.records))
            case Decode(rows=rows):
                self._report(command, rows, self.meshes[command.mesh].decode(command, self.records))
            case Fused(chunks=chunks, rows=rows):
                self._report(command, (*chunks, *rows), self.meshes[command.mesh].fused(command, self.records))
            case StartTransfer():
                self._start_transfer(command)
            case Scatter(transfer=transfer, destination=destination):
                staged = self._staged.pop(transfer, None)
                if staged is not None:  # else its destination was reset meanwhile
                    self.meshes[destination].scatter(command, staged.staging, staged.source_tp, staged.bucket)
            case DropTransfer(transfer=transfer):
                self._staged.pop(transfer, None)
            case Finish(request_id=request_id):
                self.records.forget(request_id)
            case ResetMesh(mesh=mesh):
                self._reset(mesh)

    def check_params(self, new: Mapping[str, Any]) -> None:
        """Refuse parameters that cannot stand in for those of the same names; see `Placer.check`.

        Raises:
            EngineError: a file that weights lie in has changed: those that stay would be others than before.
        """
        self._check_files()
        self._placer.check(new)

    def replace_params(self, new: Mapping[str, Any]) -> None:
        """Use new parameters, by name, for every step from here on; steps in flight keep theirs."""
        params = [list(mesh.params) for mesh in self.meshes]
        for mesh in self.meshes:
            mesh.params = ()  # so that what is replaced can be freed
        replace([mesh.placer for mesh in self.meshes], params, new)
        for mesh, replaced in zip(self.meshes, params, strict=True):
            mesh.replace(tuple(replaced))

    def close(self) -> None:
        """Wait for what is in flight, join the threads and let go of every array."""
        for waiter in (*self._step_waiters, *self._transfer_waiters.values()):
            waiter.close()
        self.meshes.clear()
        self._staged.clear()
        self.records.clear()

    def _check_files(self) -> None:
        """Look whether the files that weights lie in are as they were; one system call for each, under 1 us."""
        if self._maps is None:
            return
        try:
            self._maps.check()
        except CheckpointError as error:
            raise EngineError(str(error)) from None

    def _reset(self, mesh: int) -> None:
        """Drop what is staged for the mesh and make its pool anew."""
        self._staged = {number: staged for number, staged in self._staged.items() if staged.destination != mesh}
        self.meshes[mesh].reset()

    def _report(
        self, action: Prefill | Decode | Fused, rows: tuple[Chunk | DecodeRow, ...], dispatched: Dispatched
    ) -> None:
        mesh, step, under_way = action.mesh, action.step, self._under_way[action.mesh]

        def ready(_: object) -> None:
            t = self._clock()
            self._check_files()  # if it raises, the waiter calls `failed`: nobody gets tokens of changed weights
            result = StepResult(t, mesh, step, rows, *dispatched.to_host())
            under_way.end()
            self._post(result)

        def failed(error: Exception) -> None:
            under_way.end()
            self._post(StepFailed(self._clock(), mesh, step, describe(error)))

        under_way.begin()
        self._step_waiters[mesh].watch(dispatched.arrays, ready, failed)

    def _start_transfer(self, action: StartTransfer) -> None:
        transfer, start = action.transfer, self._clock()
        source, destination = self.meshes[action.source], self.meshes[action.destination]
        tp, new_tp = source.plan.mesh.size, destination.plan.mesh.size
        route = plan(source.plan.model.num_kv_heads, tp, new_tp)
        staging = send(source.gather(action, new_tp), source.plan.mesh, destination.plan.mesh, route)
        self._staged[transfer] = _Staged(staging, tp, action.bucket, action.destination)

        def ready(staging: Staging) -> None:
            t = self._clock()
            self._count(action, sum(x.nbytes for x in jax.tree.leaves(staging)), t - start)
            self._post(TransferReady(t, transfer))

        def failed(error: Exception) -> None:
            self._post(TransferFailed(self._clock(), transfer, describe(error)))

        self._transfer_waiters[action.source].watch(staging, ready, failed)

    def _count(self, action: StartTransfer, size: int, seconds: float) -> None:
        with self._traffic_lock:  # each source has its own waiter
            self.traffic.count(action.source, action.destination, size, seconds)


def _cpu_devices(mesh: MeshWorker) -> int:
    return sum(device.platform == "cpu" for device in mesh.plan.mesh.devices.flat)
