"""An executor in virtual time, behind the contract of the real one (`protocol/executor.py`).

Each mesh performs its commands in the order given; results come as messages, at the times that the costs say. Host time
is spent here too: the dispatching thread goes on by what a step costs it, and what it dispatches next comes later. A
copied page and an assignment cost no time. Tokens mean nothing: all are 0. The KV of a mesh is only in the scheduler's
books.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..config import EngineConfig, PoolSize
from ..metrics.counters import HostTime
from ..protocol.actions import (
    AssignPages,
    Chunk,
    Command,
    Decode,
    DecodeRow,
    DropTransfer,
    Fused,
    Prefill,
    ResetMesh,
    Scatter,
    StartTransfer,
)
from ..protocol.events import TransferFailed, TransferReady
from ..protocol.results import Completion, MeshLost, StepFailed, StepResult, Traffic
from ..scheduler.cost_model import CostModel
from .links import Links, Sending
from .virtual_meshes import Moving, Step, TrueTimes, VirtualMeshes
from .virtual_time import VirtualTime

_STEPS = (Prefill, Decode, Fused)


class VirtualExecutor:
    """The meshes and links of one engine; an `Executor`."""

    def __init__(
        self,
        config: EngineConfig,
        pools: Sequence[PoolSize],
        costs: Sequence[CostModel],
        time: VirtualTime,
        post: Callable[[Completion], None],
        true: TrueTimes,
    ) -> None:
        """Begin idle; `costs` are of each mesh, and `post` takes completions."""
        self.traffic, self.host = Traffic(), HostTime()
        self._pools, self._costs, self._time, self._post = pools, costs, time, post
        self._tokens = np.zeros((config.decode_steps, config.prefill_rows + config.max_num_seqs), np.int32)
        self._caps = [config.pages_to_send(window) for window in config.windows]
        self._links = Links(time, costs[0].link, len(costs), self._arrived)
        self.meshes = VirtualMeshes(time, costs, true, self._ended, self._gathered)
        self._dispatched: dict[int, float] = {}  # transfer -> when it was
        self._sizes: dict[int, int] = {}  # transfer -> its bytes, from its gather until it is scattered or dropped
        self.touched: set[int] = set()  # meshes that were given something since somebody emptied it

    def perform(self, command: Command) -> None:
        """Start one command, and let the dispatching thread take its time for it."""
        if isinstance(command, AssignPages):
            if command.first == 0:  # of a place that was just taken
                self.touched.add(command.mesh)
        elif isinstance(command, _STEPS):
            host = self._costs[command.mesh].host
            seconds = host.step + host.row * len(_rows(command))
            self.host.seconds += seconds
            self.touched.add(command.mesh)
            self._time.advance(self._time.now + seconds)
            if self.meshes.has_failed(command.mesh):
                self._fail_step(command, _LOST)
            else:
                self.meshes.perform(command.mesh, command)
        elif isinstance(command, StartTransfer):
            if self.meshes.has_failed(command.source):
                self._post(TransferFailed(self._time.now, command.transfer, _LOST))
            else:
                self._dispatched[command.transfer] = self._time.now
                seconds = self._costs[command.source].link.gather * self._bytes(command)
                self.meshes.perform(command.source, Moving(command, seconds))
        elif isinstance(command, ResetMesh):
            self.meshes.reset(command.mesh)
        elif isinstance(command, Scatter):
            self.touched.add(command.destination)
            self._scatter(command)
        elif isinstance(command, DropTransfer):
            self._sizes.pop(command.transfer, None)

    @property
    def steps_cost_no_host(self) -> bool:
        """Return whether the dispatching thread takes no time for any step."""
        hosts = [costs.host for costs in self._costs]
        return not any(host.step or host.row or host.read for host in hosts)

    def fail(self, mesh: int, reason: str) -> None:
        """Let a mesh fail now: what it was doing raises; where that is nothing, it is reported as lost."""
        lost = self.meshes.fail(mesh)
        for action in lost:
            if isinstance(action, StartTransfer):
                del self._dispatched[action.transfer]
                self._post(TransferFailed(self._time.now, action.transfer, reason))
            else:
                self._fail_step(action, reason)
        if not any(isinstance(action, Prefill | Decode | Fused) for action in lost):
            self._post(MeshLost(self._time.now, mesh, reason))

    def silence(self, mesh: int, until: float) -> None:
        """Let a mesh be gone now, with all that it was doing, of which nobody hears before `until`."""
        self._drop(mesh)
        self.meshes.pause(mesh, until)

    def lose(self, mesh: int) -> None:
        """Let a mesh be gone now, with all that it was doing."""
        self._drop(mesh)
        self._post(MeshLost(self._time.now, mesh, "the mesh is gone.", is_gone=True))

    def _drop(self, mesh: int) -> None:
        for action in self.meshes.fail(mesh):
            if isinstance(action, StartTransfer):
                del self._dispatched[action.transfer]

    def flush(self) -> None:
        """Do nothing: every command is performed at once."""

    def check_params(self, new: Mapping[str, object]) -> None:
        """Take any parameters: there are none."""

    def replace_params(self, new: Mapping[str, object]) -> None:
        """Do nothing: there are no parameters."""

    def close(self) -> None:
        """Do nothing: there are no threads."""

    def _ended(self, step: Step) -> None:
        """Post what a step has sampled, once it is read; it is stamped with its end, as waiters do."""
        rows = _rows(step)
        tokens = self._tokens[: step.steps if isinstance(step, Decode) else 1, : len(rows)]
        result = StepResult(self._time.now, step.mesh, step.step, rows, tokens)
        read = self._costs[step.mesh].host.read
        if read:
            self._time.at(self._time.now + read, self._post, result)
        else:
            self._post(result)

    def _fail_step(self, step: Step, reason: str) -> None:
        self._post(StepFailed(self._time.now, step.mesh, step.step, reason))

    def _bytes(self, action: StartTransfer) -> int:
        return self._pools[action.source].transfer_bytes(action.bucket, self._caps)

    def _gathered(self, action: StartTransfer) -> None:
        self._sizes[action.transfer] = size = self._bytes(action)
        self._links.send(action.transfer, action.source, action.destination, size)

    def _scatter(self, command: Scatter) -> None:
        mesh = command.destination
        seconds = self._costs[mesh].link.scatter * self._sizes.pop(command.transfer, 0)
        if seconds and not self.meshes.has_failed(mesh):
            self.meshes.perform(mesh, Moving(None, seconds))

    def _arrived(self, sending: Sending) -> None:
        now = self._time.now
        seconds = now - self._dispatched.pop(sending.number)
        self.traffic.count(sending.source, sending.destination, sending.size, seconds)
        self._post(TransferReady(now, sending.number))


_LOST = "the mesh has failed."


def _rows(step: Step) -> tuple[Chunk | DecodeRow, ...]:
    if isinstance(step, Decode):
        return step.rows
    return step.chunks if isinstance(step, Prefill) else (*step.chunks, *step.rows)
