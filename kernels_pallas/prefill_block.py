"""One thread block of the Hopper prefill kernel; a piece of its work is 128 rows of one query head.

A producer warpgroup copies tiles of keys and values into a ring in shared memory, for two consumers of 64 rows each,
which take turns: while one multiplies, the other computes exponentials.

Tiles that causality or the window excludes are not loaded, and only tiles at the edges are masked. The producer zeroes
values past the end of a request: they may be NaN, and both consumers read them.

A warpgroup that waits on a barrier must wait for all its phases, so the last use of each slot is waited for at the end.
A turn begins and ends within a piece, the same number of times in both consumers; otherwise they would deadlock.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic import CONSUMERS, LOWEST, PRODUCER, WARPGROUP_ROWS, Ref, accumulate, full, iota, per_row, product
from .prefill_plan import ROWS, Block, Plan
from .prefill_producer import produce
from .work import Piece

_State = tuple[Array, Array, Array]  # acc [64, D], peak [64], total [64]


def prefill_block(
    plan: Plan,
    q: Ref,
    k_pages: Ref,
    v_pages: Ref,
    page_table: Ref,
    first_page: Ref,
    pieces: Ref,
    count: Ref,
    sinks: Ref,
    *others: Any,
) -> None:
    """Run the kernel in one thread block; `count` [1] is the number of rows of `pieces` that are used.

    The other arguments are the tokens' scales of 8-bit keys and values, then the result, buffers and barriers.
    """
    *tokens, out, buffers, barriers = others
    number, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    total = count[0] * plan.query_heads
    block = Block(
        plan=plan,
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=page_table,
        first_page=first_page,
        pieces=pieces,
        sinks=sinks,
        tokens=tuple(tokens),
        out=out,
        smem=buffers,
        barriers=barriers,
        number=number,
        total=total,
    )
    mine = block.mine

    @pl.when((warpgroup == PRODUCER) & (mine > 0))
    def _() -> None:
        plgpu.set_max_registers(plan.registers[1], action="decrease")
        produce(block, mine)

    @pl.when((warpgroup < CONSUMERS) & (mine > 0))
    def _() -> None:
        plgpu.set_max_registers(plan.registers[0], action="increase")
        lax.fori_loop(0, mine, functools.partial(_attend_piece, block, warpgroup), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _attend_piece(block: Block, warpgroup: Array, i: Array, used: Array) -> Array:
    """Compute one consumer's rows of the block's i-th piece; carry how many tiles the consumer has read."""
    plan, barriers = block.plan, block.barriers
    plgpu.barrier_wait(barriers.q_full.at[warpgroup])
    described = block.smem.pieces.at[lax.rem(i, 2), warpgroup]
    piece = Piece.read(described)
    first, last = piece.tiles(plan.tile)
    clean_from, clean_to = piece.clean(plan.tile, plan.window, ROWS)
    pl.when(warpgroup == 1)(block.take_turn)
    position = piece.position + warpgroup * WARPGROUP_ROWS
    tile = functools.partial(_attend_tile, block, warpgroup, position, used - first)
    state = (
        full((WARPGROUP_ROWS, plan.head_dim), 0.0),
        full((WARPGROUP_ROWS,), LOWEST),
        full((WARPGROUP_ROWS,), 0.0),
    )
    if plan.window is not None:
        state = lax.fori_loop(first, clean_from, functools.partial(tile, True), state)
    state = lax.fori_loop(clean_from, clean_to, functools.partial(tile, False), state)
    state = lax.fori_loop(clean_to, last, functools.partial(tile, True), state)
    plgpu.commit_smem()  # orders this thread's reads of the description before the copy that overwrites it
    plgpu.barrier_arrive(barriers.q_free.at[warpgroup])
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive(barriers.turn))
    _, head = block.place(i)
    _write(block, described, warpgroup, _result(block, head, state), head)
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(barriers.turn))
    return used + (last - first)


def _attend_tile(
    block: Block,
    warpgroup: Array,
    position: Array,  # of the consumer's first row
    use: Array,  # number of tile 0 among the tiles of the ring
    masked: bool,
    j: Array,
    state: _State,
) -> _State:
    plan, barriers, smem, (acc, peak, total) = block.plan, block.barriers, block.smem, state
    slot = lax.rem(use + j, plan.stages)
    plgpu.barrier_wait(barriers.k_full.at[slot])
    scores = product(smem.q.at[warpgroup], smem.k.at[slot], after_issue=block.take_turn)
    plgpu.barrier_arrive(barriers.k_free.at[slot])
    scores = plan.softmax.prepared(scores)
    if masked:
        scores = jnp.where(_visible(plan, scores.shape, j * plan.tile - position), scores, -jnp.inf)
    peak, rescale, weights = plan.softmax.online(peak, scores)
    acc = acc * per_row(rescale, acc.shape)
    total = total * rescale + weights.sum(axis=1)
    narrow = weights.astype(smem.v.dtype)
    # The compiler may not move any of this past the end of the turn.
    acc, peak, total, narrow = lax.optimization_barrier((acc, peak, total, narrow))
    plgpu.barrier_arrive(barriers.turn)
    plgpu.barrier_wait(barriers.v_full.at[slot])
    plgpu.barrier_wait(barriers.turn)
    staging = None if smem.weights is None else smem.weights.at[warpgroup]
    acc = accumulate(acc, narrow, smem.v.at[slot], staging)
    plgpu.barrier_arrive(barriers.v_free.at[slot])
    return acc, peak, total


def _visible(plan: Plan, shape: tuple[int, ...], ahead: Array) -> Array:
    """Mark the tokens of a tile [M, N] that the rows attend to.

    `ahead` is the position of the tile's first token minus that of the first row.
    """
    own = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=plgpu.Layout.WGMMA.reduce(1)) - ahead
    token = iota(shape, 1)
    visible = token <= per_row(own, shape)
    return visible if plan.window is None else visible & (token > per_row(own - plan.window, shape))


def _result(block: Block, head: Array, state: _State) -> Array:
    """Divide a consumer's sums by their totals, [64, D]; rows without visible tokens are zeros."""
    acc, peak, total = state
    if block.plan.has_sink:
        sink = block.sinks[head]
        risen = jnp.maximum(peak, sink)
        rescale = jnp.exp2(peak - risen)
        acc, total = acc * per_row(rescale, acc.shape), total * rescale + jnp.exp2(sink - risen)
    return acc * per_row(1.0 / jnp.maximum(total, jnp.float32(1e-30)), acc.shape)


def _write(block: Block, described: Ref, warpgroup: Array, acc: Array, head: Array) -> None:
    """Write a consumer's own rows of `out`, by copies of powers of two rows, as a copy's size is static."""
    plan, staged = block.plan, block.smem.out.at[warpgroup]
    offset = warpgroup * WARPGROUP_ROWS
    for column in range(0, plan.head_dim, plan.staged):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staged[...] = acc[:, column : column + plan.staged].astype(staged.dtype)
        plgpu.commit_smem()
        piece = Piece.read(described)  # read again, because `acc` leaves few registers
        begin = jnp.clip(piece.skip - offset, 0, WARPGROUP_ROWS)
        count = jnp.clip(piece.skip + piece.own - offset, 0, WARPGROUP_ROWS) - begin
        for power in reversed(range(WARPGROUP_ROWS.bit_length())):
            size = 1 << power
            done = begin + (count >> (power + 1) << (power + 1))
            target = block.out.at[pl.ds(piece.row + offset + done, size), head, pl.ds(column, plan.staged)]
            copy = functools.partial(plgpu.copy_smem_to_gmem, staged.at[pl.ds(done, size)], target)
            pl.when((count & size) != 0)(copy)
