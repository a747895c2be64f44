"""Performs the scheduler's actions on real devices: owns parameters, KV pools and whatever is in flight.

One thread calls `perform`; per mesh, programs are dispatched in that order, which is what makes it safe to hand on a
page or a slot at once. Results come back through `post`, from waiter threads. It decides nothing. How one mesh does its
part is `mesh_worker.py`'s business.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.typing import ArrayLike

from ..metrics.counters import Traffic
from ..protocol.actions import (
    Action,
    AssignPages,
    Chunk,
    CopyPage,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    Fused,
    Prefill,
    Scatter,
    StartTransfer,
)
from ..protocol.events import TransferFailed, TransferReady
from ..protocol.results import StepFailed, StepResult, describe
from ..protocol.submission import Payloads
from .kv_transfer import Staging, plan, send
from .mesh_worker import Dispatched, MeshExecutor
from .waiter import Waiter

type Completion = StepResult | StepFailed | TransferReady | TransferFailed


class _Staged(NamedTuple):
    """A transfer in its destination's staging: its bucket, and the degree of tensor parallelism that it came from."""

    staging: Staging
    source_tp: int
    bucket: int


class Executor:
    """All meshes of this process."""

    def __init__(
        self, meshes: Sequence[MeshExecutor], post: Callable[[Completion], None], clock: Callable[[], float]
    ) -> None:
        """`post` takes completions from any thread; `clock` gives their times in seconds."""
        self.meshes = list(meshes)
        self._placer = meshes[0].placer  # to check with, also once the meshes are gone
        self.payloads = Payloads()
        self.traffic, self._traffic_lock = Traffic(), threading.Lock()
        self._staged: dict[int, _Staged] = {}
        self._post, self._clock = post, clock
        self._step_waiters = [Waiter(f"twinmesh-steps-{index}") for index in range(len(self.meshes))]
        # Per source, because what leaves one source leaves in order; two sources must not wait for each other.
        self._transfer_waiters = {
            index: Waiter(f"twinmesh-transfers-{index}")
            for index, mesh in enumerate(self.meshes)
            if mesh.plan.destinations
        }

    @property
    def num_staged(self) -> int:
        """How many transfers are on their way or wait for their scatter."""
        return len(self._staged)

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that wait for results."""
        return [waiter.thread for waiter in (*self._step_waiters, *self._transfer_waiters.values())]

    def perform(self, action: Action) -> None:
        """Dispatch one action; returns without waiting for the device."""
        match action:
            case AssignPages():
                self.meshes[action.mesh].assign(action)
            case CopyPage():
                self.meshes[action.mesh].copy_page(action)
            case Prefill(chunks=chunks):
                self._report(action, chunks, self.meshes[action.mesh].prefill(action, self.payloads))
            case Decode(rows=rows):
                self._report(action, rows, self.meshes[action.mesh].decode(action, self.payloads))
            case Fused(chunks=chunks, rows=rows):
                self._report(action, (*chunks, *rows), self.meshes[action.mesh].fused(action, self.payloads))
            case StartTransfer():
                self._start_transfer(action)
            case Scatter(transfer=transfer, destination=destination):
                staged = self._staged.pop(transfer)
                self.meshes[destination].scatter(action, staged.staging, staged.source_tp, staged.bucket)
            case DropTransfer(transfer=transfer):
                self._staged.pop(transfer, None)
            case Finish(request_id=request_id):
                del self.payloads[request_id]

    def check_params(self, new: Mapping[str, ArrayLike]) -> None:
        """Refuse parameters that cannot stand in for those of the same names; see `Placer.check`."""
        self._placer.check(new)

    def replace_params(self, new: Mapping[str, ArrayLike]) -> None:
        """New parameters, by name, for every step from here on; steps in flight keep theirs."""
        for mesh in self.meshes:
            params, mesh.params = list(mesh.params), ()
            mesh.placer.replace(params, new)
            mesh.params = tuple(params)

    def reset_mesh(self, mesh: int) -> None:
        """After a step raised: a new, empty pool."""
        self.meshes[mesh].reset()

    def close(self) -> None:
        """Wait for what is in flight, join the threads and let go of every array."""
        for waiter in (*self._step_waiters, *self._transfer_waiters.values()):
            waiter.close()
        self.meshes.clear()
        self._staged.clear()

    def _report(
        self, action: Prefill | Decode | Fused, rows: tuple[Chunk | DecodeRow, ...], dispatched: Dispatched
    ) -> None:
        mesh, step = action.mesh, action.step

        def ready(_: object) -> None:
            t = self._clock()
            self._post(StepResult(t, mesh, step, rows, *dispatched.to_host()))

        def failed(error: Exception) -> None:
            self._post(StepFailed(self._clock(), mesh, step, describe(error)))

        self._step_waiters[mesh].watch(dispatched.arrays, ready, failed)

    def _start_transfer(self, action: StartTransfer) -> None:
        transfer, start = action.transfer, self._clock()
        source, destination = self.meshes[action.source], self.meshes[action.destination]
        tp, new_tp = source.plan.mesh.size, destination.plan.mesh.size
        route = plan(source.plan.model.num_kv_heads, tp, new_tp)
        staging = send(source.gather(action, new_tp), source.plan.mesh, destination.plan.mesh, route)
        self._staged[transfer] = _Staged(staging, tp, action.bucket)

        def ready(staging: Staging) -> None:
            t = self._clock()
            self._count(sum(x.nbytes for x in jax.tree.leaves(staging)), t - start)
            self._post(TransferReady(t, transfer))

        def failed(error: Exception) -> None:
            self._post(TransferFailed(self._clock(), transfer, describe(error)))

        self._transfer_waiters[action.source].watch(staging, ready, failed)

    def _count(self, size: int, seconds: float) -> None:
        with self._traffic_lock:  # each source has its own waiter
            self.traffic.transfers += 1
            self.traffic.bytes += size
            self.traffic.seconds += seconds
