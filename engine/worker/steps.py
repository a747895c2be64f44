"""The step functions: model, paged attention and the most likely tokens, in one dispatch each.

These are pure functions of arrays, compiled once per (mesh, bucket) with the state donated. A step takes the most
likely token after each row itself; where a row wants anything else, the stages of sampling go on from the logits that
the step returns (`sampling/sampler.py`). So there is one forward pass for all kinds of sampling, and its logits are the
same to the last bit whatever follows.

A decode step feeds itself: the token sampled last is in the state, so the host need not read it first. The host passes
few and small arrays: each costs it time on every device. Page tables are in the state; a decode step is sent only the
pages that it writes to, and they must be allocated for all its rows and steps.

Shapes: T packed tokens, R prefill rows, B decode rows, M pages per table, G cache groups, S slots. Padding: page id
`num_pages` of its group, slot S, kv_len 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...kernels_pallas.scatter import write_rows
from ...models.decoder import Decoder
from ..sampling.request_state import DrawColumn, Int, Scalars
from ..sampling.sampler import greedy, store
from ..sharding.mesh import replicate_logits
from .kv_cache import DeviceState
from .paged_attention import DecodeRows, PagedAttention, PrefillRows, StepRows
from .step_layout import ChunkColumn, DecodeColumn, PrefillInputs


class Passed(NamedTuple):
    """What a forward pass gives for the R rows after which a token may be sampled."""

    tokens: jax.Array  # [R] int32, the most likely ones, which are stored in the rows' slots
    logits: jax.Array  # [R, V] float32
    rows: jax.Array  # [R, len(DrawColumn)] int32


def prefill_step(
    decoder: Decoder, mesh: Mesh, state: DeviceState, inputs: PrefillInputs
) -> tuple[DeviceState, Passed, jax.Array]:
    """Append each chunk's KV, attend to prefix and chunk, and look at each row's last token.

    Returns the new state, what there is to sample from [R] (valid only for rows whose chunk is the prompt's last), and
    the hidden states [T, E].
    """
    state, chunks = _unpack_chunks(state, inputs)
    state, hidden = _forward(decoder, mesh, state, [chunks.part], prefill=chunks.rows)
    state, passed = _pass(decoder, mesh, state, hidden[chunks.last], chunks.draw)
    return state, passed, hidden


def decode_step(decoder: Decoder, mesh: Mesh, state: DeviceState, rows: jax.Array) -> tuple[DeviceState, Passed]:
    """Feed each row a token, append its KV and attend.

    `rows` [B, decode_columns()] int32. Returns the new state, and what there is to sample from [B].
    """
    state, slot, kv_len, forced = _unpack_decode(state, rows)
    return _decode(decoder, mesh, state, _feed(state, slot, kv_len, forced))


def decode_steps(
    decoder: Decoder, mesh: Mesh, state: DeviceState, rows: jax.Array, steps: int
) -> tuple[DeviceState, jax.Array]:
    """Repeat `steps` times: feed each row a token, append its KV, attend, and take the most likely next token.

    `rows` [B, decode_columns()] int32 describe the first step. Returns the new state and the tokens [steps, B].
    """
    state, slot, kv_len, forced = _unpack_decode(state, rows)

    def step(state: DeviceState, index: jax.Array) -> tuple[DeviceState, jax.Array]:
        grown = jnp.where(kv_len > 0, kv_len + index, 0)  # padding stays padding
        state, passed = _decode(decoder, mesh, state, _feed(state, slot, grown, jnp.where(index == 0, forced, -1)))
        return state, passed.tokens

    return jax.lax.scan(step, state, jnp.arange(steps, dtype=jnp.int32))


def fused_step(
    decoder: Decoder, mesh: Mesh, state: DeviceState, inputs: PrefillInputs, rows: jax.Array
) -> tuple[DeviceState, Passed, jax.Array]:
    """Run a decode step of `rows` and a prefill step of `inputs`, of different requests, in one pass over the weights.

    Returns the new state, what there is to sample from [R + B], prefill rows first, and the prefill's hidden states
    [T, E].
    """
    state, chunks = _unpack_chunks(state, inputs)
    state, slot, kv_len, forced = _unpack_decode(state, rows)
    feeding = _feed(state, slot, kv_len, forced)
    parts = [feeding.part, chunks.part]
    state, hidden = _forward(decoder, mesh, state, parts, decode=feeding.rows, prefill=chunks.rows)
    decoded, prefilled = jnp.split(hidden, [rows.shape[0]])
    draw = jnp.concatenate([chunks.draw, feeding.draw])
    state, passed = _pass(decoder, mesh, state, jnp.concatenate([prefilled[chunks.last], decoded]), draw)
    return state, passed, prefilled


class _Part(NamedTuple):
    """Tokens that take part in a forward pass: those of the decode rows, or those of the prefill chunks."""

    tokens: jax.Array  # [T], ids
    positions: jax.Array  # [T], in their own sequences
    kv_slots: tuple[jax.Array, ...]  # per group [T], where their KV is written
    is_token: jax.Array  # [T] bool; False: padding


class _Chunks(NamedTuple):
    """A prefill step's inputs, unpacked."""

    part: _Part
    rows: PrefillRows
    last: jax.Array  # [R], index of each row's last token among the T tokens
    draw: jax.Array  # [R, len(DrawColumn)]


class _Feeding(NamedTuple):
    """A decode step's inputs, unpacked."""

    part: _Part
    rows: DecodeRows
    draw: jax.Array  # [B, len(DrawColumn)]


def _forward(
    decoder: Decoder,
    mesh: Mesh,
    state: DeviceState,
    parts: list[_Part],
    *,
    decode: DecodeRows | None = None,
    prefill: PrefillRows | None = None,
) -> tuple[DeviceState, jax.Array]:
    """Run the model on all parts: the state with their KV appended, and their hidden states [T, E] in order."""
    all_: _Part = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    attend, rows = PagedAttention(mesh, decoder.config), StepRows(all_.kv_slots, decode, prefill)
    hidden, kv = decoder.hidden(all_.tokens, all_.positions, attend, state.kv, rows, all_.is_token)
    return state._replace(kv=kv), hidden


def _decode(decoder: Decoder, mesh: Mesh, state: DeviceState, feeding: _Feeding) -> tuple[DeviceState, Passed]:
    state, hidden = _forward(decoder, mesh, state, [feeding.part], decode=feeding.rows)
    return _pass(decoder, mesh, state, hidden, feeding.draw)


def _pass(
    decoder: Decoder, mesh: Mesh, state: DeviceState, hidden: jax.Array, rows: jax.Array
) -> tuple[DeviceState, Passed]:
    """Take the most likely tokens after hidden states [R, E], and store them in their slots."""
    logits = replicate_logits(decoder.logits(hidden), mesh)
    tokens = greedy(logits)
    scalars = store(state.scalars, rows[:, DrawColumn.SLOT], tokens)
    return state._replace(scalars=scalars), Passed(tokens, logits, rows)


def _unpack_chunks(state: DeviceState, inputs: PrefillInputs) -> tuple[DeviceState, _Chunks]:
    """Unpack a prefill step's inputs; write every row's page tables, and the scalars of rows that sample, into the
    state."""
    columns, ints, *tables = _split(
        inputs.rows, [len(ChunkColumn), len(Int), *(table.shape[1] for table in state.tables)]
    )
    slot, length, kv_len, write_from, is_last = columns.T
    slots = state.tables[0].shape[0]
    used = jnp.where(kv_len > 0, slot, slots)
    stored = [write_rows(table, used, rows) for table, rows in zip(state.tables, tables, strict=True)]
    q_start = jnp.pad(jnp.cumsum(length, dtype=jnp.int32), (1, 0))
    index = jnp.arange(inputs.tokens.shape[0], dtype=jnp.int32)
    # Without a loop, which the default way to search has.
    row = jnp.searchsorted(q_start, index, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row - 1, slot.shape[0] - 1)
    is_token = index < q_start[-1]
    positions = jnp.where(is_token, kv_len[row] - (q_start[row + 1] - index), 0)
    written = is_token & (positions >= write_from[row])
    kv_slots = _kv_slots(state, [table[row] for table in tables], positions, written)
    part = _Part(inputs.tokens, positions, kv_slots, is_token)
    sampled = jnp.where(is_last > 0, slot, slots)
    scalars = Scalars(
        *(write_rows(x, sampled, new) for x, new in zip(state.scalars, (inputs.floats, ints), strict=True))
    )
    state = state._replace(tables=tuple(stored), scalars=scalars)
    draw = jnp.stack([sampled, kv_len, jnp.full_like(slot, -1)], axis=1)
    return state, _Chunks(part, PrefillRows(tuple(tables), kv_len, q_start), jnp.maximum(q_start[1:] - 1, 0), draw)


def _unpack_decode(state: DeviceState, rows: jax.Array) -> tuple[DeviceState, jax.Array, jax.Array, jax.Array]:
    """Write the pages that the rows name into the state's tables; return slot, kv_len and forced token, [B] each."""
    width = (rows.shape[1] - len(DecodeColumn)) // len(state.tables)
    columns, *pages = _split(rows, [len(DecodeColumn), *(width for _ in state.tables)])
    slot, kv_len, forced = columns.T
    page_size = state.kv[0].k.shape[2]
    at = (jnp.maximum(kv_len - 1, 0) // page_size)[:, None] + jnp.arange(width, dtype=jnp.int32)  # [B, width]
    index = jnp.repeat(slot, width), at.reshape(-1)
    tables = tuple(write_rows(table, index, new.reshape(-1)) for table, new in zip(state.tables, pages, strict=True))
    return state._replace(tables=tables), slot, kv_len, forced


def _feed(state: DeviceState, slot: jax.Array, kv_len: jax.Array, forced: jax.Array) -> _Feeding:
    """Feed rows [B] the forced token where it is not negative, else the token sampled last."""
    # A row past the end of its page table is padding: it writes and reads nothing.
    capacity = state.tables[0].shape[1] * state.kv[0].k.shape[2]
    is_used = (kv_len > 0) & (kv_len <= capacity)
    kv_len = jnp.where(is_used, kv_len, 0)
    slot = jnp.where(is_used, slot, state.tables[0].shape[0])
    tables = tuple(x.at[slot].get(mode="clip") for x in state.tables)
    last = state.scalars.ints.at[slot, int(Int.LAST_TOKEN)].get(mode="clip")
    tokens = jnp.where(is_used, jnp.where(forced >= 0, forced, last), 0)
    positions = jnp.maximum(kv_len - 1, 0)
    return _Feeding(
        _Part(tokens, positions, _kv_slots(state, tables, positions, is_used), is_used),
        DecodeRows(tables, kv_len),
        jnp.stack([slot, kv_len, tokens], axis=1),
    )


def _kv_slots(
    state: DeviceState, tables: list[jax.Array] | tuple[jax.Array, ...], positions: jax.Array, written: jax.Array
) -> tuple[jax.Array, ...]:
    """Find where each token's KV is written, per group [T]: page * page_size + offset, past the pool for nowhere.

    `tables` are each token's page tables, one [T, M] per group; `written` [T] says which tokens are written.
    """

    def one(pool: jax.Array, table: jax.Array) -> jax.Array:
        layers, pages, page_size, *_ = pool.shape
        page = jnp.take_along_axis(table, (positions // page_size)[:, None], axis=1)[:, 0]
        # Past the pool of all layers: the slot after a layer's last is the next layer's first.
        is_own = written & (page < pages)
        return jnp.where(is_own, page * page_size + positions % page_size, layers * pages * page_size)

    return tuple(one(kv.k, table) for kv, table in zip(state.kv, tables, strict=True))


def _split(rows: jax.Array, widths: list[int]) -> list[jax.Array]:
    """Split columns [R, C] into parts of these widths."""
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    return jnp.split(rows, ends, axis=1)
