"""One thread block of the Hopper decode kernel; a piece of its work is one split of one key/value head.

A producer warpgroup copies tiles of keys and values into a ring in shared memory for two consumers, and continues with
the next piece while they still work on this one. The query heads of a key/value head are rows of one product.

The consumers share a split in one of two ways. Up to head_dim 128, each takes every other tile and has its own partial
sums. With head_dim 256, whose accumulator would not fit in the registers, both compute the scores of every tile and
each sums half of the columns.

A warpgroup that waits on a barrier must wait for all its phases, so the last use of each slot is waited for at the end.
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
from .work import ceil_div

# Per consumer's and per producer's thread: 504 of 512 in all. Who converts 8-bit tiles needs more.
_REGISTERS, _REGISTERS_TO_CONVERT = (232, 40), (208, 88)
_TILE = 64  # tokens
_STAGED = 32  # columns of a partial sum that are copied to global memory at a time


@dataclass(frozen=True)
class Plan:
    """The static parameters of a call."""

    kv_heads: int
    group: int  # query heads per key/value head
    head_dim: int
    page_size: int
    stages: int  # tiles in each ring
    blocks: int  # thread blocks
    softmax: Softmax
    interpret: bool  # whether the kernel runs in the interpreter on the CPU
    quantized: tuple[Any, Any] | None = None  # dtypes of keys and values of 8 bits; None: they are floats

    @property
    def rows(self) -> int:
        """Return the rows of q per key/value head, rounded up to whole tiles of shared memory."""
        return ceil_div(self.group, 8) * 8

    @property
    def stored(self) -> int:
        """Return the rows of partial sums per key/value head; four logarithms are 16 bytes, the least to copy."""
        return ceil_div(self.group, 4) * 4

    @property
    def halves(self) -> bool:
        """Return whether the consumers divide the columns of a tile between them, rather than the tiles of a split."""
        return self.head_dim > 128

    @property
    def rings(self) -> int:
        """Return the number of rings in shared memory, which is also that of partial sums per split."""
        return 1 if self.halves else CONSUMERS

    @property
    def columns(self) -> int:
        """Return the columns of one consumer's accumulator."""
        return self.head_dim // 2 if self.halves else self.head_dim


class Buffers(NamedTuple):
    """The buffers in shared memory."""

    q: Ref  # [2, 64, D], of this piece of work and the next
    k: Ref  # [slots, tile, D], the slots of a ring next to each other
    v: Ref  # [slots, tile, D]
    sums: Ref  # [consumers, 64, staged]
    logs: Ref  # [consumers, 64]
    weights: Ref | None  # [consumers, 64, tile], for the interpreter; None on a GPU
    raw: RawBuffers | None  # of 8-bit tiles


class Barriers(NamedTuple):
    """The barriers: a buffer or slot is full once the copy has arrived, and free once all its readers are done."""

    q_full: Ref
    q_free: Ref
    k_full: Ref
    v_full: Ref
    free: Ref
    raw_full: Ref | None


def scratch(plan: Plan, dtype: jax.typing.DTypeLike) -> tuple[Buffers, Barriers]:
    """Describe the shared memory and the barriers of a thread block."""
    slots, per_consumer = plan.rings * plan.stages, (CONSUMERS, WARPGROUP_ROWS)
    raw, raw_full = None, None
    if plan.quantized is not None:
        raw, raw_full = raw_tiles.scratch(_TILE, plan.head_dim, plan.quantized, plan.page_size)
    buffers = Buffers(
        q=smem((2, WARPGROUP_ROWS, plan.head_dim), dtype),
        k=smem((slots, _TILE, plan.head_dim), dtype),
        v=smem((slots, _TILE, plan.head_dim), dtype),
        sums=plgpu.SMEM((*per_consumer, _STAGED), jnp.float32),
        logs=plgpu.SMEM(per_consumer, jnp.float32),
        weights=smem((*per_consumer, _TILE), dtype) if plan.interpret else None,
        raw=raw,
    )
    copies = 1 if plan.quantized else copies_per_tile(_TILE, plan.page_size)
    barriers = Barriers(
        q_full=plgpu.Barrier(num_barriers=2),
        q_free=plgpu.Barrier(num_barriers=2, num_arrivals=CONSUMERS),
        k_full=plgpu.Barrier(num_barriers=slots, num_arrivals=copies),
        v_full=plgpu.Barrier(num_barriers=slots, num_arrivals=copies),
        free=plgpu.Barrier(num_barriers=slots, num_arrivals=CONSUMERS if plan.halves else 1),
        raw_full=raw_full,
    )
    return buffers, barriers


class _Item(NamedTuple):
    """One piece of work: one key/value head of one split of one request."""

    split: Array
    head: Array
    request: Array
    begin: Array  # the first visible token
    end: Array  # the token after the last visible one

    @property
    def base(self) -> Array:
        return lax.div(self.begin, _TILE) * _TILE

    @property
    def tiles(self) -> Array:
        return lax.div(self.end + (_TILE - 1), _TILE) - lax.div(self.begin, _TILE)

    def share(self, ring: Array | int, rings: int) -> Array:
        """Count the tiles that go through a ring."""
        return lax.div(self.tiles - ring + (rings - 1), rings)


@dataclass(frozen=True)
class _Block:
    """The arguments, the shared memory, and the block's place in the list of work."""

    plan: Plan
    q: Ref  # [R, Hk, rows, D]
    k_pages: Ref  # [N, P, Hk, D]
    v_pages: Ref
    page_table: Ref  # [R, max_pages]
    first_page: Ref  # [1]
    items: Ref  # [U, 3]
    tokens: tuple[Ref, ...]  # the scales of keys' and values' tokens, [N, Hk, P] each, if they have 8 bits
    sums: Ref  # [U, rings, Hk, stored, D], written
    logs: Ref  # [U, rings, Hk, stored], written
    smem: Buffers
    barriers: Barriers
    number: Array  # of the block
    total: Array  # pieces of work of all blocks

    @property
    def mine(self) -> Array:
        """Return the number of pieces of work of this block."""
        return lax.div(self.total - self.number + (self.plan.blocks - 1), self.plan.blocks)

    def item(self, i: Array) -> _Item:
        """Return the block's i-th piece; past the end, the last of all pieces."""
        index = jnp.minimum(self.number + i * self.plan.blocks, self.total - 1)
        split = lax.div(index, self.plan.kv_heads)
        request, begin, end = (self.items[split, column] for column in range(3))
        return _Item(split, lax.rem(index, self.plan.kv_heads), request, begin, end)

    def slot(self, ring: Array | int, use: Array) -> Array:
        """Find the slot of the `use`-th tile that goes through a ring."""
        return ring * self.plan.stages + lax.rem(use, self.plan.stages)


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
    block = _Block(
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
        pl.when(block.mine > 0)(functools.partial(_produce, block))

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(registers[0], action="increase")
        pl.when(block.mine > 0)(functools.partial(_consume, block, warpgroup))


def _produce(block: _Block) -> None:
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
    block: _Block, first_page: Array, i: Array, carry: tuple[_Item, tuple[Array, ...]]
) -> tuple[_Item, tuple[Array, ...]]:
    """Load the i-th piece; carry the piece, and how many tiles went through each ring before it."""
    plan, (item, used) = block.plan, carry
    following = block.item(i + 1)  # read early, because the read takes as long as a tile
    buffer = lax.rem(i, 2)

    @pl.when(i >= 2)
    def _wait_for_buffer() -> None:
        plgpu.barrier_wait(block.barriers.q_free.at[buffer])

    rows = block.smem.q.at[buffer, pl.ds(0, plan.rows)]
    plgpu.copy_gmem_to_smem(block.q.at[item.request, item.head], rows, block.barriers.q_full.at[buffer])
    pages = Pages(block.page_table, first_page, item.request, item.begin, item.end, plan.page_size, _TILE)
    if plan.quantized is None:
        tile = functools.partial(_load_tile, block, item, used, pages)
        lax.fori_loop(0, item.tiles, tile, pages.ahead(item.base))
    else:
        _load_raw(block, item, pages.ids(pages.ahead(item.base)), item.base, jnp.int32(0))
        tile = functools.partial(_convert_tile, block, item, used, pages)
        lax.fori_loop(0, item.tiles, tile, pages.ahead(item.base + _TILE))
    return following, tuple(n + item.share(ring, plan.rings) for ring, n in enumerate(used))


def _load_tile(
    block: _Block, item: _Item, used: tuple[Array, ...], pages: Pages, j: Array, ahead: Array
) -> Array:  # fmt: skip
    plan, barriers = block.plan, block.barriers
    ring = lax.rem(j, plan.rings)
    use = lax.div(j, plan.rings) + (used[0] if plan.rings == 1 else jnp.where(ring == 0, used[0], used[1]))
    at = block.slot(ring, use)
    base = item.base + j * _TILE
    following = pages.ahead(base + _TILE, ahead)

    @pl.when(use >= plan.stages)
    def _wait_for_slot() -> None:
        plgpu.barrier_wait(barriers.free.at[at])

    load_tile(block.k_pages, pages.ids(ahead), base, item.head, block.smem.k.at[at], barriers.k_full.at[at])
    load_tile(block.v_pages, pages.ids(ahead), base, item.head, block.smem.v.at[at], barriers.v_full.at[at])
    return following


def _load_raw(
    block: _Block, item: _Item, page: Callable[[Array], Array], base: Array, tile: Array
) -> None:  # fmt: skip
    assert block.smem.raw is not None
    pools = RawPools(block.k_pages, block.v_pages, *block.tokens)
    raw_tiles.load_raw(pools, page, base, item.head, block.smem.raw, tile, block.barriers.raw_full)


def _convert_tile(
    block: _Block, item: _Item, used: tuple[Array, ...], pages: Pages, j: Array, ahead: Array
) -> Array:  # fmt: skip
    """Convert the j-th tile, which is on its way, and begin to copy the next, whose page `ahead` is carried."""
    plan, barriers, raw = block.plan, block.barriers, block.smem.raw
    assert raw is not None
    assert barriers.raw_full is not None
    ring, base, tile = lax.rem(j, plan.rings), item.base + j * _TILE, lax.rem(j, 2)
    use = lax.div(j, plan.rings) + (used[0] if plan.rings == 1 else jnp.where(ring == 0, used[0], used[1]))
    at = block.slot(ring, use)

    @pl.when(j + 1 < item.tiles)
    def _next() -> None:
        _load_raw(block, item, pages.ids(ahead), base + _TILE, 1 - tile)

    following = pages.ahead(base + 2 * _TILE, ahead)

    @pl.when(use >= plan.stages)
    def _wait_for_slot() -> None:
        plgpu.barrier_wait(barriers.free.at[at])

    plgpu.barrier_wait(barriers.raw_full.at[tile])
    raw_tiles.convert(raw.k.at[tile], raw.k_tokens.at[tile], block.smem.k.at[at])
    plgpu.commit_smem()
    plgpu.barrier_arrive(barriers.k_full.at[at])
    raw_tiles.convert(raw.v.at[tile], raw.v_tokens.at[tile], block.smem.v.at[at])
    plgpu.commit_smem()  # also before the copies that overwrite what was read here
    plgpu.barrier_arrive(barriers.v_full.at[at])
    return following


def _consume(block: _Block, warpgroup: Array) -> None:
    init = (block.item(jnp.int32(0)), jnp.int32(0))
    lax.fori_loop(0, block.mine, functools.partial(_sum_item, block, warpgroup), init)
    plgpu.wait_smem_to_gmem(0)


def _sum_item(block: _Block, warpgroup: Array, i: Array, carry: tuple[_Item, Array]) -> tuple[_Item, Array]:
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
    block: _Block,
    warpgroup: Array,
    item: _Item,
    buffer: Array,
    used: Array,
    j: Array,
    state: tuple[Array, Array, Array],  # acc [64, columns], peak [64], total [64]
) -> tuple[Array, Array, Array]:
    plan, barriers, (acc, peak, total) = block.plan, block.barriers, state
    ring = 0 if plan.halves else warpgroup
    at = block.slot(ring, used + j)
    base = item.base + (j * plan.rings + ring) * _TILE
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

    @pl.when((base < item.begin) | (base + _TILE > item.end))
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
    block: _Block,
    warpgroup: Array,
    item: _Item,
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
    for column in range(0, plan.columns, _STAGED):
        if column:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem.sums[warpgroup] = acc[:, column : column + _STAGED]
        plgpu.commit_smem()
        first = column + (warpgroup * plan.columns if plan.halves else 0)
        target = block.sums.at[item.split, ring, item.head, :, pl.ds(first, _STAGED)]
        plgpu.copy_smem_to_gmem(smem.sums.at[warpgroup, rows], target)

    def write_logs() -> None:
        plgpu.copy_smem_to_gmem(smem.logs.at[warpgroup, rows], block.logs.at[item.split, ring, item.head])

    if plan.halves:
        pl.when(warpgroup == 0)(write_logs)
    else:
        write_logs()
