"""Paged attention, KV append and what comes before: the public functions. `arguments.py` checks their arguments,
`dispatch.py` picks a kernel.

Words and shapes: T packed tokens, R requests, N pages, P = page_size tokens a page, Hk key/value heads, Hq query heads,
D head_dim. Query head h reads key/value head `h // (Hq // Hk)`. Pages are page-major, [N, P, Hk, D], so that one page
is one contiguous run of memory. Token t of request r is in page `page_table[r, t // P]` at offset `t % P`.

Invariants of every implementation:
- Scores, softmax and sums are float32 whatever the inputs; the output has q's dtype.
- Entries of `page_table` beyond a request's used pages are never read and may have any value; the padding id is N.
- Unused slots of a page may hold anything, NaN included.
- Pages hold floats, or 8-bit numbers with their scales (`pages.py`), keys and values each in their own way.
- A request's rows do not depend on which other requests are in the call.
- Nothing copies the pools: N may count the pages of all layers. `first_page` is then the layer's first, and is added to
  every page id inside the kernels: tables of their own for each layer would be written by a kernel of their own.

Not here: positions (a `Rotation` holds the angles), allocation of pages, checks of array *contents* (lengths and page
ids are data on the device and are trusted).
"""

from jax import Array

from . import dispatch, xla
from .arguments import (
    AttentionOptions,
    NewTokens,
    PagedKV,
    Pools,
    as_first_page,
    check_append,
    check_attention,
    check_ints,
    check_rotation,
)
from .pages import Pages, QuantizedPages
from .rotary import Rotation

__all__ = [
    "Pages",
    "QuantizedPages",
    "Rotation",
    "append_kv",
    "paged_decode_attention",
    "paged_prefill_attention",
    "prepare_heads",
]


def paged_prefill_attention(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    page_table: Array,
    kv_len: Array,
    q_start: Array,
    *,
    scale: float,
    first_page: int | Array = 0,
    window: int | None = None,
    softcap: float | None = None,
    sink: Array | None = None,
) -> Array:
    """Compute causal attention of several requests' chunks, packed one after the other, over their cached tokens.

    A chunk's keys and values must be in the pages already (`append_kv` first).

    Args:
        q: [T, Hq, D]; the rows of request r's chunk are `q[q_start[r]:q_start[r + 1]]`, its last row at absolute
            position `kv_len[r] - 1`.
        k_pages: [N, P, Hk, D], floats or `QuantizedPages`.
        v_pages: [N, P, Hk, D], floats or `QuantizedPages`; not necessarily as k_pages.
        page_table: [R, max_pages] int32 page ids.
        kv_len: [R] int32, cached tokens of each request, this chunk's included; 0: none.
        q_start: [R + 1] int32, ascending; rows from `q_start[R]` on are padding.
        scale: multiplies the scores, usually `D ** -0.5`.
        first_page: added to every id of `page_table`; [] int32 or a number.
        window: how many tokens a query attends to, itself included; None: all before it.
        softcap: `scores = softcap * tanh(scores * scale / softcap)` (Gemma 2); None: scores are not capped.
        sink: [Hq] float, a logit per head that joins the softmax's denominator only (GPT-OSS); None: no sink.

    Returns:
        [T, Hq, D] of q's dtype; zeros in padding rows and in rows of requests whose kv_len is 0.

    Raises:
        ValueError: a shape, dtype, head count or option does not fit; names it.
    """
    kv = PagedKV(k_pages, v_pages, page_table, kv_len, as_first_page(first_page))
    options = AttentionOptions(scale, window, softcap, sink)
    requests = check_attention(q, kv, options)
    check_ints("q_start", q_start, (requests + 1,), "[R + 1], one more than kv_len")
    return dispatch.paged_prefill_attention(q, kv, q_start, options)


def paged_decode_attention(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    page_table: Array,
    kv_len: Array,
    *,
    scale: float,
    first_page: int | Array = 0,
    window: int | None = None,
    softcap: float | None = None,
    sink: Array | None = None,
) -> Array:
    """Compute attention of one new token per request over the request's cached tokens, itself included.

    Args:
        q: [R, Hq, D]; row r is at absolute position `kv_len[r] - 1`, its key and value already in the pages.
        k_pages: [N, P, Hk, D], floats or `QuantizedPages`.
        v_pages: [N, P, Hk, D], floats or `QuantizedPages`; not necessarily as k_pages.
        page_table: [R, max_pages] int32 page ids.
        kv_len: [R] int32, cached tokens of each request, this one included; 0 marks an empty slot, which costs nothing.
        scale: multiplies the scores, usually `D ** -0.5`.
        first_page: added to every id of `page_table`; [] int32 or a number.
        window: how many tokens a query attends to, itself included; None: all before it.
        softcap: `scores = softcap * tanh(scores * scale / softcap)` (Gemma 2); None: scores are not capped.
        sink: [Hq] float, a logit per head that joins the softmax's denominator only (GPT-OSS); None: no sink.

    Returns:
        [R, Hq, D] of q's dtype; zeros in empty slots.

    Raises:
        ValueError: a shape, dtype, head count or option does not fit; names it.
    """
    kv = PagedKV(k_pages, v_pages, page_table, kv_len, as_first_page(first_page))
    options = AttentionOptions(scale, window, softcap, sink)
    requests = check_attention(q, kv, options)
    if q.shape[0] != requests:
        raise ValueError(f"q has shape {q.shape}: its first axis must be R = {requests}, the length of kv_len.")
    return dispatch.paged_decode_attention(q, kv, options)


def append_kv(
    k_pages: Pages, v_pages: Pages, k: Array, v: Array, slot: Array, *, first_page: int | Array = 0
) -> tuple[Pages, Pages]:
    """Write new keys and values into their slots, rounded to what the pages hold; in place if the pools are donated.

    Args:
        k_pages: [N, P, Hk, D], floats or `QuantizedPages`.
        v_pages: [N, P, Hk, D], floats or `QuantizedPages`.
        k: [T, Hk, D] float.
        v: [T, Hk, D] float.
        slot: [T] int32, `page * P + offset`; distinct, not negative. N * P or more marks padding, which writes nothing.
        first_page: added to the page of every slot; [] int32 or a number.

    Returns:
        The updated (k_pages, v_pages).

    Raises:
        ValueError: a shape or dtype does not fit, or N * P does not fit int32; names it.
    """
    check_append(k_pages, v_pages, k, v, slot)
    return xla.append_kv(k_pages, v_pages, k, v, slot, as_first_page(first_page))


def prepare_heads(
    q: Array,
    k: Array,
    v: Array,
    rotation: Rotation,
    k_pages: Pages,
    v_pages: Pages,
    slot: Array,
    *,
    first_page: int | Array = 0,
) -> tuple[Array, Pages, Pages]:
    """Norm and rotate queries and keys, and write keys and values into their slots; in place if the pools are donated.

    Args:
        q: [T, Hq, D] as projected.
        k: [T, Hk, D] as projected, of q's dtype.
        v: [T, Hk, D].
        rotation: the tokens' angles, and the norms of queries and keys.
        k_pages: [N, P, Hk, D], floats or `QuantizedPages`.
        v_pages: [N, P, Hk, D], floats or `QuantizedPages`.
        slot: [T] int32, as for `append_kv`.
        first_page: added to the page of every slot; [] int32 or a number.

    Returns:
        The queries [T, Hq, D] to attend from, and the updated (k_pages, v_pages).

    Raises:
        ValueError: a shape or dtype does not fit, or N * P does not fit int32; names it.
    """
    check_append(k_pages, v_pages, k, v, slot)
    check_rotation(q, k, rotation, k_pages)
    pools = Pools(k_pages, v_pages, as_first_page(first_page))
    return dispatch.prepare_heads(NewTokens(q, k, v, rotation, slot), pools)
