"""The host arrays that describe a step to the device, in the columns of `step_layout.py`, and the page tables.

Invariant: arrays given to a step are made for it and never written again, because on CPU a dispatched step may still
read the host's memory. Pages of a row are looked up in the host's copy of the page tables, all rows at once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..config import EngineConfig
from ..protocol.actions import AllowTokens, AssignPages, Chunk, DecodeRow
from ..sampling.allow import words_for
from ..sampling.request_rows import scalars_of
from ..sampling.request_state import Float, Int
from .request_records import RequestRecords, tokens_of
from .step_layout import ChunkColumn, DecodeColumn, PrefillInputs, decode_columns, pages_written, prefill_columns


class StepInputs:
    """The page tables of one mesh on the host, and the layout of its steps."""

    def __init__(self, config: EngineConfig, padding: Sequence[int]) -> None:
        """Make empty page tables; `padding` is a page id for each cache group that no request has."""
        self._config = config
        # Wider than a request, so that steps which reach past its end find padding.
        width = config.max_pages + pages_written(config.decode_steps, config.page_size)
        self.tables = [filled(page, config.max_num_seqs, width) for page in padding]

    def assign(self, action: AssignPages) -> None:
        """Set entries of a slot's page table. Steps copy the entries, so steps already dispatched keep theirs."""
        self.tables[action.group][action.slot, action.first : action.first + len(action.pages)] = action.pages

    def tables_of(self, slot: int) -> tuple[np.ndarray, ...]:
        """Copy a slot's page table of each group."""
        return tuple(table[slot, : self._config.max_pages].copy() for table in self.tables)

    def prefill(self, bucket: int, chunks: Sequence[Chunk], records: RequestRecords) -> PrefillInputs:
        """Lay out a prefill step of these chunks, padded to `bucket` tokens."""
        config = self._config
        tokens = filled(0, bucket)
        rows = filled(0, config.prefill_rows, prefill_columns(len(self.tables), config.max_pages))
        rows[:, ChunkColumn.SLOT] = config.max_num_seqs
        floats = filled(0, config.prefill_rows, len(Float), dtype=np.float32)
        end, ints = 0, slice(len(ChunkColumn), len(ChunkColumn) + len(Int))
        for row, chunk in enumerate(chunks):
            record = records[chunk.request_id]
            tokens[end : end + chunk.length] = tokens_of(record, chunk.start, chunk.kv_len)
            end += chunk.length
            rows[row, : len(ChunkColumn)] = chunk.slot, chunk.length, chunk.kv_len, chunk.write_from, chunk.is_last
            if chunk.is_last:
                floats[row], rows[row, ints] = scalars_of(record.plan, len(record.prompt))
        slots = [chunk.slot for chunk in chunks]
        for table, out in zip(self.tables, self._columns(rows, ints.stop), strict=True):
            out[: len(slots)] = table[slots, : config.max_pages]
        return PrefillInputs(tokens, rows, floats)

    def decode(self, bucket: int, steps: int, rows: Sequence[DecodeRow], records: RequestRecords) -> Any:
        """Lay out `steps` decode steps of these rows, padded to `bucket` rows."""
        config, count = self._config, len(rows)
        packed = filled(0, bucket, decode_columns(len(self.tables), steps, config.page_size))
        packed[count:, DecodeColumn.SLOT] = config.max_num_seqs
        packed[:, DecodeColumn.FORCED] = -1
        packed[:count, DecodeColumn.SLOT] = [row.slot for row in rows]
        packed[:count, DecodeColumn.KV_LEN] = [row.kv_len for row in rows]
        for index, row in enumerate(rows):
            if row.is_forced:
                packed[index, DecodeColumn.FORCED] = tokens_of(records[row.request_id], row.kv_len - 1, row.kv_len)[0]
        slot, kv_len = packed[:count, DecodeColumn.SLOT, None], packed[:count, DecodeColumn.KV_LEN, None]
        for table, out in zip(self.tables, self._columns(packed, len(DecodeColumn)), strict=True):
            out[:count] = table[slot, (kv_len - 1) // config.page_size + np.arange(out.shape[1])]
        return packed

    def _columns(self, rows: np.ndarray, first: int) -> list[np.ndarray]:
        """Return each group's columns, as views."""
        width = (rows.shape[1] - first) // len(self.tables)
        return [rows[:, first + i * width : first + (i + 1) * width] for i in range(len(self.tables))]


def later(rows: Sequence[DecodeRow], steps: int) -> Sequence[DecodeRow]:
    """Return the rows of the step so many steps after these: it feeds what was sampled last."""
    if not steps:
        return rows
    return [DecodeRow(row.request_id, row.run, row.slot, row.kv_len + steps) for row in rows]


def last_of(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the chunks that end a prompt: those that sample a token."""
    return [chunk for chunk in chunks if chunk.is_last]


def scored_pieces(chunks: Sequence[Chunk], records: RequestRecords) -> tuple[tuple[int, int, int], ...]:
    """Find a step's tokens that predict prompt tokens to be scored: row, start and stop of each piece."""
    pieces, end = [], 0
    for row, chunk in enumerate(chunks):
        record = records[chunk.request_id]
        count = min(chunk.kv_len, len(record.prompt) - 1) - chunk.start
        if record.plan.prompt_logprobs is not None and not len(record.generated) and count > 0:
            pieces.append((row, end, end + count))
        end += chunk.length
    return tuple(pieces)


def masks_of(
    allowed: AllowTokens, ids: Sequence[int], index: np.ndarray | None, rows: int, vocabulary: int
) -> np.ndarray:
    """Lay out masks [rows, words_for(vocabulary)] int32 for a step whose rows of logits are of these requests, row i at
    `index[i]` (None: at i). Rows without a mask may draw every token."""
    masks: np.ndarray = filled(-1, rows, words_for(vocabulary))
    at = dict(zip(ids, range(len(ids)) if index is None else index.tolist(), strict=True))
    taken = [at[request_id] for request_id in allowed.request_ids]
    width = min(masks.shape[1], allowed.masks.shape[1])
    masks[taken] = 0
    masks[taken, :width] = allowed.masks[:, :width]
    return masks


def filled(value: float, *shape: int, dtype: DTypeLike = np.int32) -> Any:
    """Make a host array to be filled in and passed to a step; `Any`, because it goes where device arrays go."""
    return np.full(shape, value, dtype)
