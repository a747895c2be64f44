"""Paged decode attention for Hopper: split-KV in Mosaic GPU, then the splits of a request combined.

A request's tokens are cut at absolute multiples of a fixed split size. The list of all (split, key/value head) pairs is
dealt out to as many thread blocks as the GPU has multiprocessors, so that a long request costs what it holds and an
empty slot nothing. A block is a producer warpgroup, which copies tiles of keys and values into a ring in shared memory,
also ahead into its next piece of work, and two consumers. The query heads of a key/value head are rows of one product.

The consumers share a split in one of two ways. Up to 128 columns each takes every other tile and has its own partial
sums. With 256 columns, whose accumulator would not fit the registers beside the rest, both score every tile and sum a
half of the columns each.

Partial sums are float32, divided by their total, with the base-2 logarithm of that total and peak beside them.
Not here: checks that hold for every implementation (`__init__.py`), the choice of tiles (`tiles.py`).
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .combine import combine_splits
from .mosaic import (
    LOWEST,
    WARPGROUP_ROWS,
    Ref,
    Softmax,
    accumulate,
    compiler_params,
    copies_per_tile,
    full,
    iota,
    load_tile,
    per_row,
    product,
    refuse,
    smem,
    tile_page,
    zero_hidden_rows,
)
from .tiles import DecodeTiles
from .work import Splits, split_work

_CONSUMERS = 2
_PRODUCER = 2  # its warpgroup
_TILE = 64  # tokens
_STAGED = 32  # columns of a partial sum on its way out


@dataclass(frozen=True)
class _Plan:
    """What is static about a call."""

    kv_heads: int
    rows: int  # query heads of a key/value head, padded to a multiple of 8
    head_dim: int
    page_size: int
    stages: int
    blocks: int
    softmax: Softmax
    interpret: bool

    @property
    def halves(self) -> bool:
        """Whether the consumers share the columns of a tile, rather than the tiles of a split."""
        return self.head_dim > 128

    @property
    def rings(self) -> int:
        return 1 if self.halves else _CONSUMERS

    @property
    def columns(self) -> int:
        """Of one consumer's accumulator."""
        return self.head_dim // 2 if self.halves else self.head_dim


class _Item(NamedTuple):
    """One split of one request: its visible tokens are begin to end - 1."""

    split: Array
    head: Array
    request: Array
    begin: Array
    end: Array

    @property
    def base(self) -> Array:
        return lax.div(self.begin, _TILE) * _TILE

    @property
    def tiles(self) -> Array:
        return lax.div(self.end + (_TILE - 1), _TILE) - lax.div(self.begin, _TILE)


# Jitted, so that the layers of a model share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap", "tiles", "cores", "interpret"))
def paged_decode_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_len: Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Array | None,
    tiles: DecodeTiles,
    cores: int,
    interpret: Any = None,
) -> Array:
    """See `kernels_pallas.paged_decode_attention`.

    Args:
        tiles: split size and depth of the ring.
        cores: multiprocessors of the GPU, one thread block each.
        interpret: `plgpu.InterpretGPUParams()` to run on the CPU.

    Raises:
        ValueError: a dtype, head_dim, page size or number of heads that the kernel does not take; the message names it.
    """
    refuse(q, k_pages)
    requests, query_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = query_heads // kv_heads
    rows = -(-group // 8) * 8
    plan = _Plan(
        kv_heads, rows, head_dim, page_size, tiles.stages, cores, Softmax(scale, softcap), interpret is not None
    )  # fmt: skip
    with jax.named_scope("paged_decode_attention"):
        work = split_work(kv_len, window, tiles.split, page_table.shape[1] * page_size)
        padded = jnp.pad(q.reshape(requests, kv_heads, group, head_dim), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
        sums, logs = _attend(plan, padded, k_pages, v_pages, page_table, work, interpret)
        return combine_splits(sums, logs, work.start, sink, group, q.dtype, interpret)


def _attend(
    plan: _Plan,
    q: Array,  # [R, Hk, rows, D]
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    work: Splits,
    interpret: Any,
) -> tuple[Array, Array]:
    """Partial sums [U, rings, Hk, rows, D] and their logarithms [U, rings, Hk, rows], U splits at most."""
    dtype, head_dim, slots = q.dtype, plan.head_dim, plan.rings * plan.stages
    arrivals = copies_per_tile(_TILE, plan.page_size)
    shape = (work.items.shape[0], plan.rings, plan.kv_heads, plan.rows)
    scratch = dict(
        q_smem=smem((2, WARPGROUP_ROWS, head_dim), dtype),
        k_smem=smem((slots, _TILE, head_dim), dtype),
        v_smem=smem((slots, _TILE, head_dim), dtype),
        sum_smem=plgpu.SMEM((_CONSUMERS, WARPGROUP_ROWS, _STAGED), jnp.float32),
        log_smem=plgpu.SMEM((_CONSUMERS, WARPGROUP_ROWS), jnp.float32),
        weights_smem=smem((_CONSUMERS, WARPGROUP_ROWS, _TILE), dtype) if plan.interpret else None,
        q_full=plgpu.Barrier(num_barriers=2),
        q_free=plgpu.Barrier(num_barriers=2, num_arrivals=_CONSUMERS),
        k_full=plgpu.Barrier(num_barriers=slots, num_arrivals=arrivals),
        v_full=plgpu.Barrier(num_barriers=slots, num_arrivals=arrivals),
        free=plgpu.Barrier(num_barriers=slots, num_arrivals=_CONSUMERS if plan.halves else 1),
    )  # fmt: skip
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=[jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        scratch_types=scratch,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        kernel_name="paged_decode_attention",
        interpret=interpret,
    )
    return tuple(kernel(q, k_pages, v_pages, page_table, work.items, work.start))


def _kernel(
    plan: _Plan,
    q: Ref,
    k_pages: Ref,
    v_pages: Ref,
    page_table: Ref,
    items: Ref,
    start: Ref,
    sums: Ref,
    logs: Ref,
    *,
    q_smem: Ref,
    k_smem: Ref,
    v_smem: Ref,
    sum_smem: Ref,
    log_smem: Ref,
    weights_smem: Ref | None,
    q_full: Ref,
    q_free: Ref,
    k_full: Ref,
    v_full: Ref,
    free: Ref,
) -> None:
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    total = start[start.shape[0] - 1] * plan.kv_heads
    mine = lax.div(total - block + (plan.blocks - 1), plan.blocks)  # pieces of work of this block

    def item(i: Array) -> _Item:
        index = jnp.minimum(block + i * plan.blocks, total - 1)
        split = lax.div(index, plan.kv_heads)
        return _Item(split, lax.rem(index, plan.kv_heads), items[split, 0], items[split, 1], items[split, 2])

    def slot(ring: Array | int, use: Array) -> Array:
        return ring * plan.stages + lax.rem(use, plan.stages)

    @pl.when(warpgroup == _PRODUCER)
    def _produce() -> None:
        plgpu.set_max_registers(40, action="decrease")

        reads_ahead = copies_per_tile(_TILE, plan.page_size) == 1  # the next tile's page, while this one is copied

        def one(i: Array, carry: tuple[_Item, tuple[Array, ...]]) -> tuple[_Item, tuple[Array, ...]]:
            work, used = carry
            following = item(i + 1)  # read early: it takes as long as a tile
            buffer = lax.rem(i, 2)

            @pl.when(i >= 2)
            def _wait_for_buffer() -> None:
                plgpu.barrier_wait(q_free.at[buffer])

            q_rows = q_smem.at[buffer, pl.ds(0, plan.rows)]
            plgpu.copy_gmem_to_smem(q.at[work.request, work.head], q_rows, q_full.at[buffer])

            def page(token: Array) -> Array:
                return tile_page(page_table, work.request, token, work.begin, work.end, plan.page_size)

            def tile(j: Array, ahead: Array) -> Array:
                ring = lax.rem(j, plan.rings)
                use = lax.div(j, plan.rings) + (used[0] if plan.rings == 1 else jnp.where(ring == 0, used[0], used[1]))
                at = slot(ring, use)
                base = work.base + j * _TILE
                following_page = page(base + _TILE) if reads_ahead else ahead
                ids = (lambda _: ahead) if reads_ahead else page

                @pl.when(use >= plan.stages)
                def _wait_for_slot() -> None:
                    plgpu.barrier_wait(free.at[at])

                load_tile(k_pages, ids, base, work.head, k_smem.at[at], k_full.at[at])
                load_tile(v_pages, ids, base, work.head, v_smem.at[at], v_full.at[at])
                return following_page

            lax.fori_loop(0, work.tiles, tile, page(work.base) if reads_ahead else jnp.int32(0))
            return following, tuple(n + _share(work.tiles, ring, plan.rings) for ring, n in enumerate(used))

        @pl.when(mine > 0)
        def _() -> None:
            _, used = lax.fori_loop(0, mine, one, (item(jnp.int32(0)), (jnp.int32(0),) * plan.rings))
            # Whoever waits on a barrier sees all its phases.
            for buffer in range(2):
                pl.when(mine > buffer)(functools.partial(plgpu.barrier_wait, q_free.at[buffer]))
            for ring in range(plan.rings):
                for i in range(plan.stages):
                    at = ring * plan.stages + i
                    pl.when(used[ring] > i)(functools.partial(plgpu.barrier_wait, free.at[at]))

    @pl.when(warpgroup < _CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(232, action="increase")
        ring = 0 if plan.halves else warpgroup
        columns = pl.ds(warpgroup * plan.columns, plan.columns) if plan.halves else slice(None)
        staging = None if weights_smem is None else weights_smem.at[warpgroup]

        def one(i: Array, carry: tuple[_Item, Array]) -> tuple[_Item, Array]:
            work, used = carry
            following = item(i + 1)
            buffer = lax.rem(i, 2)
            tiles = _share(work.tiles, ring, plan.rings)
            plgpu.barrier_wait(q_full.at[buffer])

            def tile(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                acc, peak, sum_ = state
                at = slot(ring, used + j)
                base = work.base + (j * plan.rings + ring) * _TILE
                plgpu.barrier_wait(k_full.at[at])
                scores = product(q_smem.at[buffer], k_smem.at[at])
                token = iota(scores.shape, 1) + base
                visible = (token >= work.begin) & (token < work.end)
                scores = jnp.where(visible, plan.softmax.prepared(scores), -jnp.inf)
                peak, rescale, weights = plan.softmax.online(peak, scores)
                sum_ = sum_ * rescale + weights.sum(axis=1)
                acc = acc * per_row(rescale, acc.shape)
                plgpu.barrier_wait(v_full.at[at])
                values = v_smem.at[at, :, columns] if plan.halves else v_smem.at[at]

                @pl.when((base < work.begin) | (base + _TILE > work.end))
                def _() -> None:
                    zero_hidden_rows(values, base, work.begin, work.end)

                acc = accumulate(acc, weights.astype(v_smem.dtype), values, staging)
                plgpu.barrier_arrive(free.at[at])
                return acc, peak, sum_

            state = (
                full((WARPGROUP_ROWS, plan.columns), 0.0),
                full((WARPGROUP_ROWS,), LOWEST),
                full((WARPGROUP_ROWS,), 0.0),
            )
            acc, peak, sum_ = lax.fori_loop(0, tiles, tile, state)
            plgpu.barrier_arrive(q_free.at[buffer])
            _write(plan, work, warpgroup, acc, peak, sum_, sums, logs, sum_smem, log_smem)
            return following, used + tiles

        @pl.when(mine > 0)
        def _() -> None:
            lax.fori_loop(0, mine, one, (item(jnp.int32(0)), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)


def _share(tiles: Array, ring: Array | int, rings: int) -> Array:
    """How many of a split's tiles go through a ring."""
    return lax.div(tiles - ring + (rings - 1), rings)


def _write(
    plan: _Plan,
    work: _Item,
    warpgroup: Array,
    acc: Array,  # [64, columns]
    peak: Array,  # [64]
    total: Array,
    sums: Ref,
    logs: Ref,
    sum_smem: Ref,
    log_smem: Ref,
) -> None:
    """One consumer's partial sums; a consumer without tiles writes zeros, of no weight."""
    ring = jnp.int32(0) if plan.halves else warpgroup
    divisor = jnp.maximum(total, jnp.float32(1e-30))
    acc = acc * per_row(1.0 / divisor, acc.shape)
    rows = pl.ds(0, plan.rows)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    log_smem[warpgroup] = peak + jnp.log2(divisor)
    for column in range(0, plan.columns, _STAGED):
        if column:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sum_smem[warpgroup] = acc[:, column : column + _STAGED]
        plgpu.commit_smem()
        first = column + (warpgroup * plan.columns if plan.halves else 0)
        target = sums.at[work.split, ring, work.head, :, pl.ds(first, _STAGED)]
        plgpu.copy_smem_to_gmem(sum_smem.at[warpgroup, rows], target)
    if not plan.halves:
        plgpu.copy_smem_to_gmem(log_smem.at[warpgroup, rows], logs.at[work.split, ring, work.head])
        return

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.copy_smem_to_gmem(log_smem.at[warpgroup, rows], logs.at[work.split, ring, work.head])
