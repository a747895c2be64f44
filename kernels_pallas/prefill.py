"""Paged prefill attention for Hopper: packed ragged chunks over paged KV in Mosaic GPU, warp-specialised.

A piece of work is 128 rows of one chunk and one query head. Pieces are sorted, the longest first, and distributed over
one thread block per multiprocessor in alternating direction, so that all blocks finish at about the same time.
`prefill_block.py` is the code of a thread block.

Not here: checks that hold for every implementation (`arguments.py`), the choice of tiles (`tiles.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import quantized_page_tiles
from .arguments import AttentionOptions, PagedKV
from .mosaic import Softmax, launch, refuse, sinks_in_base_2
from .pages import of_queries, of_results
from .prefill_block import prefill_block
from .prefill_plan import DESCRIPTION, ROWS, Plan, scratch
from .tiles import PrefillTiles
from .work import Piece, ceil_div, chunk_work


# Jitted, so that the layers of a model share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("tiles", "cores", "interpret"))
def paged_prefill_attention(
    q: Array,
    kv: PagedKV,
    q_start: Array,
    options: AttentionOptions,
    *,
    tiles: PrefillTiles,
    cores: int,
    interpret: Any = None,
) -> Array:
    """Compute attention as `attention.paged_prefill_attention` describes it.

    Args:
        q: [T, Hq, D].
        kv: the cache.
        q_start: [R + 1].
        options: how scores become weights.
        tiles: tokens of a tile and depth of the ring.
        cores: multiprocessors of the GPU, one thread block each.
        interpret: `plgpu.InterpretGPUParams()` to run on the CPU.

    Raises:
        ValueError: a dtype, head_dim, page size or number of heads that the kernel does not support; names it.
    """
    refuse(q, kv.k_pages, kv.v_pages, is_prefill=True)
    tokens, query_heads, head_dim = q.shape
    page_size, kv_heads = kv.k_pages.shape[1:3]
    plan = Plan(
        query_heads=query_heads,
        group=query_heads // kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        tile=tiles.tile,
        stages=tiles.stages,
        blocks=cores,
        window=options.window,
        has_sink=options.sink is not None,
        softmax=Softmax(options.scale, options.softcap),
        interpret=interpret is not None,
        quantized=quantized_page_tiles.dtypes_of(kv.k_pages, kv.v_pages),
    )
    with jax.named_scope("paged_prefill_attention"):
        rows = max(ceil_div(tokens, 8) * 8, ROWS)
        q = jnp.pad(of_queries(q, kv.k_pages), ((0, rows - tokens), (0, 0), (0, 0)))
        pieces, count = chunk_work(kv.kv_len, q_start, options.window, rows, ROWS)
        pieces = jnp.pad(pieces, ((0, 0), (0, DESCRIPTION - len(Piece._fields))))
        sinks = sinks_in_base_2(options.sink, query_heads)
        kernel = launch(
            functools.partial(prefill_block, plan),
            out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
            scratch_types=scratch(plan, q.dtype),
            blocks=plan.blocks,
            name="paged_prefill_attention",
            interpret=interpret,
        )
        pages, scales = quantized_page_tiles.arguments(kv.k_pages, kv.v_pages)
        out: Array = kernel(q, *pages, kv.page_table, kv.first_page, pieces, count, sinks, *scales)
        return of_results(out[:tokens], kv.v_pages)
