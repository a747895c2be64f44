"""Paged decode attention for Hopper: split-KV in Mosaic GPU, followed by the combination of each request's splits.

A request's tokens are cut at absolute multiples of a fixed split size. The list of all (split, key/value head) pairs is
distributed over as many thread blocks as the GPU has multiprocessors, so that a request costs in proportion to its
tokens and an empty slot costs nothing. `decode_block.py` is the code of a thread block.

Partial sums are float32 and divided by their total; the base-2 logarithm of total and peak is stored with them.
Not here: checks that hold for every implementation (`arguments.py`), the choice of tiles (`tiles.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import quantized_page_tiles
from .arguments import AttentionOptions, PagedKV
from .combine import combine_splits
from .decode_block import decode_block
from .decode_plan import Plan, scratch
from .mosaic import Softmax, launch, refuse
from .pages import of_queries, of_results
from .tiles import DecodeTiles
from .work import Splits, split_work


# Jitted, so that the layers of a model share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("tiles", "cores", "interpret"))
def paged_decode_attention(
    q: Array,
    kv: PagedKV,
    options: AttentionOptions,
    *,
    tiles: DecodeTiles,
    cores: int,
    interpret: Any = None,
) -> Array:
    """Compute attention as `attention.paged_decode_attention` describes it.

    Args:
        q: [R, Hq, D].
        kv: the cache.
        options: how scores become weights.
        tiles: split size and depth of the ring.
        cores: multiprocessors of the GPU, one thread block each.
        interpret: `plgpu.InterpretGPUParams()` to run on the CPU.

    Raises:
        ValueError: a dtype, head_dim, page size or number of heads that the kernel does not support; names it.
    """
    refuse(q, kv.k_pages, kv.v_pages)
    requests, query_heads, head_dim = q.shape
    page_size, kv_heads = kv.k_pages.shape[1:3]
    group = query_heads // kv_heads
    plan = Plan(
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        stages=tiles.stages,
        blocks=cores,
        softmax=Softmax(options.scale, options.softcap),
        interpret=interpret is not None,
        quantized=quantized_page_tiles.dtypes_of(kv.k_pages, kv.v_pages),
    )
    with jax.named_scope("paged_decode_attention"):
        work = split_work(kv.kv_len, options.window, tiles.split, kv.capacity)
        fill = ((0, 0), (0, 0), (0, plan.rows - group), (0, 0))
        heads = jnp.pad(of_queries(q, kv.k_pages).reshape(requests, kv_heads, group, head_dim), fill)
        sums, logs = _attend(plan, heads, kv, work, interpret)
        combined = combine_splits(sums, logs, work.start, options.sink, group, q.dtype, interpret)
        return of_results(combined, kv.v_pages)


def _attend(
    plan: Plan,
    q: Array,  # [R, Hk, rows, D]
    kv: PagedKV,
    work: Splits,
    interpret: Any,
) -> tuple[Array, Array]:
    """Compute sums [U, rings, Hk, stored, D] and their logarithms [U, rings, Hk, stored] of at most U splits."""
    shape = (work.items.shape[0], plan.rings, plan.kv_heads, plan.stored)
    sums = jax.ShapeDtypeStruct((*shape, plan.head_dim), jnp.float32)
    kernel = launch(
        functools.partial(decode_block, plan),
        out_type=[sums, jax.ShapeDtypeStruct(shape, jnp.float32)],
        scratch_types=scratch(plan, q.dtype),
        blocks=plan.blocks,
        name="paged_decode_attention",
        interpret=interpret,
    )
    pages, tokens = quantized_page_tiles.arguments(kv.k_pages, kv.v_pages)
    return tuple(kernel(q, *pages, kv.page_table, kv.first_page, work.items, work.start, *tokens))
