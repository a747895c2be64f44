"""Paged attention and KV append: the public functions, checked at trace time. `dispatch.py` chooses what they run.

Words and shapes: T packed tokens, R requests, N pages, P = page_size tokens a page, Hk key/value heads, Hq query heads,
D head_dim. Query head h reads key/value head `h // (Hq // Hk)`. Pages are page-major, [N, P, Hk, D], so that one page
is one contiguous run of memory. Token t of request r lives in page `page_table[r, t // P]` at offset `t % P`.

Invariants of every implementation:
- Scores, softmax and sums are float32 whatever the inputs; the output has q's dtype.
- Entries of `page_table` beyond a request's used pages are never read: any value will do, the padding id is N.
- Unused slots of a page may hold anything, NaN included.
- A request's rows do not depend on which other requests are in the call.
- Nothing copies the pools: N may count the pages of all layers, with layer l's page ids offset by l * pages_per_layer.

Not here: positions (rotate q and k before the call), allocation of pages, checks of array *contents* (lengths and page
ids are data on the device and are trusted).
"""

import math

import jax.numpy as jnp
from jax import Array

from . import dispatch, xla

__all__ = ["append_kv", "paged_decode_attention", "paged_prefill_attention"]


def paged_prefill_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_len: Array,
    q_start: Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink: Array | None = None,
) -> Array:
    """Causal attention of several requests' chunks, packed one after the other, over their cached tokens.

    A chunk's keys and values must be in the pages already (`append_kv` first).

    Args:
        q: [T, Hq, D]; the rows of request r's chunk are `q[q_start[r]:q_start[r + 1]]`, its last row at absolute
            position `kv_len[r] - 1`.
        k_pages: [N, P, Hk, D], of q's dtype.
        v_pages: [N, P, Hk, D], of q's dtype.
        page_table: [R, max_pages] int32 page ids.
        kv_len: [R] int32, cached tokens of each request, this chunk's included; 0 for none.
        q_start: [R + 1] int32, ascending; rows from `q_start[R]` on are padding.
        scale: multiplies the scores, usually `D ** -0.5`.
        window: how many tokens a query sees, itself included; None for all before it.
        softcap: `scores = softcap * tanh(scores * scale / softcap)` (Gemma 2); None for none.
        sink: [Hq] float, a logit per head that joins the softmax's denominator only (GPT-OSS); None for none.

    Returns:
        [T, Hq, D] of q's dtype; zeros in padding rows and in rows of requests whose kv_len is 0.

    Raises:
        ValueError: a shape, dtype, head count or option does not fit; the message names it.
    """
    requests = _check_attention(q, k_pages, v_pages, page_table, kv_len, scale, window, softcap, sink)
    _check_ints("q_start", q_start, (requests + 1,), "[R + 1], one more than kv_len")
    return dispatch.paged_prefill_attention(
        q, k_pages, v_pages, page_table, kv_len, q_start, scale=scale, window=window, softcap=softcap, sink=sink
    )


def paged_decode_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_len: Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink: Array | None = None,
) -> Array:
    """Attention of one new token per request over its cached tokens, itself included.

    Args:
        q: [R, Hq, D]; row r sits at absolute position `kv_len[r] - 1`, its key and value already in the pages.
        k_pages: [N, P, Hk, D], of q's dtype.
        v_pages: [N, P, Hk, D], of q's dtype.
        page_table: [R, max_pages] int32 page ids.
        kv_len: [R] int32, cached tokens of each request, this one included; 0 marks an empty slot, which costs nothing.
        scale: multiplies the scores, usually `D ** -0.5`.
        window: how many tokens a query sees, itself included; None for all before it.
        softcap: `scores = softcap * tanh(scores * scale / softcap)` (Gemma 2); None for none.
        sink: [Hq] float, a logit per head that joins the softmax's denominator only (GPT-OSS); None for none.

    Returns:
        [R, Hq, D] of q's dtype; zeros in empty slots.

    Raises:
        ValueError: a shape, dtype, head count or option does not fit; the message names it.
    """
    requests = _check_attention(q, k_pages, v_pages, page_table, kv_len, scale, window, softcap, sink)
    if q.shape[0] != requests:
        raise ValueError(f"q has shape {q.shape}: its first axis must be R = {requests}, the length of kv_len.")
    return dispatch.paged_decode_attention(
        q, k_pages, v_pages, page_table, kv_len, scale=scale, window=window, softcap=softcap, sink=sink
    )


def append_kv(k_pages: Array, v_pages: Array, k: Array, v: Array, slot: Array) -> tuple[Array, Array]:
    """Write new keys and values into their slots; in place where the pools are donated.

    Args:
        k_pages: [N, P, Hk, D].
        v_pages: [N, P, Hk, D], of k_pages' dtype.
        k: [T, Hk, D], of k_pages' dtype.
        v: [T, Hk, D], of k_pages' dtype.
        slot: [T] int32, `page * P + offset`; distinct, not negative. N * P or more marks padding, which writes nothing.

    Returns:
        The updated (k_pages, v_pages).

    Raises:
        ValueError: a shape or dtype does not fit, or N * P does not fit int32; the message names it.
    """
    _check_pages(k_pages, v_pages)
    num_pages, page_size, kv_heads, head_dim = k_pages.shape
    for name, new in (("k", k), ("v", v)):
        if new.shape != (slot.shape[0] if slot.ndim else -1, kv_heads, head_dim):
            raise ValueError(
                f"{name} has shape {new.shape}: it must be [T, Hk, D] with T the length of slot (shape {slot.shape}) "
                f"and Hk, D = {kv_heads}, {head_dim} as in k_pages."
            )
        if new.dtype != k_pages.dtype:
            raise ValueError(f"{name} has dtype {new.dtype}: it must be k_pages' dtype, {k_pages.dtype}.")
    _check_ints("slot", slot, (k.shape[0],), "[T], as long as k")
    if num_pages * page_size >= 2**31:
        raise ValueError(f"k_pages has {num_pages * page_size} slots: N * P must be below 2**31, slots are int32.")
    return xla.append_kv(k_pages, v_pages, k, v, slot)


def _check_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_len: Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Array | None,
) -> int:
    """Refuse what both attentions refuse; the number of requests."""
    _check_pages(k_pages, v_pages)
    kv_heads, head_dim = k_pages.shape[2:]
    if q.ndim != 3 or q.shape[2] != head_dim or 0 in q.shape or q.shape[1] % kv_heads:
        raise ValueError(
            f"q has shape {q.shape}: it must be [1 or more rows, Hq, D] with Hq a multiple of k_pages' {kv_heads} "
            f"heads and D = {head_dim} as in k_pages."
        )
    if q.dtype != k_pages.dtype:
        raise ValueError(f"q has dtype {q.dtype}: it must be k_pages' dtype, {k_pages.dtype}.")
    if page_table.ndim != 2 or 0 in page_table.shape:
        raise ValueError(f"page_table has shape {page_table.shape}: it must be [R, max_pages], neither of them 0.")
    requests = page_table.shape[0]
    _check_ints("page_table", page_table, page_table.shape, "[R, max_pages]")
    _check_ints("kv_len", kv_len, (requests,), "[R], one per row of page_table")
    _check_options(q.shape[1], scale, window, softcap, sink)
    return requests


def _check_options(
    query_heads: int, scale: float, window: int | None, softcap: float | None, sink: Array | None
) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: it must be a finite number.")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window={window!r}: it must be a whole number, 1 or more, or None.")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap!r}: it must be a finite number above 0, or None.")
    if sink is not None and (sink.shape != (query_heads,) or not jnp.issubdtype(sink.dtype, jnp.floating)):
        raise ValueError(
            f"sink is {sink.dtype}{list(sink.shape)}: it must be float [Hq] with Hq = {query_heads} as in q."
        )


def _check_pages(k_pages: Array, v_pages: Array) -> None:
    if k_pages.ndim != 4 or 0 in k_pages.shape:
        raise ValueError(f"k_pages has shape {k_pages.shape}: it must be [N, P, Hk, D], none of them 0.")
    if not jnp.issubdtype(k_pages.dtype, jnp.floating):
        raise ValueError(f"k_pages has dtype {k_pages.dtype}: it must be a floating point type.")
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages is {v_pages.dtype}{list(v_pages.shape)}: it must be as k_pages, "
            f"{k_pages.dtype}{list(k_pages.shape)}."
        )


def _check_ints(name: str, value: Array, shape: tuple[int, ...], wanted: str) -> None:
    if value.shape != shape or value.dtype != jnp.int32:
        raise ValueError(f"{name} is {value.dtype}{list(value.shape)}: it must be {wanted}, here int32{list(shape)}.")
