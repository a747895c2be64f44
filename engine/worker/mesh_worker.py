"""One mesh's part of the executor: its parameters, programs and state, and the dispatch of its steps.

Invariant: the state is donated to each program and replaced by what that returns. `step_inputs.py` lays out what a step
is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..protocol.actions import Chunk, CopyPage, Decode, DecodeRow, Fused, Prefill, Scatter, StartTransfer
from ..protocol.results import HostScores, TokenScores
from ..sampling.request_rows import dense_row, is_dense
from ..sampling.sampler import Sampled
from ..sharding.weights import Params, Placer
from .kv_cache import DeviceState
from .kv_transfer import Staging, padded, staged_pages
from .programs import MeshPlan, Programs
from .request_records import RequestRecords
from .step_inputs import StepInputs, filled, scored_pieces


@dataclass(frozen=True)
class Dispatched:
    """A step under way."""

    sampled: Sampled  # each field [k, n, ...] or [n, ...]
    rows: np.ndarray  # which of the n each row of the action is
    is_scored: bool  # whether a row wants scores
    prompt: TokenScores[jax.Array] | None = None  # of a prefill step's tokens, [T, ...], if a chunk wants them
    pieces: tuple[tuple[int, int, int], ...] = ()  # of such chunks: row, and start and stop among the T

    @property
    def arrays(self) -> tuple[Sampled, TokenScores[jax.Array] | None]:
        """Return the arrays that are still being computed."""
        return self.sampled, self.prompt

    def to_host(self) -> tuple[np.ndarray, HostScores | None, dict[int, HostScores]]:
        """Wait for tokens [k, rows], their scores if a row wants any, and prompt scores by row."""
        scores, pieces = None, {}
        if self.is_scored:
            scores = jax.tree.map(self._of_rows, self.sampled.scores)
        if self.prompt is not None:
            prompt = jax.device_get(self.prompt)
            for row, start, stop in self.pieces:
                pieces[row] = jax.tree.map(lambda x, piece=slice(start, stop): x[piece], prompt)
        return self._of_rows(self.sampled.tokens), scores, pieces

    def _of_rows(self, x: jax.Array) -> np.ndarray:
        host = np.asarray(x)
        return (host if self.sampled.tokens.ndim == 2 else host[None])[:, self.rows]


class MeshWorker:
    """One mesh's parameters, programs, state and page tables."""

    def __init__(self, plan: MeshPlan, programs: Programs, params: Params) -> None:
        """Allocate the KV pools."""
        self.plan, self.programs, self.params = plan, programs, params
        self.placer = Placer(plan.model, plan.dtype, plan.mesh)
        self._padding = [kv.k.shape[1] for kv in plan.state.kv]  # in each group a page id that no request has
        self.inputs = StepInputs(plan.config, self._padding)
        self.state: DeviceState = programs.allocate()

    def reset(self) -> None:
        """Make new pools, since the step that had the old ones donated has failed; let go of the old state first."""
        del self.state
        self.state = self.programs.allocate()

    # ---- actions

    def copy_page(self, action: CopyPage) -> None:
        """Dispatch a copy of one page."""
        kv, program = list(self.state.kv), self.programs.copy_page[action.group]
        kv[action.group] = program(kv[action.group], np.int32(action.source), np.int32(action.destination))
        self.state = self.state._replace(kv=tuple(kv))

    def prefill(self, action: Prefill, records: RequestRecords) -> Dispatched:
        """Dispatch a packed prefill step."""
        self._load_dense(action.chunks, records)
        inputs = self.inputs.prefill(action.bucket, action.chunks, records)
        self.state, sampled, hidden = self.programs.prefill[action.bucket](self.params, self.state, inputs)
        index = np.arange(len(action.chunks))
        return self._dispatched(sampled, index, action.chunks, records, action.chunks, hidden)

    def decode(self, action: Decode, records: RequestRecords) -> Dispatched:
        """Dispatch one or several decode steps."""
        rows = self.inputs.decode(action.bucket, action.steps, action.rows, records)
        self.state, sampled = self.programs.decode[action.bucket, action.steps](self.params, self.state, rows)
        return self._dispatched(sampled, np.arange(len(action.rows)), action.rows, records)

    def fused(self, action: Fused, records: RequestRecords) -> Dispatched:
        """Dispatch a step of prompt chunks and decode rows."""
        config = self.plan.config
        self._load_dense(action.chunks, records)
        inputs = self.inputs.prefill(action.bucket, action.chunks, records)
        rows = self.inputs.decode(config.decode_buckets[-1], 1, action.rows, records)
        self.state, sampled, hidden = self.programs.fused[action.bucket](self.params, self.state, inputs, rows)
        index = np.concatenate([np.arange(len(action.chunks)), config.prefill_rows + np.arange(len(action.rows))])
        return self._dispatched(sampled, index, (*action.chunks, *action.rows), records, action.chunks, hidden)

    def gather(self, action: StartTransfer, destination_tp: int) -> Staging:
        """Copy a request's pages and state out; for an action without a slot, some slot's state, which is dropped."""
        pages, config = self._padded(action.source_pages, action.bucket), self.plan.config
        slot = config.max_num_seqs if action.source_slot is None else action.source_slot
        staging: Staging = self.programs.gather[destination_tp, action.bucket](self.state, pages, np.int32(slot))
        return staging

    def scatter(self, action: Scatter, staging: Staging, source_tp: int, bucket: int) -> None:
        """Copy a request's pages in, and with its state also its page tables."""
        pages, config = self._padded(action.pages, bucket), self.plan.config
        slot = config.max_num_seqs if action.slot is None else action.slot
        tables = self.inputs.tables_of(action.slot or 0)
        self.state = self.programs.scatter[source_tp, bucket](self.state, staging, pages, np.int32(slot), tables)

    # ---- around a step

    def _padded(self, pages: Sequence[tuple[int, ...]], bucket: int) -> tuple[np.ndarray, ...]:
        buckets = staged_pages(self.plan.config, bucket)
        return tuple(map(padded, pages, buckets, self._padding))

    def _load_dense(self, chunks: Sequence[Chunk], records: RequestRecords) -> None:
        """Load a request's dense row before its first sample; it counts all tokens that no step will feed any more."""
        for chunk in chunks:
            record = records[chunk.request_id]
            if chunk.is_last and is_dense(record.plan):
                counted = record.generated[: chunk.kv_len - len(record.prompt)].tolist()
                row = dense_row(record.plan, record.prompt, counted, self.plan.model.vocab_size)
                load: Any = self.programs.load_dense
                self.state = self.state._replace(requests=load(self.state.requests, np.int32(chunk.slot), row))

    def _dispatched(
        self,
        sampled: Sampled,
        index: np.ndarray,
        rows: Sequence[Chunk | DecodeRow],
        records: RequestRecords,
        chunks: Sequence[Chunk] = (),
        hidden: jax.Array | None = None,
    ) -> Dispatched:
        """Describe the step under way, and dispatch the scoring of the chunks' prompt tokens where it is wanted."""
        is_scored = bool(records.scored) and any(row.request_id in records.scored for row in rows)
        pieces = () if hidden is None else scored_pieces(chunks, records)
        if hidden is None or not pieces:
            return Dispatched(sampled, index, is_scored)
        targets = filled(0, hidden.shape[0])
        for row, start, stop in pieces:
            first = chunks[row].start + 1
            targets[start:stop] = records[chunks[row].request_id].prompt[first : first + stop - start]
        prompt = self.programs.score[hidden.shape[0]](self.params, hidden, targets)
        return Dispatched(sampled, index, is_scored, prompt, pieces)
