"""The producer of the Hopper prefill kernel: a warpgroup that fills the ring with tiles of keys and values.

It loads the rows of q for the consumers too. Values past the end of a request, which may be NaN, it sets to zero, as
both consumers read them. Tiles of 8 bits it makes floats of on their way.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import quantized_page_tiles
from .mosaic import CONSUMERS, WARPGROUP_ROWS, Ref, RequestPages, copies_per_tile, load_tile, zero_hidden_rows
from .prefill_plan import Block
from .quantized_page_tiles import RawPools
from .work import Piece


def produce(block: Block, mine: Array) -> None:
    """Load the block's pieces of work, one after the other."""
    barriers = block.barriers
    load = functools.partial(_load_piece, block, block.first_page[0])
    used = lax.fori_loop(0, mine, load, jnp.int32(0))
    for consumer in range(CONSUMERS):
        plgpu.barrier_wait(barriers.q_free.at[consumer])

    @pl.loop(0, jnp.minimum(used, block.plan.stages))
    def _(slot: Array) -> None:
        plgpu.barrier_wait(barriers.k_free.at[slot])
        plgpu.barrier_wait(barriers.v_free.at[slot])


def _load_piece(block: Block, first_page: Array, i: Array, used: Array) -> Array:
    """Load the block's i-th piece; carry how many tiles went through the ring."""
    plan = block.plan
    number, head = block.place(i)
    piece = Piece.read(block.pieces.at[number])
    for consumer in range(CONSUMERS):
        _load_rows(block, consumer, i, number, head, piece)
    pages = RequestPages(block.page_table, first_page, piece.request, piece.low, piece.high, plan.page_size, plan.tile)
    first, last = piece.tiles(plan.tile)
    kv_head, base = lax.div(head, plan.group), first * plan.tile
    if plan.quantized is None:
        tile = functools.partial(_load_tile, block, piece, kv_head, pages)
        used, _ = lax.fori_loop(first, last, tile, (used, pages.ahead(base)))
        return used

    @pl.when(last > first)
    def _begin() -> None:
        _load_raw(block, kv_head, pages.ids(pages.ahead(base)), base, lax.rem(first, 2))

    tile = functools.partial(_convert_tile, block, piece, kv_head, pages, last)
    used, _ = lax.fori_loop(first, last, tile, (used, pages.ahead(base + plan.tile)))
    return used


def _load_rows(block: Block, consumer: int, i: Array, number: Array, head: Array, piece: Piece) -> None:
    """Load a consumer's rows of q, and the piece's description."""

    @pl.when(i > 0)
    def _wait_for_rows() -> None:
        plgpu.barrier_wait(block.barriers.q_free.at[consumer])

    row = pl.multiple_of(piece.row + consumer * WARPGROUP_ROWS, 8)
    full = block.barriers.q_full.at[consumer]
    plgpu.copy_gmem_to_smem(block.pieces.at[number], block.smem.pieces.at[lax.rem(i, 2), consumer], full)
    plgpu.copy_gmem_to_smem(block.q.at[pl.ds(row, WARPGROUP_ROWS), head], block.smem.q.at[consumer], full)


def _load_tile(
    block: Block, piece: Piece, kv_head: Array, pages: RequestPages, j: Array, carry: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Load the j-th tile; carry how many tiles went through the ring, and the page id that is read ahead."""
    plan, barriers, (use, ahead) = block.plan, block.barriers, carry
    slot = lax.rem(use, plan.stages)
    base = j * plan.tile
    following = pages.ahead(base + plan.tile, ahead)

    def wait_for(free: Ref) -> None:
        pl.when(use >= plan.stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))

    wait_for(barriers.k_free)
    load_tile(block.k_pages, pages.ids(ahead), base, kv_head, block.smem.k.at[slot], barriers.k_full.at[slot])
    wait_for(barriers.v_free)
    values = block.smem.v.at[slot]
    load_values = functools.partial(load_tile, block.v_pages, pages.ids(ahead), base, kv_head, values)
    unwritten = base + plan.tile > piece.unwritten_from(plan.page_size)

    @pl.when(jnp.logical_not(unwritten))
    def _() -> None:
        load_values(barriers.v_full.at[slot])

    @pl.when(unwritten)
    def _() -> None:
        load_values(barriers.v_copied)
        plgpu.barrier_wait(barriers.v_copied)
        zero_hidden_rows(values, base, piece.low, piece.length)
        for _arrival in range(copies_per_tile(plan.tile, plan.page_size)):
            plgpu.barrier_arrive(barriers.v_full.at[slot])

    return use + 1, following


def _load_raw(block: Block, kv_head: Array, page: Callable[[Array], Array], base: Array, tile: Array) -> None:
    assert block.smem.raw is not None
    pools = RawPools(block.k_pages, block.v_pages, *block.tokens)
    quantized_page_tiles.load_raw(pools, page, base, kv_head, block.smem.raw, tile, block.barriers.raw_full)


def _convert_tile(
    block: Block, piece: Piece, kv_head: Array, pages: RequestPages, last: Array, j: Array, carry: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Convert the j-th tile, which is on its way, and begin to copy the next, whose page is carried."""
    plan, barriers, raw, (use, ahead) = block.plan, block.barriers, block.smem.raw, carry
    assert raw is not None
    assert barriers.raw_full is not None
    slot, tile, base = lax.rem(use, plan.stages), lax.rem(j, 2), j * plan.tile

    @pl.when(j + 1 < last)
    def _next() -> None:
        _load_raw(block, kv_head, pages.ids(ahead), base + plan.tile, 1 - tile)

    following = pages.ahead(base + 2 * plan.tile, ahead)

    def wait_for(free: Ref) -> None:
        pl.when(use >= plan.stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))

    plgpu.barrier_wait(barriers.raw_full.at[tile])
    wait_for(barriers.k_free)
    quantized_page_tiles.convert(raw.k.at[tile], raw.k_tokens.at[tile], block.smem.k.at[slot])
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.k_full.at[slot])
    wait_for(barriers.v_free)
    values = block.smem.v.at[slot]
    quantized_page_tiles.convert(raw.v.at[tile], raw.v_tokens.at[tile], values)

    @pl.when(base + plan.tile > piece.unwritten_from(plan.page_size))
    def _zero() -> None:
        zero_hidden_rows(values, base, piece.low, piece.length)

    plgpu.commit_smem()  # also before the copies that overwrite what was read here
    plgpu.barrier_arrive(barriers.v_full.at[slot])
    return use + 1, following
