"""The naive oracle of every kernel: dense, obvious, differentiable. For tests and gradients, never for serving.

Every query gathers the whole page table row of its request, so memory grows with T * max_pages * P. Layouts and rules
are those of the package (`kernels_pallas/__init__.py`); inputs are checked already.
"""

import jax
import jax.numpy as jnp
from jax import Array

from .arguments import AttentionOptions, PagedKV
from .pages import Pages, QuantizedPages, gather, quantize

_NEVER = -1  # the position of a row without visible tokens


def paged_prefill_attention(q: Array, kv: PagedKV, q_start: Array, options: AttentionOptions) -> Array:
    """Compute causal attention of packed chunks; see `attention.paged_prefill_attention`."""
    rows = jnp.arange(q.shape[0], dtype=jnp.int32)  # [T]
    request = jnp.searchsorted(q_start[1:], rows, side="right").astype(jnp.int32)
    is_padding = request >= kv.kv_len.shape[0]
    request = jnp.where(is_padding, 0, request)
    position = kv.kv_len[request] - (q_start[request + 1] - rows)
    position = jnp.where(is_padding, _NEVER, position)
    return _attend(q, kv._replace(page_table=kv.page_table[request]), position, options)


def paged_decode_attention(q: Array, kv: PagedKV, options: AttentionOptions) -> Array:
    """Compute attention of one new token per request; see `attention.paged_decode_attention`."""
    return _attend(q, kv, kv.kv_len - 1, options)


def append_kv(
    k_pages: Pages, v_pages: Pages, k: Array, v: Array, slot: Array, first_page: int = 0
) -> tuple[Pages, Pages]:
    """Write new keys and values into their slots; see `attention.append_kv`."""

    def write(pages: Pages, new: Array) -> Pages:
        page, offset = slot // pages.shape[1] + first_page, slot % pages.shape[1]
        if not isinstance(pages, QuantizedPages):
            return pages.at[page, offset].set(new.astype(pages.dtype), mode="drop")
        numbers, scales = quantize(new, pages.channels, pages.dtype)
        values = pages.values.at[page, offset].set(numbers, mode="drop")
        return pages._replace(values=values, tokens=pages.tokens.at[page, :, offset].set(scales, mode="drop"))

    return write(k_pages, k), write(v_pages, v)


def _attend(
    q: Array,  # [T, Hq, D]
    kv: PagedKV,  # with one row of its page table per row of q: [T, max_pages]
    position: Array,  # [T], absolute; -1: no visible tokens
    options: AttentionOptions,
) -> Array:
    num_pages, _, kv_heads, head_dim = kv.k_pages.shape
    window, softcap, length = options.window, options.softcap, kv.capacity
    kv_position = jnp.arange(length, dtype=jnp.int32)
    page = jnp.minimum(kv.page_table, num_pages) + kv.first_page
    visible = kv_position <= position[:, None]  # [T, L]
    if window is not None:
        visible &= kv_position > position[:, None] - window

    def dense(pages: Pages) -> Array:
        # Selected before any arithmetic: a NaN in an unused slot would survive a multiplication by zero, and in
        # gradients even a later select.
        gathered = gather(pages, jnp.clip(page, 0, num_pages - 1)).reshape(-1, length, kv_heads, head_dim)
        selected = jnp.where(visible[:, :, None, None], gathered.astype(jnp.float32), 0.0)
        return jnp.repeat(selected, q.shape[1] // kv_heads, axis=2)  # [T, L, Hq, D]

    scores = jnp.einsum("thd,tlhd->thl", q.astype(jnp.float32), dense(kv.k_pages), precision="highest") * options.scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None, :], scores, -jnp.inf)
    sinks = jnp.full(q.shape[1], -jnp.inf) if options.sink is None else options.sink.astype(jnp.float32)
    sinks = jnp.broadcast_to(sinks[None, :, None], (*scores.shape[:2], 1))
    # Finite logits keep the softmax of a row without visible tokens, and its gradient, free of NaN.
    seen = (position >= 0)[:, None, None]
    logits = jnp.where(seen, jnp.concatenate([scores, sinks], axis=-1), 0.0)
    weights = jax.nn.softmax(logits, axis=-1)[:, :, :-1]
    out = jnp.einsum("thl,tlhd->thd", weights, dense(kv.v_pages), precision="highest")
    return jnp.where(seen, out, 0.0).astype(q.dtype)
