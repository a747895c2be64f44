"""One mesh's part of the executor: its parameters, programs and state, and the dispatch of its steps.

Invariant: the state is donated to each program and replaced by what that returns. `step_inputs.py` lays out what a step
is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..protocol.actions import AllowTokens, Chunk, CopyPage, Decode, DecodeRow, Fused, Prefill, Scatter, StartTransfer
from ..protocol.results import HostScores, TokenScores
from ..sampling.request_rows import Stage, dense_row
from ..sampling.request_state import DenseRows
from ..sharding.weights import Params, Placer
from .kv_cache import DeviceState, KVCache, with_scales
from .kv_transfer import Staging, padded, staged_pages
from .mesh_plan import MeshPlan
from .programs import Programs
from .request_records import RequestRecords, tokens_of
from .step_inputs import StepInputs, filled, last_of, later, masks_of, scored_pieces
from .steps import Passed


@dataclass(frozen=True)
class Dispatched:
    """A step under way, of one or several passes; what the host will read of it is on its way there already."""

    tokens: tuple[jax.Array, ...]  # of each pass [n], or of all of them [k, n]
    rows: np.ndarray  # which of the n each row of the action is
    scores: tuple[TokenScores[jax.Array], ...] = ()  # of each pass's tokens, [n, ...], if a row wants them
    prompt: TokenScores[jax.Array] | None = None  # of a prefill step's tokens, [T, ...], if a chunk wants them
    pieces: tuple[tuple[int, int, int], ...] = ()  # of such chunks: row, and start and stop among the T

    def __post_init__(self) -> None:
        """Start to copy to the host."""
        for array in jax.tree.leaves(self.arrays):
            array.copy_to_host_async()

    @property
    def arrays(self) -> Any:
        """The arrays that the host will read, and nothing else."""
        return self.tokens, self.scores, self.prompt

    def to_host(self) -> tuple[np.ndarray, HostScores | None, dict[int, HostScores]]:
        """Wait for tokens [k, rows], their scores if a row wants any, and prompt scores by row."""
        scores, pieces = None, {}
        if self.scores:
            scores = jax.tree.map(lambda *x: self._of_rows(x), *self.scores)
        if self.prompt is not None:
            prompt = jax.device_get(self.prompt)
            for row, start, stop in self.pieces:
                pieces[row] = jax.tree.map(lambda x, piece=slice(start, stop): x[piece], prompt)
        return self._of_rows(self.tokens, is_stacked=self.tokens[0].ndim == 2), scores, pieces

    def _of_rows(self, passes: Sequence[jax.Array], *, is_stacked: bool = False) -> np.ndarray:
        host = np.asarray(passes[0]) if is_stacked else np.stack([np.asarray(x) for x in passes])
        return host[:, self.rows]


class MeshWorker:
    """One mesh's parameters, programs, state and page tables."""

    def __init__(self, plan: MeshPlan, programs: Programs, params: Params) -> None:
        """Allocate the KV pools."""
        self.plan, self.programs, self.params = plan, programs, params
        self.placer = Placer(plan.model, plan.dtype, plan.mesh, plan.params.formats)
        self._padding = [kv.num_pages for kv in plan.state.kv]  # in each group a page id that no request has
        self.inputs = StepInputs(plan.config, self._padding)
        self._sent_scales: tuple[KVCache, ...] | None = None  # of channels, where it converts what it sends
        self._allocate()

    def reset(self) -> None:
        """Make new pools, as the old ones were lost with the step that had them donated; let go of the rest first."""
        del self.state, self.dense
        self._allocate()

    def _allocate(self) -> None:
        self.state: DeviceState
        self.dense: DenseRows
        allocate: Any = self.programs.allocate
        self.state, self.dense = allocate()
        self._compute_scales()
        self._dense_of: dict[int, tuple[int, int]] = {}  # by slot, the request and run whose dense row is loaded
        self._allowed: AllowTokens | None = None  # of a step that comes next

    def replace(self, params: Params) -> None:
        """Use other parameters from here on; no page of KV may be in use."""
        self.params = params
        self._compute_scales()

    def _compute_scales(self) -> None:
        """Compute what 8-bit pages have for as long as the parameters stay."""
        if not self.plan.has_scales:
            return
        program: Any = self.programs.scales
        own, self._sent_scales = program(self.params)
        self.state = self.state._replace(kv=with_scales(self.state.kv, own))

    # ---- actions

    def allow(self, action: AllowTokens) -> None:
        """Keep the masks for the step that comes next."""
        self._allowed = action

    def copy_page(self, action: CopyPage) -> None:
        """Dispatch a copy of one page."""
        kv, program = list(self.state.kv), self.programs.copy_page[action.group]
        kv[action.group] = program(kv[action.group], np.int32(action.source), np.int32(action.destination))
        self.state = self.state._replace(kv=tuple(kv))

    def prefill(self, action: Prefill, records: RequestRecords) -> Dispatched:
        """Dispatch a packed prefill step."""
        bucket = self.programs.size_for("prefill", action.bucket)
        inputs = self.inputs.prefill(bucket, action.chunks, records)
        self.state, passed, hidden = self.programs.prefill[bucket](self.params, self.state, inputs)
        rows, masks = np.arange(len(action.chunks)), self._masks(action.step, passed, action.chunks)
        tokens, scores = self._sample(passed, last_of(action.chunks), records, masks)
        return Dispatched((tokens,), rows, scores, *self._score_prompts(hidden, action.chunks, records))

    def decode(self, action: Decode, records: RequestRecords) -> Dispatched:
        """Dispatch one or several decode steps."""
        index, bucket = np.arange(len(action.rows)), self.programs.size_for("decode", action.bucket)
        if action.steps > 1 and self._allowed is not None and self._allowed.step == action.step:
            raise ValueError(f"step {action.step} has masks, which are of one step, and {action.steps} steps.")
        if action.steps > 1 and not records.stages([row.request_id for row in action.rows]):
            rows = self.inputs.decode(bucket, action.steps, action.rows, records)
            program = self.programs.decode_steps[bucket, action.steps]
            self.state, tokens = program(self.params, self.state, rows)
            return Dispatched((tokens,), index)
        passes = [self._decode(action.step, bucket, later(action.rows, k), records) for k in range(action.steps)]
        return Dispatched(tuple(tokens for tokens, _ in passes), index, sum((scores for _, scores in passes), ()))

    def fused(self, action: Fused, records: RequestRecords) -> Dispatched:
        """Dispatch a step of prompt chunks and decode rows."""
        config, bucket = self.plan.config, self.programs.size_for("prefill", action.bucket)
        inputs = self.inputs.prefill(bucket, action.chunks, records)
        rows = self.inputs.decode(config.decode_buckets[-1], 1, action.rows, records)
        self.state, passed, hidden = self.programs.fused[bucket](self.params, self.state, inputs, rows)
        index = np.concatenate([np.arange(len(action.chunks)), config.prefill_rows + np.arange(len(action.rows))])
        masks = self._masks(action.step, passed, (*action.chunks, *action.rows), index)
        tokens, scores = self._sample(passed, (*last_of(action.chunks), *action.rows), records, masks)
        return Dispatched((tokens,), index, scores, *self._score_prompts(hidden, action.chunks, records))

    def gather(self, action: StartTransfer, destination_tp: int) -> Staging:
        """Copy a request's pages and state out; for an action without a slot, some slot's state, which is dropped."""
        pages, config = self._padded(action.source_pages, action.bucket), self.plan.config
        slot = config.max_num_seqs if action.source_slot is None else action.source_slot
        program = self.programs.gather[destination_tp, action.bucket]
        staging: Staging = program(self.state, pages, np.int32(slot), self._sent_scales)
        return staging

    def scatter(self, action: Scatter, staging: Staging, source_tp: int, bucket: int) -> None:
        """Copy a request's pages in, and with its state also its page tables."""
        pages, config = self._padded(action.pages, bucket), self.plan.config
        slot = config.max_num_seqs if action.slot is None else action.slot
        self._dense_of.pop(slot, None)
        tables = self.inputs.tables_of(action.slot or 0)
        self.state = self.programs.scatter[source_tp, bucket](self.state, staging, pages, np.int32(slot), tables)

    # ---- around a step

    def _padded(self, pages: Sequence[tuple[int, ...]], bucket: int) -> tuple[np.ndarray, ...]:
        buckets = staged_pages(self.plan.config, bucket)
        return tuple(map(padded, pages, buckets, self._padding))

    def _decode(
        self, step: int, bucket: int, rows: Sequence[DecodeRow], records: RequestRecords
    ) -> tuple[jax.Array, tuple[TokenScores[jax.Array], ...]]:
        """Dispatch one decode step; return its tokens, and their scores if a row wants them."""
        inputs = self.inputs.decode(bucket, 1, rows, records)
        self.state, passed = self.programs.decode[bucket](self.params, self.state, inputs)
        return self._sample(passed, rows, records, self._masks(step, passed, rows))

    def _masks(
        self, step: int, passed: Passed, rows: Sequence[Chunk | DecodeRow], index: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Take the masks that came for this step; None: none did."""
        allowed, self._allowed = self._allowed, None
        if allowed is None or allowed.step != step:
            return None
        return masks_of(allowed, [row.request_id for row in rows], index, *passed.logits.shape)

    def _sample(
        self,
        passed: Passed,
        rows: Sequence[Chunk | DecodeRow],
        records: RequestRecords,
        masks: np.ndarray | None,
    ) -> tuple[jax.Array, tuple[TokenScores[jax.Array], ...]]:
        """Dispatch the stages of sampling that one of the rows, which all sample, needs: tokens [n] of all that passed,
        and their scores if a row wants them."""
        stages = records.stages([row.request_id for row in rows])
        tokens, logits, scores = passed.tokens, passed.logits, ()
        if masks is not None:
            allow: Any = self.programs.allow[logits.shape[0]]
            scalars, logits, tokens = allow(self.state.scalars, passed.rows, masks, logits)
            self.state = self.state._replace(scalars=scalars)
        if not stages:
            return tokens, scores
        run: dict[Stage, Any] = {stage: self.programs.sample[stage, logits.shape[0]] for stage in stages}
        if Stage.ADJUST in run:
            self._load_dense(rows, records)
            self.dense, logits = run[Stage.ADJUST](self.dense, self.state.scalars, passed.rows, logits)
        for stage in (Stage.TOP_K, Stage.TOP_P):
            if stage in run:
                logits = run[stage](self.state.scalars, passed.rows, logits)
        if Stage.DRAW in run:
            scalars, tokens = run[Stage.DRAW](self.state.scalars, passed.rows, logits)
            self.state = self.state._replace(scalars=scalars)
        return tokens, (run[Stage.SCORE](passed.logits, tokens),) if Stage.SCORE in run else ()

    def _load_dense(self, rows: Sequence[Chunk | DecodeRow], records: RequestRecords) -> None:
        """Load the dense rows of requests that have come to their slots since they were last loaded. They count all
        tokens but the one that a decode row feeds, which `adjust` counts."""
        for row in rows:
            if not records.is_dense(row.request_id) or self._dense_of.get(row.slot) == (row.request_id, row.run):
                continue
            record, fed = records[row.request_id], int(isinstance(row, DecodeRow))
            counted = tokens_of(record, len(record.prompt), row.kv_len - fed)
            loaded = dense_row(record.plan, record.prompt, counted.tolist(), self.plan.model.vocab_size)
            load: Any = self.programs.load_dense
            self.dense = load(self.dense, np.int32(row.slot), loaded)
            self._dense_of[row.slot] = row.request_id, row.run

    def _score_prompts(
        self, hidden: jax.Array, chunks: Sequence[Chunk], records: RequestRecords
    ) -> tuple[TokenScores[jax.Array] | None, tuple[tuple[int, int, int], ...]]:
        """Dispatch the scoring of the chunks' prompt tokens where it is wanted: scores [T, ...], and of which rows."""
        pieces = scored_pieces(chunks, records)
        if not pieces:
            return None, ()
        targets = filled(0, hidden.shape[0])
        for row, start, stop in pieces:
            first = chunks[row].start + 1
            targets[start:stop] = records[chunks[row].request_id].prompt[first : first + stop - start]
        return self.programs.score[hidden.shape[0]](self.params, hidden, targets), pieces
