"""One mesh's part of the executor: its parameters, programs, state and page tables, and what its steps are told.

Invariant: arrays given to a step are made for it and never written again, because on CPU a dispatched step may still
read the host's memory. Pages of a row are looked up in the host's copy of the page tables, all rows at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from ..protocol.actions import AssignPages, Chunk, CopyPage, Decode, DecodeRow, Fused, Prefill, Scatter, StartTransfer
from ..protocol.results import TokenScores
from ..protocol.submission import Payload, Payloads
from ..sampling.request_rows import dense_row, is_dense, scalars_of
from ..sampling.request_state import Float, Int
from ..sampling.sampler import Sampled
from ..sharding.weights import Params, Placer
from .kv_cache import DeviceState
from .kv_transfer import Staging, padded, staged_pages
from .programs import MeshPlan, Programs
from .step_layout import ChunkColumn, DecodeColumn, PrefillInputs, decode_columns, pages_written, prefill_columns


@dataclass(frozen=True)
class Dispatched:
    """A step under way.

    `sampled`: each field [k, n, ...] or [n, ...]; `rows`: which of the n each row of the action is. `is_scored`:
    whether a row wants scores. `prompt`: scores of a prefill step's tokens, [T, ...], if a chunk wants them; `pieces`:
    of each chunk that does its row, and where its tokens start and stop among the T.
    """

    sampled: Sampled
    rows: np.ndarray
    is_scored: bool
    prompt: TokenScores | None = None
    pieces: tuple[tuple[int, int, int], ...] = ()

    @property
    def arrays(self) -> tuple[Sampled, TokenScores | None]:
        """What is still being computed."""
        return self.sampled, self.prompt

    def to_host(self) -> tuple[np.ndarray, TokenScores | None, dict[int, TokenScores]]:
        """Tokens [k, rows], their scores if a row wants any, and prompt scores by row; waits for them."""
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


class MeshExecutor:
    """One mesh's parameters, programs, state and page tables."""

    def __init__(self, plan: MeshPlan, programs: Programs, params: Params) -> None:
        """Allocates the KV pools."""
        self.plan, self.programs, self.params = plan, programs, params
        self.placer = Placer(plan.model, plan.dtype, plan.mesh)
        config = plan.config
        self._padding = [kv.k.shape[1] for kv in plan.state.kv]  # a page id that is nobody's, per group
        # Wider than a request, so that steps which reach past its end find padding.
        width = config.max_pages + pages_written(config.decode_steps, config.page_size)
        self._tables = [_filled(padding, config.max_num_seqs, width) for padding in self._padding]
        self.state: DeviceState = programs.allocate()

    def reset(self) -> None:
        """New pools, since the old ones were lost with the step that had them donated; first let go of what is left."""
        del self.state
        self.state = self.programs.allocate()

    # ---- actions

    def assign(self, action: AssignPages) -> None:
        """Set entries of a slot's page table. Steps copy them, so those already dispatched keep theirs."""
        self._tables[action.group][action.slot, action.first : action.first + len(action.pages)] = action.pages

    def copy_page(self, action: CopyPage) -> None:
        """Dispatch a copy of one page."""
        kv, program = list(self.state.kv), self.programs.copy_page[action.group]
        kv[action.group] = program(kv[action.group], np.int32(action.source), np.int32(action.destination))
        self.state = self.state._replace(kv=tuple(kv))

    def prefill(self, action: Prefill, payloads: Payloads) -> Dispatched:
        """Dispatch a packed prefill step."""
        self._load_dense(action.chunks, payloads)
        inputs = self._prefill_inputs(action.bucket, action.chunks, payloads)
        self.state, sampled, hidden = self.programs.prefill[action.bucket](self.params, self.state, inputs)
        index = np.arange(len(action.chunks))
        return self._dispatched(sampled, index, action.chunks, payloads, action.chunks, hidden)

    def decode(self, action: Decode, payloads: Payloads) -> Dispatched:
        """Dispatch one or several decode steps."""
        rows = self._decode_rows(action.bucket, action.steps, action.rows, payloads)
        self.state, sampled = self.programs.decode[action.bucket, action.steps](self.params, self.state, rows)
        return self._dispatched(sampled, np.arange(len(action.rows)), action.rows, payloads)

    def fused(self, action: Fused, payloads: Payloads) -> Dispatched:
        """Dispatch a step of prompt chunks and decode rows."""
        config = self.plan.config
        self._load_dense(action.chunks, payloads)
        inputs = self._prefill_inputs(action.bucket, action.chunks, payloads)
        rows = self._decode_rows(config.decode_buckets[-1], 1, action.rows, payloads)
        self.state, sampled, hidden = self.programs.fused[action.bucket](self.params, self.state, inputs, rows)
        index = np.concatenate([np.arange(len(action.chunks)), config.prefill_rows + np.arange(len(action.rows))])
        return self._dispatched(sampled, index, (*action.chunks, *action.rows), payloads, action.chunks, hidden)

    def gather(self, action: StartTransfer, destination_tp: int) -> Staging:
        """Copy a request out; without its state that of some slot goes along, to be dropped."""
        pages, config = self._padded(action.source_pages, action.bucket), self.plan.config
        slot = config.max_num_seqs if action.source_slot is None else action.source_slot
        staging: Staging = self.programs.gather[destination_tp, action.bucket](self.state, pages, np.int32(slot))
        return staging

    def scatter(self, action: Scatter, staging: Staging, source_tp: int, bucket: int) -> None:
        """Copy a request in, its page tables with its state."""
        pages, config = self._padded(action.pages, bucket), self.plan.config
        slot = config.max_num_seqs if action.slot is None else action.slot
        tables = tuple(table[action.slot or 0, : config.max_pages].copy() for table in self._tables)
        self.state = self.programs.scatter[source_tp, bucket](self.state, staging, pages, np.int32(slot), tables)

    # ---- what steps are told

    def _padded(self, pages: Sequence[tuple[int, ...]], bucket: int) -> tuple[np.ndarray, ...]:
        buckets = staged_pages(self.plan.config, bucket)
        return tuple(map(padded, pages, buckets, self._padding))

    def _load_dense(self, chunks: Sequence[Chunk], payloads: Payloads) -> None:
        """Before a request's first sample: its dense row, in which all tokens count that no step will feed any more."""
        for chunk in chunks:
            payload = payloads[chunk.request_id]
            if chunk.is_last and is_dense(payload.plan):
                counted = payload.outputs[: chunk.kv_len - len(payload.prompt)]
                row = dense_row(payload.plan, payload.prompt, counted, self.plan.model.vocab_size)
                load: Any = self.programs.load_dense
                self.state = self.state._replace(requests=load(self.state.requests, np.int32(chunk.slot), row))

    def _prefill_inputs(self, bucket: int, chunks: Sequence[Chunk], payloads: Payloads) -> PrefillInputs:
        config = self.plan.config
        tokens = _filled(0, bucket)
        rows = _filled(0, config.prefill_rows, prefill_columns(len(self._tables), config.max_pages))
        rows[:, ChunkColumn.SLOT] = config.max_num_seqs
        floats = _filled(0, config.prefill_rows, len(Float), dtype=np.float32)
        end, ints = 0, slice(len(ChunkColumn), len(ChunkColumn) + len(Int))
        for row, chunk in enumerate(chunks):
            payload = payloads[chunk.request_id]
            tokens[end : end + chunk.length] = _tokens(payload, chunk.start, chunk.kv_len)
            end += chunk.length
            rows[row, : len(ChunkColumn)] = chunk.slot, chunk.length, chunk.kv_len, chunk.write_from, chunk.is_last
            if chunk.is_last:
                floats[row], rows[row, ints] = scalars_of(payload.plan, len(payload.prompt))
        slots = [chunk.slot for chunk in chunks]
        for table, out in zip(self._tables, self._columns(rows, ints.stop), strict=True):
            out[: len(slots)] = table[slots, : config.max_pages]
        return PrefillInputs(tokens, rows, floats)

    def _decode_rows(self, bucket: int, steps: int, rows: Sequence[DecodeRow], payloads: Payloads) -> Any:
        config, count = self.plan.config, len(rows)
        packed = _filled(0, bucket, decode_columns(len(self._tables), steps, config.page_size))
        packed[count:, DecodeColumn.SLOT] = config.max_num_seqs
        packed[:, DecodeColumn.FORCED] = -1
        _, _, slots, lengths, are_forced = zip(*rows, strict=True)
        packed[:count, DecodeColumn.SLOT], packed[:count, DecodeColumn.KV_LEN] = slots, lengths
        if any(are_forced):
            self._force(packed, rows, payloads)
        slot, kv_len = packed[:count, DecodeColumn.SLOT, None], packed[:count, DecodeColumn.KV_LEN, None]
        for table, out in zip(self._tables, self._columns(packed, len(DecodeColumn)), strict=True):
            out[:count] = table[slot, (kv_len - 1) // config.page_size + np.arange(out.shape[1])]
        return packed

    def _force(self, packed: np.ndarray, rows: Sequence[DecodeRow], payloads: Payloads) -> None:
        for index, row in enumerate(rows):
            if row.is_forced:
                packed[index, DecodeColumn.FORCED] = _tokens(payloads[row.request_id], row.kv_len - 1, row.kv_len)[0]

    def _columns(self, rows: np.ndarray, first: int) -> list[np.ndarray]:
        """Each group's columns, as views."""
        width = (rows.shape[1] - first) // len(self._tables)
        return [rows[:, first + i * width : first + (i + 1) * width] for i in range(len(self._tables))]

    def _dispatched(
        self,
        sampled: Sampled,
        index: np.ndarray,
        rows: Sequence[Chunk | DecodeRow],
        payloads: Payloads,
        chunks: Sequence[Chunk] = (),
        hidden: jax.Array | None = None,
    ) -> Dispatched:
        """Also dispatches the scoring of the chunks' prompt tokens where it is wanted."""
        is_scored = bool(payloads.scored) and any(row.request_id in payloads.scored for row in rows)
        pieces = () if hidden is None else _pieces(chunks, payloads)
        if hidden is None or not pieces:
            return Dispatched(sampled, index, is_scored)
        targets = _filled(0, hidden.shape[0])
        for row, start, stop in pieces:
            first = chunks[row].start + 1
            targets[start:stop] = payloads[chunks[row].request_id].prompt[first : first + stop - start]
        prompt = self.programs.score[hidden.shape[0]](self.params, hidden, targets)
        return Dispatched(sampled, index, is_scored, prompt, pieces)


def _pieces(chunks: Sequence[Chunk], payloads: Payloads) -> tuple[tuple[int, int, int], ...]:
    """Row, start and stop, among the step's tokens, of what predicts prompt tokens whose scores are wanted."""
    pieces, end = [], 0
    for row, chunk in enumerate(chunks):
        payload = payloads[chunk.request_id]
        count = min(chunk.kv_len, len(payload.prompt) - 1) - chunk.start
        if payload.plan.prompt_logprobs is not None and not payload.outputs and count > 0:
            pieces.append((row, end, end + count))
        end += chunk.length
    return tuple(pieces)


def _tokens(payload: Payload, start: int, stop: int) -> np.ndarray | list[int]:
    """Tokens `start` to `stop` - 1 of a request: its prompt, then what it has generated."""
    length = len(payload.prompt)
    if stop <= length:
        return payload.prompt[start:stop]
    generated = payload.outputs[max(0, start - length) : stop - length]
    return [*payload.prompt[start:].tolist(), *generated]


def _filled(value: float, *shape: int, dtype: DTypeLike = np.int32) -> Any:
    """A host array to be filled in and passed to a step; `Any`, because it goes where device arrays go."""
    return np.full(shape, value, dtype)
