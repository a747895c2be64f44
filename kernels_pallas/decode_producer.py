"""The producer of the Hopper decode kernel: a warpgroup that fills the rings with tiles of keys and values.

It loads q too, and goes on with the next piece of work while the consumers are at this one. Tiles of 8 bits it makes
floats of on their way.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import quantized_page_tiles
from .decode_plan import TILE, Block, Item
from .mosaic import RequestPages, load_tile
from .quantized_page_tiles import RawPools


def produce(block: Block) -> None:
    """Load the block's pieces of work, one after the other."""
    plan, barriers = block.plan, block.barriers
    init = (block.item(jnp.int32(0)), (jnp.int32(0),) * plan.rings)
    load = functools.partial(_load_item, block, block.first_page[0])
    _, used = lax.fori_loop(0, block.mine, load, init)
    for buffer in range(2):
        pl.when(block.mine > buffer)(functools.partial(plgpu.barrier_wait, barriers.q_free.at[buffer]))
    for ring in range(plan.rings):
        for i in range(plan.stages):
            at = ring * plan.stages + i
            pl.when(used[ring] > i)(functools.partial(plgpu.barrier_wait, barriers.free.at[at]))


def _load_item(
    block: Block, first_page: Array, i: Array, carry: tuple[Item, tuple[Array, ...]]
) -> tuple[Item, tuple[Array, ...]]:
    """Load the i-th piece; carry the piece, and how many tiles went through each ring before it."""
    plan, (item, used) = block.plan, carry
    following = block.item(i + 1)  # read early, because the read takes as long as a tile
    buffer = lax.rem(i, 2)

    @pl.when(i >= 2)
    def _wait_for_buffer() -> None:
        plgpu.barrier_wait(block.barriers.q_free.at[buffer])

    rows = block.smem.q.at[buffer, pl.ds(0, plan.rows)]
    plgpu.copy_gmem_to_smem(block.q.at[item.request, item.head], rows, block.barriers.q_full.at[buffer])
    pages = RequestPages(block.page_table, first_page, item.request, item.begin, item.end, plan.page_size, TILE)
    if plan.quantized is None:
        tile = functools.partial(_load_tile, block, item, used, pages)
        lax.fori_loop(0, item.tiles, tile, pages.ahead(item.base))
    else:
        _load_raw(block, item, pages.ids(pages.ahead(item.base)), item.base, jnp.int32(0))
        tile = functools.partial(_convert_tile, block, item, used, pages)
        lax.fori_loop(0, item.tiles, tile, pages.ahead(item.base + TILE))
    return following, tuple(n + item.share(ring, plan.rings) for ring, n in enumerate(used))


def _load_tile(
    block: Block, item: Item, used: tuple[Array, ...], pages: RequestPages, j: Array, ahead: Array
) -> Array:  # fmt: skip
    plan, barriers = block.plan, block.barriers
    ring = lax.rem(j, plan.rings)
    use = lax.div(j, plan.rings) + (used[0] if plan.rings == 1 else jnp.where(ring == 0, used[0], used[1]))
    at = block.slot(ring, use)
    base = item.base + j * TILE
    following = pages.ahead(base + TILE, ahead)

    @pl.when(use >= plan.stages)
    def _wait_for_slot() -> None:
        plgpu.barrier_wait(barriers.free.at[at])

    load_tile(block.k_pages, pages.ids(ahead), base, item.head, block.smem.k.at[at], barriers.k_full.at[at])
    load_tile(block.v_pages, pages.ids(ahead), base, item.head, block.smem.v.at[at], barriers.v_full.at[at])
    return following


def _load_raw(
    block: Block, item: Item, page: Callable[[Array], Array], base: Array, tile: Array
) -> None:  # fmt: skip
    assert block.smem.raw is not None
    pools = RawPools(block.k_pages, block.v_pages, *block.tokens)
    quantized_page_tiles.load_raw(pools, page, base, item.head, block.smem.raw, tile, block.barriers.raw_full)


def _convert_tile(
    block: Block, item: Item, used: tuple[Array, ...], pages: RequestPages, j: Array, ahead: Array
) -> Array:  # fmt: skip
    """Convert the j-th tile, which is on its way, and begin to copy the next, whose page `ahead` is carried."""
    plan, barriers, raw = block.plan, block.barriers, block.smem.raw
    assert raw is not None
    assert barriers.raw_full is not None
    ring, base, tile = lax.rem(j, plan.rings), item.base + j * TILE, lax.rem(j, 2)
    use = lax.div(j, plan.rings) + (used[0] if plan.rings == 1 else jnp.where(ring == 0, used[0], used[1]))
    at = block.slot(ring, use)

    @pl.when(j + 1 < item.tiles)
    def _next() -> None:
        _load_raw(block, item, pages.ids(ahead), base + TILE, 1 - tile)

    following = pages.ahead(base + 2 * TILE, ahead)

    @pl.when(use >= plan.stages)
    def _wait_for_slot() -> None:
        plgpu.barrier_wait(barriers.free.at[at])

    plgpu.barrier_wait(barriers.raw_full.at[tile])
    quantized_page_tiles.convert(raw.k.at[tile], raw.k_tokens.at[tile], block.smem.k.at[at])
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.k_full.at[at])
    quantized_page_tiles.convert(raw.v.at[tile], raw.v_tokens.at[tile], block.smem.v.at[at])
    plgpu.commit_smem()  # also before the copies that overwrite what was read here
    plgpu.barrier_arrive(barriers.v_full.at[at])
    return following
