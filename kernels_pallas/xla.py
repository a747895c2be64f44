"""Page-blocked online softmax in XLA: CPU, and GPUs without Mosaic kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

_BLOCK_TOKENS = 256
_TILE = 64


class _State(NamedTuple):
    peak: Array  # [B, Hk, M], the largest score so far
    total: Array  # [B, Hk, M], sum of exp(score - peak)
    out: Array  # [B, Hk, M, D], sum of exp(score - peak) * v


def append_kv(k_pages: Array, v_pages: Array, k: Array, v: Array, slot: Array) -> tuple[Array, Array]:
    def write(pages: Array, new: Array) -> Array:
        flat = pages.reshape(-1, *pages.shape[2:])
        return flat.at[slot].set(new, mode="drop", unique_indices=True).reshape(pages.shape)

    with jax.named_scope("append_kv"):
        return write(k_pages, k), write(v_pages, v)


def paged_decode_attention(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, kv_len: Array, *,
    scale: float, window: int | None, softcap: float | None, sink: Array | None,
) -> Array:
    rows, query_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    pages = _pages_per_block(k_pages.shape[1], page_table.shape[1])
    span = pages * k_pages.shape[1]
    packed = (q.astype(jnp.float32) * scale).reshape(rows, kv_heads, -1, head_dim)
    position = kv_len - 1
    first = jnp.zeros_like(kv_len) if window is None else jnp.maximum(kv_len - window, 0)
    # an empty slot must not pull the start to 0
    start = jnp.min(jnp.where(kv_len > 0, first, jnp.iinfo(jnp.int32).max)) // span
    stop = (jnp.max(kv_len) + span - 1) // span

    def body(block, state):
        k, v = _load(k_pages, v_pages, page_table, block, pages)
        at = block * span + jnp.arange(span, dtype=jnp.int32)
        visible = (at <= position[:, None]) & (at >= first[:, None])  # [R, S]
        return _accumulate(state, packed, k, v, visible[:, None, None, :], softcap)

    with jax.named_scope("paged_decode_attention"):
        state = lax.fori_loop(start, stop, body, _initial(packed.shape, sink))
        return _normalise(state).reshape(q.shape).astype(q.dtype)


def paged_prefill_attention(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, kv_len: Array, q_start: Array, *,
    scale: float, window: int | None, softcap: float | None, sink: Array | None,
) -> Array:
    tokens, query_heads, head_dim = q.shape
    kv_heads = k_pages.shape[2]
    group = query_heads // kv_heads
    pages = _pages_per_block(k_pages.shape[1], page_table.shape[1])
    span = pages * k_pages.shape[1]
    chunk = q_start[1:] - q_start[:-1]
    end = jnp.cumsum((chunk + _TILE - 1) // _TILE, dtype=jnp.int32)  # [R]
    padded = jnp.pad(q.astype(jnp.float32) * scale, ((0, _TILE), (0, 0), (0, 0)))
    zero = jnp.int32(0)

    def item(i, out):
        request = jnp.sum(end <= i, dtype=jnp.int32)
        tiles = (chunk[request] + _TILE - 1) // _TILE
        row = q_start[request] + (i - (end[request] - tiles)) * _TILE
        position = kv_len[request] - q_start[request + 1] + row + jnp.arange(_TILE, dtype=jnp.int32)
        last = jnp.minimum(position[-1] + 1, kv_len[request])
        position = jnp.where(position < last, position, -1)
        packed = lax.dynamic_slice_in_dim(padded, row, _TILE).reshape(_TILE, kv_heads, group, head_dim)
        packed = packed.transpose(1, 0, 2, 3).reshape(1, kv_heads, _TILE * group, head_dim)
        first = zero if window is None else jnp.maximum(position[0] - window + 1, 0)
        row_of = jnp.repeat(position, group)

        def body(block, state):
            k, v = _load(k_pages, v_pages, page_table[request][None], block, pages)
            at = block * span + jnp.arange(span, dtype=jnp.int32)
            visible = at <= row_of[:, None]
            if window is not None:
                visible &= at > row_of[:, None] - window
            return _accumulate(state, packed, k, v, visible[None, None], softcap)

        state = _initial(packed.shape, None if sink is None else jnp.tile(sink.reshape(kv_heads, 1, group), (1, _TILE, 1)))
        state = lax.fori_loop(first // span, (last + span - 1) // span, body, state)
        tile = _normalise(state).reshape(kv_heads, _TILE, group, head_dim).transpose(1, 0, 2, 3)
        tile = jnp.where((position >= 0)[:, None, None], tile.reshape(_TILE, query_heads, head_dim), 0.0)
        return lax.dynamic_update_slice_in_dim(out, tile.astype(q.dtype), row, 0)

    with jax.named_scope("paged_prefill_attention"):
        out = jnp.zeros((tokens + _TILE, query_heads, head_dim), q.dtype)
        return lax.fori_loop(0, end[-1], item, out)[:tokens]


def _pages_per_block(page_size: int, max_pages: int) -> int:
    return max(1, min(_BLOCK_TOKENS // page_size, max_pages))


def _load(k_pages, v_pages, page_table, block, pages):
    num_pages, page_size, kv_heads, head_dim = k_pages.shape
    index = block * pages + jnp.arange(pages, dtype=jnp.int32)
    index = jnp.minimum(index, page_table.shape[1] - 1)
    ids = jnp.clip(page_table[:, index], 0, num_pages - 1)  # [B, pages]
    shape = (ids.shape[0], pages * page_size, kv_heads, head_dim)
    return k_pages[ids].reshape(shape).astype(jnp.float32), v_pages[ids].reshape(shape).astype(jnp.float32)


def _initial(shape, sink):
    peak = jnp.full(shape[:-1], -1e30) if sink is None else jnp.broadcast_to(sink.astype(jnp.float32).reshape(1, shape[1], -1), shape[:-1])
    total = jnp.full(shape[:-1], 0.0 if sink is None else 1.0)
    return _State(peak, total, jnp.zeros(shape))


def _accumulate(state, q, k, v, visible, softcap):
    scores = jnp.einsum("bhmd,bshd->bhms", q, k)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible, scores, -1e30)
    peak = jnp.maximum(state.peak, scores.max(-1))
    weights = jnp.where(visible, jnp.exp(scores - peak[..., None]), 0.0)
    rescale = jnp.exp(state.peak - peak)
    any_visible = visible.any(axis=(1, 2))
    v = jnp.where(any_visible[:, :, None, None], v, 0.0)
    out = state.out * rescale[..., None] + jnp.einsum("bhms,bshd->bhmd", weights, v)
    return _State(peak, state.total * rescale + weights.sum(-1), out)


def _normalise(state):
    return state.out / jnp.where(state.total == 0.0, 1.0, state.total)[..., None]
