"""One thread block of the Hopper prefill kernel; a piece of its work is 128 rows of one query head.

A producer warpgroup copies tiles of keys and values into a ring in shared memory, for two consumers of 64 rows each,
which take turns: while one multiplies, the other computes exponentials.

Tiles that causality or the window excludes are not loaded, and only tiles at the edges are masked. The producer zeroes
values past the end of a request: they may be NaN, and both consumers read them.

A warpgroup that waits on a barrier must wait for all its phases, so the last use of each slot is waited for at the end.
A turn begins and ends within a piece, the same number of times in both consumers; otherwise they would deadlock.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import raw_tiles
from .mosaic import (
    CONSUMERS,
    LOWEST,
    PRODUCER,
    WARPGROUP_ROWS,
    Pages,
    Ref,
    Softmax,
    accumulate,
    copies_per_tile,
    full,
    iota,
    load_tile,
    per_row,
    product,
    smem,
    zero_hidden_rows,
)
from .raw_tiles import RawBuffers, RawPools
from .work import Piece

ROWS = CONSUMERS * WARPGROUP_ROWS  # of a piece of work
DESCRIPTION = 32  # integers of a piece: 128 bytes, because tensor copies begin at multiples of that in shared memory

_State = tuple[Array, Array, Array]  # acc [64, D], peak [64], total [64]


@dataclass(frozen=True)
class Plan:
    """The static parameters of a call."""

    query_heads: int
    group: int  # query heads per key/value head
    head_dim: int
    page_size: int
    tile: int  # tokens of a tile
    stages: int  # tiles in the ring
    blocks: int  # thread blocks
    window: int | None
    has_sink: bool
    softmax: Softmax
    interpret: bool  # whether the kernel runs in the interpreter on the CPU
    quantized: tuple[Any, Any] | None = None  # dtypes of keys and values of 8 bits; None: they are floats

    @property
    def registers(self) -> tuple[int, int]:
        """Return registers per consumer's and per producer's thread, 504 of 512 in all; the producer's do not spill."""
        if self.quantized is not None:
            return (208, 88)
        return (224, 56) if self.head_dim == 64 else (232, 40)

    @property
    def staged(self) -> int:
        """Return how many columns of a result are copied to global memory at a time."""
        return 64 if self.head_dim > 128 else self.head_dim


class Buffers(NamedTuple):
    """The buffers in shared memory."""

    q: Ref  # [consumers, 64, D]
    k: Ref  # [stages, tile, D]
    v: Ref  # [stages, tile, D]
    out: Ref  # [consumers, 64, staged]
    weights: Ref | None  # [consumers, 64, tile], for the interpreter; None on a GPU
    pieces: Ref  # [2, consumers, DESCRIPTION], of this piece of work and the next
    raw: RawBuffers | None  # of 8-bit tiles


class Barriers(NamedTuple):
    """The barriers: a buffer or slot is full once the copy has arrived, and free once all its readers are done."""

    q_full: Ref
    q_free: Ref
    k_full: Ref
    k_free: Ref
    v_copied: Ref  # for the producer, before it zeroes values that it has copied
    v_full: Ref
    v_free: Ref
    turn: Ref
    raw_full: Ref | None


def scratch(plan: Plan, dtype: jax.typing.DTypeLike) -> tuple[Buffers, Barriers]:
    """Describe the shared memory and the barriers of a thread block."""
    stages, per_consumer = plan.stages, (CONSUMERS, WARPGROUP_ROWS)
    raw, raw_full = None, None
    if plan.quantized is not None:
        raw, raw_full = raw_tiles.scratch(plan.tile, plan.head_dim, plan.quantized, plan.page_size)
    buffers = Buffers(
        q=smem((*per_consumer, plan.head_dim), dtype),
        k=smem((stages, plan.tile, plan.head_dim), dtype),
        v=smem((stages, plan.tile, plan.head_dim), dtype),
        out=plgpu.SMEM((*per_consumer, plan.staged), dtype),
        weights=smem((*per_consumer, plan.tile), dtype) if plan.interpret else None,
        pieces=plgpu.SMEM((2, CONSUMERS, DESCRIPTION), jnp.int32),
        raw=raw,
    )
    copies = 1 if plan.quantized else copies_per_tile(plan.tile, plan.page_size)
    barriers = Barriers(
        q_full=plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
        q_free=plgpu.Barrier(num_barriers=CONSUMERS),
        k_full=plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        k_free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        v_copied=plgpu.Barrier(num_arrivals=copies),
        v_full=plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        v_free=plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        turn=plgpu.Barrier(num_arrivals=CONSUMERS),
        raw_full=raw_full,
    )
    return buffers, barriers


@dataclass(frozen=True)
class _Block:
    """The arguments, the shared memory, and the block's place in the list of work."""

    plan: Plan
    q: Ref  # [T, Hq, D]
    k_pages: Ref  # [N, P, Hk, D]
    v_pages: Ref
    page_table: Ref  # [R, max_pages]
    first_page: Ref  # [1]
    pieces: Ref  # [U, DESCRIPTION]
    sinks: Ref  # [Hq]
    tokens: tuple[Ref, ...]  # the scales of keys' and values' tokens, [N, Hk, P] each, if they have 8 bits
    out: Ref  # [T, Hq, D], written
    smem: Buffers
    barriers: Barriers
    number: Array  # of the block
    total: Array  # pieces of work of all blocks

    @property
    def mine(self) -> Array:
        """Return the number of pieces of work of this block."""
        rounds = lax.div(self.total + (self.plan.blocks - 1), self.plan.blocks)
        return jnp.maximum(rounds - jnp.where(self._at(rounds - 1) < self.total, 0, 1), 0)

    def place(self, i: Array) -> tuple[Array, Array]:
        """Find the row of `pieces` and the query head of the block's i-th piece."""
        at = self._at(i)
        return lax.div(at, self.plan.query_heads), lax.rem(at, self.plan.query_heads)

    def _at(self, i: Array) -> Array:
        """Number the block's i-th piece among all pieces; odd rounds go over the blocks in reverse."""
        forth = lax.rem(i, 2) == 0
        return i * self.plan.blocks + jnp.where(forth, self.number, self.plan.blocks - 1 - self.number)

    def take_turn(self) -> None:
        """Wait until the other consumer reaches the same point."""
        plgpu.barrier_arrive(self.barriers.turn)
        plgpu.barrier_wait(self.barriers.turn)


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
    block = _Block(
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
        _produce(block, mine)

    @pl.when((warpgroup < CONSUMERS) & (mine > 0))
    def _() -> None:
        plgpu.set_max_registers(plan.registers[0], action="increase")
        lax.fori_loop(0, mine, functools.partial(_attend_piece, block, warpgroup), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _produce(block: _Block, mine: Array) -> None:
    barriers = block.barriers
    load = functools.partial(_load_piece, block, block.first_page[0])
    used = lax.fori_loop(0, mine, load, jnp.int32(0))
    for consumer in range(CONSUMERS):
        plgpu.barrier_wait(barriers.q_free.at[consumer])

    @pl.loop(0, jnp.minimum(used, block.plan.stages))
    def _(slot: Array) -> None:
        plgpu.barrier_wait(barriers.k_free.at[slot])
        plgpu.barrier_wait(barriers.v_free.at[slot])


def _load_piece(block: _Block, first_page: Array, i: Array, used: Array) -> Array:
    """Load the block's i-th piece; carry how many tiles went through the ring."""
    plan = block.plan
    number, head = block.place(i)
    piece = Piece.read(block.pieces.at[number])
    for consumer in range(CONSUMERS):
        _load_rows(block, consumer, i, number, head, piece)
    pages = Pages(block.page_table, first_page, piece.request, piece.low, piece.high, plan.page_size, plan.tile)
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


def _load_rows(block: _Block, consumer: int, i: Array, number: Array, head: Array, piece: Piece) -> None:
    """Load a consumer's rows of q, and the piece's description."""

    @pl.when(i > 0)
    def _wait_for_rows() -> None:
        plgpu.barrier_wait(block.barriers.q_free.at[consumer])

    row = pl.multiple_of(piece.row + consumer * WARPGROUP_ROWS, 8)
    full = block.barriers.q_full.at[consumer]
    plgpu.copy_gmem_to_smem(block.pieces.at[number], block.smem.pieces.at[lax.rem(i, 2), consumer], full)
    plgpu.copy_gmem_to_smem(block.q.at[pl.ds(row, WARPGROUP_ROWS), head], block.smem.q.at[consumer], full)


def _load_tile(
    block: _Block, piece: Piece, kv_head: Array, pages: Pages, j: Array, carry: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Load the j-th tile; carry how many tiles went through the ring, and the page id that `Pages` reads ahead."""
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


def _load_raw(block: _Block, kv_head: Array, page: Callable[[Array], Array], base: Array, tile: Array) -> None:
    assert block.smem.raw is not None
    pools = RawPools(block.k_pages, block.v_pages, *block.tokens)
    raw_tiles.load_raw(pools, page, base, kv_head, block.smem.raw, tile, block.barriers.raw_full)


def _convert_tile(
    block: _Block, piece: Piece, kv_head: Array, pages: Pages, last: Array, j: Array, carry: tuple[Array, Array]
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
    raw_tiles.convert(raw.k.at[tile], raw.k_tokens.at[tile], block.smem.k.at[slot])
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.k_full.at[slot])
    wait_for(barriers.v_free)
    values = block.smem.v.at[slot]
    raw_tiles.convert(raw.v.at[tile], raw.v_tokens.at[tile], values)

    @pl.when(base + plan.tile > piece.unwritten_from(plan.page_size))
    def _zero() -> None:
        zero_hidden_rows(values, base, piece.low, piece.length)

    plgpu.commit_smem()  # also before the copies that overwrite what was read here
    plgpu.barrier_arrive(barriers.v_full.at[slot])
    return use + 1, following


def _attend_piece(block: _Block, warpgroup: Array, i: Array, used: Array) -> Array:
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
    block: _Block,
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


def _result(block: _Block, head: Array, state: _State) -> Array:
    """Divide a consumer's sums by their totals, [64, D]; rows without visible tokens are zeros."""
    acc, peak, total = state
    if block.plan.has_sink:
        sink = block.sinks[head]
        risen = jnp.maximum(peak, sink)
        rescale = jnp.exp2(peak - risen)
        acc, total = acc * per_row(rescale, acc.shape), total * rescale + jnp.exp2(sink - risen)
    return acc * per_row(1.0 / jnp.maximum(total, jnp.float32(1e-30)), acc.shape)


def _write(block: _Block, described: Ref, warpgroup: Array, acc: Array, head: Array) -> None:
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
