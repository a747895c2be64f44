"""Performs the scheduler's actions on real devices: owns parameters, KV pools and whatever is in flight.

One thread calls `perform`; per mesh, programs are dispatched in that order, which is what makes it safe to hand on a
page or a slot at once. Results come back through `post`, from waiter threads. It decides nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled
from numpy.typing import DTypeLike

from .config import Role
from .handoff import Staging, padded, send
from .kv_cache import DeviceState
from .programs import MeshPlan, Params, Programs
from .protocol import (
    Action,
    AssignPages,
    Chunk,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    Prefill,
    Scatter,
    StartTransfer,
    TransferFailed,
    TransferReady,
)
from .sampling import SamplingInputs
from .sampling_params import SamplingParams
from .steps import DecodeInputs, PrefillInputs
from .waiter import Waiter


@dataclass(frozen=True)
class Payload:
    """What the device plane needs of a request: its prompt [n] int32, how to sample, and a seed that is drawn."""

    prompt: np.ndarray
    sampling: SamplingParams
    seed: int


@dataclass(frozen=True)
class StepResult:
    """A step's rows and the token sampled for each; `tokens[i]` means something where row i samples."""

    t: float
    mesh: int
    step: int
    rows: tuple[Chunk, ...] | tuple[DecodeRow, ...]
    tokens: np.ndarray


@dataclass(frozen=True)
class StepFailed:
    """A step raised after it was dispatched; whatever follows it on its mesh will raise too."""

    t: float
    mesh: int
    step: int
    reason: str


type Completion = StepResult | StepFailed | TransferReady | TransferFailed


class MeshExecutor:
    """One mesh's parameters, programs, state and page tables."""

    def __init__(self, plan: MeshPlan, programs: Programs, params: Params) -> None:
        """Allocates the KV pool."""
        self.plan, self.programs, self.params = plan, programs, params
        self.num_pages = plan.state.kv.k.shape[1]
        slots, width = plan.config.max_num_seqs, plan.config.max_pages
        self.page_table = np.full((slots, width), self.num_pages, np.int32)
        self.state: DeviceState = programs.allocate()

    def reset(self) -> None:
        """A new pool, since the old one was lost with the step that had it donated; first let go of what is left."""
        del self.state
        self.state = self.programs.allocate()

    def assign(self, slot: int, pages: tuple[int, ...]) -> None:
        """Set a slot's page table. Steps copy it, so those already dispatched keep theirs."""
        self.page_table[slot] = self.num_pages
        self.page_table[slot, : len(pages)] = pages

    def prefill(self, action: Prefill, payloads: dict[str, Payload]) -> jax.Array:
        """Dispatch a packed prefill step; tokens [R]."""
        return self._step(self.programs.prefill[action.bucket], self._prefill_inputs(action, payloads))

    def decode(self, action: Decode) -> jax.Array:
        """Dispatch a decode step; tokens [B]."""
        return self._step(self.programs.decode[action.bucket], self._decode_inputs(action))

    def _step(self, program: Compiled, inputs: PrefillInputs | DecodeInputs) -> jax.Array:
        tokens: jax.Array
        self.state, tokens = program(self.params, self.state, inputs)
        return tokens

    def gather(self, action: StartTransfer) -> Staging:
        """Copy a request out."""
        pages = padded(action.source_pages, action.bucket, self.num_pages)
        staging: Staging = self.programs.gather[action.bucket](self.state, pages, np.int32(action.source_slot))
        return staging

    def scatter(self, action: Scatter, staging: Staging) -> None:
        """Copy a request in."""
        bucket = staging.kv.k.shape[1]
        pages = padded(action.pages, bucket, self.num_pages)
        self.state = self.programs.scatter[bucket](self.state, staging, pages, np.int32(action.slot))

    def _prefill_inputs(self, action: Prefill, payloads: dict[str, Payload]) -> PrefillInputs:
        """Fresh arrays each time: on CPU a dispatched step may still read the host's memory."""
        rows, config = self.plan.config.prefill_rows, self.plan.config
        tokens = _filled(0, action.bucket)
        q_start = _filled(0, rows + 1)
        kv_len = _filled(0, rows)
        page_table = _filled(self.num_pages, rows, config.max_pages)
        slot = _filled(config.max_num_seqs, rows)
        sampling = SamplingInputs(
            temperature=_filled(0.0, rows, dtype=np.float32),
            top_p=_filled(1.0, rows, dtype=np.float32),
            top_k=_filled(0, rows),
            seed=_filled(0, rows, dtype=np.uint32),
        )
        end = 0
        for row, chunk in enumerate(action.chunks):
            payload = payloads[chunk.request_id]
            tokens[end : end + chunk.length] = payload.prompt[chunk.start : chunk.start + chunk.length]
            end += chunk.length
            q_start[row + 1 :] = end
            kv_len[row] = chunk.start + chunk.length
            page_table[row] = self.page_table[chunk.slot]
            if chunk.is_last:
                slot[row] = chunk.slot
                _set_sampling(sampling, row, payload)
        return PrefillInputs(tokens, q_start, kv_len, page_table, slot, sampling)

    def _decode_inputs(self, action: Decode) -> DecodeInputs:
        count, config = len(action.rows), self.plan.config
        slot = _filled(config.max_num_seqs, action.bucket)
        kv_len = _filled(0, action.bucket)
        page_table = _filled(self.num_pages, action.bucket, config.max_pages)
        slot[:count] = [row.slot for row in action.rows]
        kv_len[:count] = [row.kv_len for row in action.rows]
        page_table[:count] = self.page_table[slot[:count]]
        return DecodeInputs(slot, kv_len, page_table)


def _filled(value: float, *shape: int, dtype: DTypeLike = np.int32) -> Any:
    """A host array to be filled in and passed to a step; `Any`, because it goes where device arrays go."""
    return np.full(shape, value, dtype)


def _set_sampling(sampling: Any, row: int, payload: Payload) -> None:
    sampling.temperature[row] = payload.sampling.temperature
    sampling.top_p[row] = payload.sampling.top_p
    sampling.top_k[row] = payload.sampling.top_k
    sampling.seed[row] = payload.seed


class Executor:
    """All meshes of this process."""

    def __init__(
        self, meshes: Sequence[MeshExecutor], post: Callable[[Completion], None], clock: Callable[[], float]
    ) -> None:
        """`post` takes completions from any thread; `clock` gives their times in seconds."""
        self.meshes = list(meshes)
        self.payloads: dict[str, Payload] = {}
        self.handoff_bytes = 0
        self._staged: dict[int, Staging] = {}
        self._post, self._clock = post, clock
        self._step_waiters = [Waiter(f"twinmesh-steps-{index}") for index in range(len(self.meshes))]
        # Per source, because what leaves one source leaves in order; two sources must not wait for each other.
        self._transfer_waiters = {
            index: Waiter(f"twinmesh-transfers-{index}")
            for index, mesh in enumerate(self.meshes)
            if mesh.plan.spec.role is Role.PREFILL
        }

    def perform(self, action: Action) -> None:
        """Dispatch one action; returns without waiting for the device."""
        match action:
            case AssignPages(mesh=mesh, slot=slot, pages=pages):
                self.meshes[mesh].assign(slot, pages)
            case Prefill(chunks=chunks):
                self._report(action, chunks, self.meshes[action.mesh].prefill(action, self.payloads))
            case Decode(rows=rows):
                self._report(action, rows, self.meshes[action.mesh].decode(action))
            case StartTransfer():
                self._start_transfer(action)
            case Scatter(transfer=transfer, destination=destination):
                self.meshes[destination].scatter(action, self._staged.pop(transfer))
            case DropTransfer(transfer=transfer):
                self._staged.pop(transfer, None)
            case Finish(request_id=request_id):
                del self.payloads[request_id]

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
        self, action: Prefill | Decode, rows: tuple[Chunk, ...] | tuple[DecodeRow, ...], tokens: jax.Array
    ) -> None:
        mesh, step = action.mesh, action.step

        def ready(tokens: jax.Array) -> None:
            t = self._clock()
            self._post(StepResult(t, mesh, step, rows, np.asarray(tokens)))

        def failed(error: Exception) -> None:
            self._post(StepFailed(self._clock(), mesh, step, describe(error)))

        self._step_waiters[mesh].watch(tokens, ready, failed)

    def _start_transfer(self, action: StartTransfer) -> None:
        transfer = action.transfer
        staging = send(self.meshes[action.source].gather(action), self.meshes[action.destination].plan.mesh)
        self._staged[transfer] = staging
        self.handoff_bytes += sum(x.nbytes for x in jax.tree.leaves(staging))
        self._transfer_waiters[action.source].watch(
            staging,
            lambda _: self._post(TransferReady(self._clock(), transfer)),
            lambda error: self._post(TransferFailed(self._clock(), transfer, describe(error))),
        )


def describe(error: Exception) -> str:
    """One line: the kind of error and what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
