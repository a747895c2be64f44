"""One thread block of the Hopper decode kernel; a piece of its work is one split of one key/value head.

A producer warpgroup copies tiles of keys and values into a ring in shared memory for two consumers, and continues with
the next piece while they still work on this one. The query heads of a key/value head are rows of one product.

The consumers share a split in one of two ways. Up to head_dim 128, each takes every other tile and has its own partial
sums. With head_dim 256, whose accumulator would not fit in the registers, both compute the scores of every tile and
each sums half of the columns.

A warpgroup that waits on a barrier must wait for all its phases, so the last use of each slot is waited for at the end.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .decode_plan import STAGED, TILE, Block, Item, Plan
from .decode_producer import produce
from .mosaic import (
    CONSUMERS,
    LOWEST,
    PRODUCER,
    WARPGROUP_ROWS,
    Ref,
    accumulate,
    full,
    iota,
    per_row,
    product,
    zero_hidden_rows,
)

# Per consumer's and per producer's thread: 504 of 512 in all. Who converts 8-bit tiles needs more.
_REGISTERS, _REGISTERS_TO_CONVERT = (232, 40), (208, 88)


def decode_block(
    plan: Plan,
    q: Ref,
    k_pages: Ref,
    v_pages: Ref,
    page_table: Ref,
    first_page: Ref,
    items: Ref,
    start: Ref,
    *others: Any,
) -> None:
    """Run the kernel in one thread block; `start` [R + 1] is that of `Splits`, whose last entry counts the splits.

    The other arguments are the tokens' scales of 8-bit keys and values, then sums, logs, buffers and barriers.
    """
    *tokens, sums, logs, buffers, barriers = others
    number, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    registers = _REGISTERS if plan.quantized is None else _REGISTERS_TO_CONVERT
    total = start[start.shape[0] - 1] * plan.kv_heads
    block = Block(
        plan=plan,
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=page_table,
        first_page=first_page,
        items=items,
        tokens=tuple(tokens),
        sums=sums,
        logs=logs,
        smem=buffers,
        barriers=barriers,
        number=number,
        total=total,
    )

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(registers[1], action="decrease")
        pl.when(block.mine > 0)(functools.partial(produce, block))

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(registers[0], action="increase")
        pl.when(block.mine > 0)(functools.partial(_consume, block, warpgroup))


def _consume(block: Block, warpgroup: Array) -> None:
    init = (block.item(jnp.int32(0)), jnp.int32(0))
    lax.fori_loop(0, block.mine, functools.partial(_sum_item, block, warpgroup), init)
    plgpu.wait_smem_to_gmem(0)


def _sum_item(block: Block, warpgroup: Array, i: Array, carry: tuple[Item, Array]) -> tuple[Item, Array]:
    """Sum the i-th piece; carry the piece, and how many tiles of its ring this consumer read before it."""
    plan, (item, used) = block.plan, carry
    following = block.item(i + 1)
    buffer = lax.rem(i, 2)
    tiles = item.share(0 if plan.halves else warpgroup, plan.rings)
    plgpu.barrier_wait(block.barriers.q_full.at[buffer])
    state = (
        full((WARPGROUP_ROWS, plan.columns), 0.0),
        full((WARPGROUP_ROWS,), LOWEST),
        full((WARPGROUP_ROWS,), 0.0),
    )
    tile = functools.partial(_sum_tile, block, warpgroup, item, buffer, used)
    acc, peak, total = lax.fori_loop(0, tiles, tile, state)
    plgpu.barrier_arrive(block.barriers.q_free.at[buffer])
    _write(block, warpgroup, item, acc, peak, total)
    return following, used + tiles


def _sum_tile(
    block: Block,
    warpgroup: Array,
    item: Item,
    buffer: Array,
    used: Array,
    j: Array,
    state: tuple[Array, Array, Array],  # acc [64, columns], peak [64], total [64]
) -> tuple[Array, Array, Array]:
    plan, barriers, (acc, peak, total) = block.plan, block.barriers, state
    ring = 0 if plan.halves else warpgroup
    at = block.slot(ring, used + j)
    base = item.base + (j * plan.rings + ring) * TILE
    plgpu.barrier_wait(barriers.k_full.at[at])
    scores = product(block.smem.q.at[buffer], block.smem.k.at[at])
    token = iota(scores.shape, 1) + base
    visible = (token >= item.begin) & (token < item.end)
    scores = jnp.where(visible, plan.softmax.prepared(scores), -jnp.inf)
    peak, rescale, weights = plan.softmax.online(peak, scores)
    total = total * rescale + weights.sum(axis=1)
    acc = acc * per_row(rescale, acc.shape)
    plgpu.barrier_wait(barriers.v_full.at[at])
    values = _own_columns(plan, block.smem.v.at[at], warpgroup)

    @pl.when((base < item.begin) | (base + TILE > item.end))
    def _() -> None:
        zero_hidden_rows(values, base, item.begin, item.end)

    staging = None if block.smem.weights is None else block.smem.weights.at[warpgroup]
    acc = accumulate(acc, weights.astype(values.dtype), values, staging)
    plgpu.barrier_arrive(barriers.free.at[at])
    return acc, peak, total


def _own_columns(plan: Plan, tile: Ref, warpgroup: Array) -> Ref:
    """Return the columns of a tile [64, D] that a consumer sums."""
    return tile.at[:, pl.ds(warpgroup * plan.columns, plan.columns)] if plan.halves else tile


def _write(
    block: Block,
    warpgroup: Array,
    item: Item,
    acc: Array,  # [64, columns]
    peak: Array,  # [64]
    total: Array,  # [64]
) -> None:
    """Write one consumer's partial sums; a consumer without tiles writes zeros, with weight 0."""
    plan, smem = block.plan, block.smem
    ring = jnp.int32(0) if plan.halves else warpgroup
    divisor = jnp.maximum(total, jnp.float32(1e-30))
    acc = acc * per_row(1.0 / divisor, acc.shape)
    rows = pl.ds(0, plan.stored)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem.logs[warpgroup] = peak + jnp.log2(divisor)
    for column in range(0, plan.columns, STAGED):
        if column:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.sums[warpgroup] = acc[:, column : column + STAGED]
        plgpu.commit_smem()
        first = column + (warpgroup * plan.columns if plan.halves else 0)
        target = block.sums.at[item.split, ring, item.head, :, pl.ds(first, STAGED)]
        plgpu.copy_smem_to_gmem(smem.sums.at[warpgroup, rows], target)

    def write_logs() -> None:
        plgpu.copy_smem_to_gmem(smem.logs.at[warpgroup, rows], block.logs.at[item.split, ring, item.head])

    if plan.halves:
        pl.when(warpgroup == 0)(write_logs)
    else:
        write_logs()
