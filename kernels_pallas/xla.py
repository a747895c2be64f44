"""Page-blocked online softmax in plain XLA: for the CPU, and for GPUs without Mosaic kernels.

Both attentions are loops with dynamic trip counts over blocks of pages, so their cost follows the tokens that requests
hold and not the size of the page table. The pools are loop invariants that a gather reads a block at a time: nothing
copies them, and an `append_kv` before the loop stays in place. Shapes here are chosen for XLA CPU
(docs/performance.md has the numbers).

`kernels_pallas/__init__.py` has the inputs checked and documents the layouts. Not differentiable in reverse mode
(dynamic loops); `reference.py` is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .arguments import AttentionOptions, NewTokens, PagedKV, Pools
from .pages import Pages, QuantizedPages, gather, quantize
from .scatter import write_rows
from .work import Splits, ceil_div, split_work

# Measured on two CPU cores, float32, 3 key/value heads of 64.
_DECODE_BLOCK = 128  # tokens of a block
DECODE_SPLITS = 32  # the most splits of a request, whose partial sums are kept
_DECODE_LANES = 4  # splits of an iteration per row
_DECODE_TOKENS = 2048  # the most tokens of an iteration: fewer starve the second core, more exceed the L2 cache
_PREFILL_TILE = 128  # query rows of a work item
_PREFILL_BLOCK = 128  # tokens of an iteration

# A GPU would otherwise multiply float32 in TF32, which keeps 10 bits of mantissa.
_PRECISION = lax.Precision.HIGHEST
_LOWEST = -1e30  # finite, so that a row without visible tokens so far never computes inf - inf


class _Softmax(NamedTuple):
    """A softmax-weighted sum over the keys processed so far, for B batches of M query rows."""

    peak: Array  # [B, M], the largest logit
    total: Array  # [B, M], sum of exp(logit - peak)
    out: Array  # [B, M, D], sum of exp(logit - peak) * value


def append_kv(
    k_pages: Pages, v_pages: Pages, k: Array, v: Array, slot: Array, first_page: Array
) -> tuple[Pages, Pages]:
    """Write new keys and values into their slots, as `attention.append_kv` describes it; `first_page` is [1]."""
    # By page and offset: as flat rows, [N * P, Hk, D], a pool with a single head would be copied.
    num_pages, page_size = k_pages.shape[:2]
    page = jnp.minimum(slot // page_size, num_pages - first_page) + first_page
    with jax.named_scope("append_kv"):
        return _append(k_pages, page, slot % page_size, k), _append(v_pages, page, slot % page_size, v)


def _append(pages: Pages, page: Array, offset: Array, new: Array) -> Pages:
    if not isinstance(pages, QuantizedPages):
        return write_rows(pages, (page, offset), new.astype(pages.dtype))
    numbers, scales = quantize(new, pages.channels, pages.dtype)
    tokens, heads = scales.shape
    # A token's scales lie apart, one for each head.
    at = jnp.repeat(page, heads), jnp.tile(jnp.arange(heads, dtype=jnp.int32), tokens), jnp.repeat(offset, heads)
    written = write_rows(pages.tokens, at, scales.reshape(-1))
    return pages._replace(values=write_rows(pages.values, (page, offset), numbers), tokens=written)


def prepare_heads(new: NewTokens, pools: Pools) -> tuple[Array, Pages, Pages]:
    """See `attention.prepare_heads`."""
    q, k = new.rotation.apply(new.q, new.k)
    return q, *append_kv(pools.k_pages, pools.v_pages, k, new.v, new.slot, pools.first_page)


def paged_decode_attention(q: Array, kv: PagedKV, options: AttentionOptions) -> Array:
    """Compute attention as `attention.paged_decode_attention` describes it.

    Split-KV, so that a request of a ragged batch does not cost as much as the longest: the splits of all requests are
    one list, of which an iteration takes the next few, whatever their requests. A split is one block, or several in an
    inner loop. All heads of a split are one GEMM against the pages in their memory layout: row h of the left operand
    holds query head h in the columns of its key/value head and zeros elsewhere. That is Hk times the arithmetic and
    still faster than transposing the cache to heads-major, up to at least 8 heads.
    """
    rows, max_pages = kv.page_table.shape
    page_size, kv_heads, head_dim = kv.k_pages.shape[1:]
    pages = max(1, _DECODE_BLOCK // page_size)  # of a block
    split = _decode_split(max_pages, page_size, pages, options.window)
    lanes = max(1, min(_DECODE_LANES * rows, _DECODE_TOKENS // (pages * page_size)))
    with jax.named_scope("paged_decode_attention"):
        is_one_block = split == pages * page_size
        work = split_work(kv.kv_len, options.window, split, kv.capacity)
        listed = _listed_splits(work, lanes, by_length=not is_one_block)
        spread = _spread_heads(q.astype(jnp.float32) * options.scale, kv_heads)  # [R, Hq, Hk*D]

        def few(i: Array, parts: _Softmax) -> _Softmax:
            row, begin, end = (lax.dynamic_slice_in_dim(x, i * lanes, lanes) for x in listed[:3])
            queries, tables, start = spread[row], kv.page_table[row], _block_start(begin, pages, page_size)

            def block(j: Array, state: _Softmax) -> _Softmax:
                page = (start + j * pages)[:, None] + jnp.arange(pages, dtype=jnp.int32)
                token = _tokens(page, page_size)  # [B, S]
                visible = (token >= begin[:, None]) & (token < end[:, None])
                k, v = _load(kv, tables, page, visible)  # [B, S, Hk, D]
                k, v = (x.reshape(*token.shape, kv_heads * head_dim) for x in (k, v))
                return _accumulate(state, queries, k, v, visible[:, None, :], options.softcap)

            part = _initial(queries.shape, None)
            if is_one_block:
                part = block(jnp.int32(0), part)
            else:
                blocks = jnp.max(ceil_div(end, page_size) - start + pages - 1) // pages
                part = lax.fori_loop(0, blocks, block, part)
            part = part._replace(out=_own_heads(part.out, kv_heads))
            placed: _Softmax = jax.tree.map(
                lambda x, new: lax.dynamic_update_slice_in_dim(x, new, i * lanes, 0), parts, part
            )
            return placed

        parts = _initial((listed.row.shape[0], *q.shape[1:]), None)
        parts = lax.fori_loop(0, (listed.start[rows] + lanes - 1) // lanes, few, parts)
        return _normalise(_combine(parts, listed, _initial(q.shape, options.sink))).astype(q.dtype)


class _ListedSplits(NamedTuple):
    """The splits of all requests, padded with empty ones to a number U that is a multiple of the lanes."""

    row: Array  # [U], the request
    begin: Array  # [U], the split's first visible token
    end: Array  # [U], the token after its last
    place: Array  # [U], index in this list of each of `split_work`'s splits
    start: Array  # [R + 1], as `Splits.start`


def _decode_split(max_pages: int, page_size: int, pages: int, window: int | None) -> int:
    """Choose the tokens of a split: one block of `pages`, or several if there could be more than `DECODE_SPLITS`."""
    reach = max_pages if window is None else min(max_pages, ceil_div(window, page_size) + 1)
    return ceil_div(reach, pages * DECODE_SPLITS) * pages * page_size


def _listed_splits(work: Splits, lanes: int, *, by_length: bool) -> _ListedSplits:
    """Pad the list of splits to whole iterations of `lanes` splits.

    `by_length` sorts them, the longest first, so that the splits of an iteration have about equally many blocks.
    """
    items = jnp.pad(work.items, ((0, -work.items.shape[0] % lanes), (0, 0)))
    place = jnp.arange(items.shape[0], dtype=jnp.int32)
    row, begin, end = (jnp.where(place < work.start[-1], x, 0) for x in items.T[:3])
    if by_length:
        order = jnp.argsort(begin - end)
        row, begin, end = row[order], begin[order], end[order]
        place = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    return _ListedSplits(row, begin, end, place, work.start)


def _combine(parts: _Softmax, listed: _ListedSplits, state: _Softmax) -> _Softmax:
    """Fold the parts [U, ...] of each request into its row of `state` [R, ...], in the order of its tokens."""
    first, count = listed.start[:-1], listed.start[1:] - listed.start[:-1]

    def fold(j: Array, state: _Softmax) -> _Softmax:
        at, is_own = listed.place.at[first + j].get(mode="clip"), (j < count)[:, None]
        part_peak = jnp.where(is_own, parts.peak[at], _LOWEST)
        peak = jnp.maximum(state.peak, part_peak)
        rescale, weight = jnp.exp(state.peak - peak), jnp.exp(part_peak - peak)
        # Not by a weight of 0: another request's part may be NaN.
        total = jnp.where(is_own, parts.total[at] * weight, 0.0)
        out = jnp.where(is_own[..., None], parts.out[at] * weight[..., None], 0.0)
        return _Softmax(peak, state.total * rescale + total, state.out * rescale[..., None] + out)

    combined: _Softmax = lax.fori_loop(0, jnp.max(count), fold, state)
    return combined


def paged_prefill_attention(q: Array, kv: PagedKV, q_start: Array, options: AttentionOptions) -> Array:
    """Compute attention as `attention.paged_prefill_attention` describes it.

    The work is a list of tiles of query rows, those of request 0 first. A tile that ends past its chunk leaves zeros in
    the rows that follow; the tiles of the next request, which come later in the list, overwrite them.
    """
    tokens, query_heads, head_dim = q.shape
    page_size, kv_heads = kv.k_pages.shape[1:3]
    window, sink = options.window, options.sink
    group = query_heads // kv_heads
    tile = min(_PREFILL_TILE, tokens)
    pages = max(1, _PREFILL_BLOCK // page_size)
    with jax.named_scope("paged_prefill_attention"):
        padded = jnp.pad(q.astype(jnp.float32) * options.scale, ((0, tile), (0, 0), (0, 0)))
        tiles = (q_start[1:] - q_start[:-1] + tile - 1) // tile  # [R]
        tiles_end = jnp.cumsum(tiles, dtype=jnp.int32)
        # One row per (group member, query row), the layout of `packed` below.
        tile_sink = None if sink is None else jnp.repeat(sink.reshape(kv_heads, group), tile, axis=1)

        def item(index: Array, out: Array) -> Array:
            request = jnp.sum(tiles_end <= index, dtype=jnp.int32)
            row = q_start[request] + (index - (tiles_end[request] - tiles[request])) * tile
            position = kv.kv_len[request] - q_start[request + 1] + row + jnp.arange(tile, dtype=jnp.int32)  # [tile]
            stop = jnp.minimum(position[-1] + 1, kv.kv_len[request])
            in_chunk = (position >= 0) & (position < stop)
            first = jnp.maximum(position[0] - window + 1, 0) if window is not None else jnp.zeros_like(stop)
            start = _block_start(first, pages, page_size)
            packed = lax.dynamic_slice_in_dim(padded, row, tile).reshape(tile, kv_heads, group, head_dim)
            packed = packed.transpose(1, 2, 0, 3).reshape(kv_heads, group * tile, head_dim)
            packed_position = jnp.tile(position, group)[:, None]  # [M, 1]

            def block(i: Array, state: _Softmax) -> _Softmax:
                page = start + i * pages + jnp.arange(pages, dtype=jnp.int32)[None]
                token = _tokens(page, page_size)  # [1, S]
                k, v = _load(kv, kv.page_table[request][None], page, (token >= first) & (token < stop))
                k, v = (x[0].transpose(1, 0, 2) for x in (k, v))  # [Hk, S, D]
                visible = token <= packed_position
                if window is not None:
                    visible &= token > packed_position - window
                return _accumulate(state, packed, k, v, visible[None], options.softcap)

            blocks = (ceil_div(stop, page_size) - start + pages - 1) // pages
            state = lax.fori_loop(0, blocks, block, _initial(packed.shape, tile_sink))
            done = _normalise(state).reshape(kv_heads, group, tile, head_dim).transpose(2, 0, 1, 3)
            done = jnp.where(in_chunk[:, None, None], done.reshape(tile, query_heads, head_dim), 0.0)
            return lax.dynamic_update_slice_in_dim(out, done.astype(q.dtype), row, 0)

        out = jnp.zeros((tokens + tile, query_heads, head_dim), q.dtype)
        out = lax.fori_loop(0, tiles_end[-1], item, out)
        return lax.slice_in_dim(out, 0, tokens)


def _block_start(token: Array, pages: int, page_size: int) -> Array:
    """Find the page at which a row's loop begins, so that its first block holds `token`.

    It is a multiple of the block's pages: blocks then begin at the same absolute positions wherever a window or a chunk
    begins. Otherwise partial sums would cover other tokens and be rounded differently.
    """
    return token // (pages * page_size) * pages


def _tokens(page: Array, page_size: int) -> Array:
    """Compute the absolute positions of the tokens of pages: [B, pages] -> [B, pages * P]."""
    token = page[:, :, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
    return token.reshape(page.shape[0], -1)


def _load(
    kv: PagedKV,
    table: Array,  # [B, max_pages], rows of its page table
    page: Array,  # [B, pages], indices into table; past its end for the last block of a row
    visible: Array,  # [B, pages * P]
) -> tuple[Array, Array]:
    """Load keys and values of one block of pages per row, float32 [B, pages * P, Hk, D]; invisible values are 0."""
    num_pages, page_size, kv_heads, head_dim = kv.k_pages.shape
    ids = jnp.take_along_axis(table, jnp.minimum(page, table.shape[1] - 1), axis=1)
    # A padding id reads some page; its tokens are masked.
    ids = jnp.clip(jnp.minimum(ids, num_pages) + kv.first_page, 0, num_pages - 1)
    shape = (page.shape[0], page.shape[1] * page_size, kv_heads, head_dim)
    k, v = (gather(pages, ids).reshape(shape).astype(jnp.float32) for pages in (kv.k_pages, kv.v_pages))
    return k, jnp.where(visible[:, :, None, None], v, 0.0)


def _initial(shape: tuple[int, ...], sink: Array | None) -> _Softmax:
    """Make the state before the first key, for queries [B, M, D].

    `sink` is a logit without a value, broadcastable to [B, M], or None.
    """
    if sink is None:
        lowest = jnp.full(shape[:-1], _LOWEST, jnp.float32)
        return _Softmax(lowest, jnp.zeros_like(lowest), jnp.zeros(shape, jnp.float32))
    logit = jnp.broadcast_to(sink.astype(jnp.float32), shape[:-1])
    peak = jnp.maximum(logit, _LOWEST)
    return _Softmax(peak, jnp.exp(logit - peak), jnp.zeros(shape, jnp.float32))


def _accumulate(state: _Softmax, q: Array, k: Array, v: Array, visible: Array, softcap: float | None) -> _Softmax:
    """Fold in S more keys: q [B, M, D] (scaled), k and v [B, S, D], visible broadcastable to [B, M, S]."""
    scores = jnp.einsum("bmd,bsd->bms", q, k, precision=_PRECISION)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = jnp.maximum(state.peak, scores.max(axis=-1))
    weights = jnp.exp(scores - peak[..., None])
    rescale = jnp.exp(state.peak - peak)
    out = state.out * rescale[..., None] + jnp.einsum("bms,bsd->bmd", weights, v, precision=_PRECISION)
    return _Softmax(peak, state.total * rescale + weights.sum(axis=-1), out)


def _normalise(state: _Softmax) -> Array:
    seen = jnp.where(state.total == 0.0, 1.0, state.total)
    return jnp.divide(state.out, seen[..., None])


def _spread_heads(q: Array, kv_heads: int) -> Array:
    """Spread [R, Hq, D] -> [R, Hq, Hk * D], each query head into the columns of its key/value head."""
    rows, query_heads, head_dim = q.shape
    own = jnp.eye(kv_heads, dtype=jnp.float32)[:, None, :, None]
    spread = q.reshape(rows, kv_heads, -1, 1, head_dim) * own  # [R, Hk, G, Hk, D]
    return spread.reshape(rows, query_heads, kv_heads * head_dim)


def _own_heads(spread: Array, kv_heads: int) -> Array:
    """Invert `_spread_heads`; the columns of other key/value heads are dropped."""
    rows, query_heads, width = spread.shape
    split = spread.reshape(rows, kv_heads, query_heads // kv_heads, kv_heads, width // kv_heads)
    own: Array = jnp.diagonal(split, axis1=1, axis2=3)  # [R, G, D, Hk]
    return own.transpose(0, 3, 1, 2).reshape(rows, query_heads, width // kv_heads)
