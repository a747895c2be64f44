"""Paged prefill attention for Hopper: packed ragged chunks over paged KV in Mosaic GPU, warp-specialised.

A piece of work is 128 rows of one chunk and one query head. Pieces are listed with the longest first and dealt out to
one thread block per multiprocessor, there and back, so that blocks finish together. A block is a producer warpgroup,
which copies tiles of keys and values into a ring in shared memory, and two consumers of 64 rows each, which take turns:
while one multiplies, the other takes exponentials.

Tiles that causality or the window rules out are not loaded, and only those at the edges are masked. The producer zeroes
values past the end of a request: they may be NaN, and both consumers read them.

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

from .mosaic import (
    LOG2E,
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
from .tiles import PrefillTiles
from .work import ChunkColumn, chunk_work

_CONSUMERS = 2
_PRODUCER = 2  # its warpgroup
_NEVER = 2**31 - 1
_ROWS = _CONSUMERS * WARPGROUP_ROWS  # of a piece of work
_DESCRIPTION = 32  # integers, 128 bytes: a tensor copy may begin at multiples of that in shared memory, and nowhere else


@dataclass(frozen=True)
class _Plan:
    """What is static about a call."""

    query_heads: int
    group: int
    head_dim: int
    page_size: int
    tile: int
    stages: int
    blocks: int
    window: int | None
    has_sink: bool
    softmax: Softmax
    interpret: bool

    @property
    def registers(self) -> tuple[int, int]:
        """Of a consumer's and the producer's threads, 512 in all; as few for the producer as do not spill."""
        return (224, 56) if self.head_dim == 64 else (232, 40)

    @property
    def staged(self) -> int:
        """Columns of a result on their way out at a time."""
        return 64 if self.head_dim > 128 else self.head_dim


class _Piece(NamedTuple):
    """See `ChunkColumn`."""

    request: Array
    row: Array
    skip: Array
    own: Array
    position: Array
    low: Array
    high: Array
    length: Array

    def tiles(self, tile: int) -> tuple[Array, Array]:
        """First tile, and the one after the last."""
        first = lax.div(self.low, tile)
        return first, jnp.where(self.high > self.low, lax.div(self.high + (tile - 1), tile), first)

    def clean(self, tile: int, window: int | None) -> tuple[Array, Array]:
        """The tiles from the first to before the last of these are visible to all rows."""
        first, last = self.tiles(tile)
        first_own = self.position + self.skip
        to = jnp.clip(lax.div(jnp.maximum(first_own + 1, 0), tile), first, last)
        if window is None:
            return first, to
        edge = jnp.maximum(self.position + _ROWS - window, 0)
        return jnp.clip(lax.div(edge + (tile - 1), tile), first, to), to


# Jitted, so that the layers of a model share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap", "tiles", "cores", "interpret"))
def paged_prefill_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_len: Array,
    q_start: Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Array | None,
    tiles: PrefillTiles,
    cores: int,
    interpret: Any = None,
) -> Array:
    """See `kernels_pallas.paged_prefill_attention`.

    Args:
        tiles: tokens of a tile and depth of the ring.
        cores: multiprocessors of the GPU, one thread block each.
        interpret: `plgpu.InterpretGPUParams()` to run on the CPU.

    Raises:
        ValueError: a dtype, head_dim, page size or number of heads that the kernel does not take; the message names it.
    """
    refuse(q, k_pages)
    tokens, query_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    plan = _Plan(
        query_heads, query_heads // kv_heads, head_dim, page_size, tiles.tile, tiles.stages, cores, window,
        sink is not None, Softmax(scale, softcap), interpret is not None,
    )  # fmt: skip
    with jax.named_scope("paged_prefill_attention"):
        rows = max(-(-tokens // 8) * 8, _ROWS)
        q = jnp.pad(q, ((0, rows - tokens), (0, 0), (0, 0)))
        pieces, count = chunk_work(kv_len, q_start, window, rows, _ROWS)
        pieces = jnp.pad(pieces, ((0, 0), (0, _DESCRIPTION - len(ChunkColumn))))
        sinks = jnp.full(query_heads, LOWEST) if sink is None else jnp.maximum(sink.astype(jnp.float32) * LOG2E, LOWEST)
        out = _call(plan, q, k_pages, v_pages, page_table, pieces, count, sinks, interpret)
        return out[:tokens]


def _call(plan: _Plan, q: Array, k_pages: Array, v_pages: Array, *arguments: Any) -> Array:
    *arrays, interpret = arguments
    dtype, head_dim = q.dtype, plan.head_dim
    arrivals = copies_per_tile(plan.tile, plan.page_size)
    per_consumer = (_CONSUMERS, WARPGROUP_ROWS)
    scratch = dict(
        q_smem=smem((*per_consumer, head_dim), dtype),
        k_smem=smem((plan.stages, plan.tile, head_dim), dtype),
        v_smem=smem((plan.stages, plan.tile, head_dim), dtype),
        out_smem=plgpu.SMEM((*per_consumer, plan.staged), dtype),
        weights_smem=smem((*per_consumer, plan.tile), dtype) if plan.interpret else None,
        piece_smem=plgpu.SMEM((2, _CONSUMERS, _DESCRIPTION), jnp.int32),
        q_full=plgpu.Barrier(num_barriers=_CONSUMERS, num_arrivals=2),
        q_free=plgpu.Barrier(num_barriers=_CONSUMERS),
        k_full=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=arrivals),
        k_free=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=_CONSUMERS),
        v_copied=plgpu.Barrier(num_arrivals=arrivals),
        v_full=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=arrivals),
        v_free=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=_CONSUMERS),
        turn=plgpu.Barrier(num_arrivals=_CONSUMERS),
    )  # fmt: skip
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        scratch_types=scratch,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        kernel_name="paged_prefill_attention",
        interpret=interpret,
    )
    out: Array = kernel(q, k_pages, v_pages, *arrays)
    return out


def _kernel(
    plan: _Plan,
    q: Ref,
    k_pages: Ref,
    v_pages: Ref,
    page_table: Ref,
    pieces: Ref,
    count: Ref,
    sinks: Ref,
    out: Ref,
    **scratch: Ref,
) -> None:
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    total = count[0] * plan.query_heads
    rounds = lax.div(total + (plan.blocks - 1), plan.blocks)

    def at(i: Array) -> Array:
        """There and back: odd rounds are dealt in reverse."""
        forth = lax.rem(i, 2) == 0
        return i * plan.blocks + jnp.where(forth, block, plan.blocks - 1 - block)

    def place(i: Array) -> tuple[Array, Array]:
        """Row of `pieces`, and query head."""
        return lax.div(at(i), plan.query_heads), lax.rem(at(i), plan.query_heads)

    mine = jnp.maximum(rounds - jnp.where(at(rounds - 1) < total, 0, 1), 0)

    @pl.when((warpgroup == _PRODUCER) & (mine > 0))
    def _() -> None:
        plgpu.set_max_registers(plan.registers[1], action="decrease")
        _produce(plan, mine, place, pieces, q, k_pages, v_pages, page_table, scratch)

    @pl.when((warpgroup < _CONSUMERS) & (mine > 0))
    def _() -> None:
        plgpu.set_max_registers(plan.registers[0], action="increase")
        _consume(plan, mine, place, warpgroup, sinks, out, scratch)


def _produce(
    plan: _Plan,
    mine: Array,
    place: Any,
    pieces: Ref,
    q: Ref,
    k_pages: Ref,
    v_pages: Ref,
    page_table: Ref,
    scratch: dict[str, Ref],
) -> None:
    k_smem, v_smem, k_full, v_full = (scratch[name] for name in ("k_smem", "v_smem", "k_full", "v_full"))

    def one(i: Array, used: Array) -> Array:
        number, head = place(i)
        work = _piece(pieces.at[number])
        for consumer in range(_CONSUMERS):

            @pl.when(i > 0)
            def _wait_for_rows(consumer: int = consumer) -> None:
                plgpu.barrier_wait(scratch["q_free"].at[consumer])

            row = pl.multiple_of(work.row + consumer * WARPGROUP_ROWS, 8)
            full = scratch["q_full"].at[consumer]
            plgpu.copy_gmem_to_smem(pieces.at[number], scratch["piece_smem"].at[lax.rem(i, 2), consumer], full)
            plgpu.copy_gmem_to_smem(q.at[pl.ds(row, WARPGROUP_ROWS), head], scratch["q_smem"].at[consumer], full)
        first, last = work.tiles(plan.tile)
        kv_head = lax.div(head, plan.group)
        unwritten_from = _unwritten_from(work, plan.page_size)

        def page(token: Array) -> Array:
            return tile_page(page_table, work.request, token, work.low, work.high, plan.page_size)

        def tile(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            use, ahead = carry
            slot = lax.rem(use, plan.stages)
            base = j * plan.tile
            following = page(base + plan.tile) if reads_ahead else ahead
            ids = (lambda _: ahead) if reads_ahead else page
            for free in ("k_free", "v_free"):

                @pl.when(use >= plan.stages)
                def _wait_for_slot(free: str = free) -> None:
                    plgpu.barrier_wait(scratch[free].at[slot])

                if free == "k_free":
                    load_tile(k_pages, ids, base, kv_head, k_smem.at[slot], k_full.at[slot])
            unwritten = base + plan.tile > unwritten_from

            @pl.when(jnp.logical_not(unwritten))
            def _() -> None:
                load_tile(v_pages, ids, base, kv_head, v_smem.at[slot], v_full.at[slot])

            @pl.when(unwritten)
            def _() -> None:
                load_tile(v_pages, ids, base, kv_head, v_smem.at[slot], scratch["v_copied"])
                plgpu.barrier_wait(scratch["v_copied"])
                zero_hidden_rows(v_smem.at[slot], base, work.low, work.length)
                for _arrival in range(copies_per_tile(plan.tile, plan.page_size)):
                    plgpu.barrier_arrive(v_full.at[slot])

            return use + 1, following

        ahead = page(first * plan.tile) if reads_ahead else jnp.int32(0)
        used, _ = lax.fori_loop(first, last, tile, (used, ahead))
        return used

    reads_ahead = copies_per_tile(plan.tile, plan.page_size) == 1  # the next tile's page, while this one is copied
    used = lax.fori_loop(0, mine, one, jnp.int32(0))
    # Whoever waits on a barrier sees all its phases.
    for consumer in range(_CONSUMERS):
        plgpu.barrier_wait(scratch["q_free"].at[consumer])

    @pl.loop(0, jnp.minimum(used, plan.stages))
    def _(slot: Array) -> None:
        plgpu.barrier_wait(scratch["k_free"].at[slot])
        plgpu.barrier_wait(scratch["v_free"].at[slot])


def _piece(columns: Ref) -> _Piece:
    return _Piece(*(columns[column] for column in ChunkColumn))


def _unwritten_from(work: _Piece, page_size: int) -> Array:
    """Tiles that reach past this token may hold values that nobody has written, which may be NaN."""
    last_page = lax.div(work.length - 1, page_size) * page_size
    reads_them = (work.high > last_page) & (lax.rem(work.length, page_size) != 0)
    return jnp.where(reads_them, last_page, _NEVER)


def _consume(
    plan: _Plan, mine: Array, place: Any, warpgroup: Array, sinks: Ref, out: Ref, scratch: dict[str, Ref]
) -> None:
    q_smem, k_smem, v_smem = (scratch[name] for name in ("q_smem", "k_smem", "v_smem"))
    weights_smem = scratch["weights_smem"]
    staging = None if weights_smem is None else weights_smem.at[warpgroup]

    def take_turn() -> None:
        plgpu.barrier_arrive(scratch["turn"])
        plgpu.barrier_wait(scratch["turn"])

    def one(i: Array, used: Array) -> Array:
        plgpu.barrier_wait(scratch["q_full"].at[warpgroup])
        described = scratch["piece_smem"].at[lax.rem(i, 2), warpgroup]
        work = _piece(described)
        position = work.position + warpgroup * WARPGROUP_ROWS
        first, last = work.tiles(plan.tile)
        clean_from, clean_to = work.clean(plan.tile, plan.window)
        pl.when(warpgroup == 1)(take_turn)

        def tile(masked: bool, j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            acc, peak, total = state
            slot = lax.rem(used + j - first, plan.stages)
            plgpu.barrier_wait(scratch["k_full"].at[slot])
            scores = product(q_smem.at[warpgroup], k_smem.at[slot], after_issue=take_turn)
            plgpu.barrier_arrive(scratch["k_free"].at[slot])
            scores = plan.softmax.prepared(scores)
            if masked:
                scores = jnp.where(_visible(plan, scores.shape, j * plan.tile - position), scores, -jnp.inf)
            peak, rescale, weights = plan.softmax.online(peak, scores)
            acc = acc * per_row(rescale, acc.shape)
            total = total * rescale + weights.sum(axis=1)
            narrow = weights.astype(v_smem.dtype)
            # Nothing of this may move past the end of the turn.
            acc, peak, total, narrow = lax.optimization_barrier((acc, peak, total, narrow))
            plgpu.barrier_arrive(scratch["turn"])
            plgpu.barrier_wait(scratch["v_full"].at[slot])
            plgpu.barrier_wait(scratch["turn"])
            acc = accumulate(acc, narrow, v_smem.at[slot], staging)
            plgpu.barrier_arrive(scratch["v_free"].at[slot])
            return acc, peak, total

        state = (
            full((WARPGROUP_ROWS, plan.head_dim), 0.0), full((WARPGROUP_ROWS,), LOWEST), full((WARPGROUP_ROWS,), 0.0),
        )  # fmt: skip
        if plan.window is not None:
            state = lax.fori_loop(first, clean_from, functools.partial(tile, True), state)
        state = lax.fori_loop(clean_from, clean_to, functools.partial(tile, False), state)
        acc, peak, total = lax.fori_loop(clean_to, last, functools.partial(tile, True), state)
        plgpu.commit_smem()  # what this thread has read of a description comes before what a copy writes over it
        plgpu.barrier_arrive(scratch["q_free"].at[warpgroup])

        @pl.when(warpgroup == 0)
        def _() -> None:
            plgpu.barrier_arrive(scratch["turn"])

        _, head = place(i)
        if plan.has_sink:
            sink = sinks[head]
            risen = jnp.maximum(peak, sink)
            rescale = jnp.exp2(peak - risen)
            acc, total = acc * per_row(rescale, acc.shape), total * rescale + jnp.exp2(sink - risen)
        acc = acc * per_row(1.0 / jnp.maximum(total, jnp.float32(1e-30)), acc.shape)
        _write(plan, described, warpgroup, acc, out.at[:, head], scratch["out_smem"].at[warpgroup])

        @pl.when(warpgroup == 0)
        def _() -> None:
            plgpu.barrier_wait(scratch["turn"])

        return used + (last - first)

    lax.fori_loop(0, mine, one, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _visible(plan: _Plan, shape: tuple[int, ...], ahead: Array) -> Array:
    """Which tokens of a tile [M, N] the rows see; `ahead`: the position of its first token minus the first row's."""
    own = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=plgpu.Layout.WGMMA.reduce(1)) - ahead
    token = iota(shape, 1)
    visible = token <= per_row(own, shape)
    return visible if plan.window is None else visible & (token > per_row(own - plan.window, shape))


def _write(plan: _Plan, described: Ref, warpgroup: Array, acc: Array, out: Ref, staged: Ref) -> None:
    """A consumer's own rows of `out` [T, D]; copies are of static size, so these are several powers of two."""
    offset = warpgroup * WARPGROUP_ROWS
    for column in range(0, plan.head_dim, plan.staged):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        part = acc[:, column : column + plan.staged].astype(staged.dtype)
        staged[...] = part
        plgpu.commit_smem()
        work = _piece(described)  # read again, beside `acc` there are few registers
        begin = jnp.clip(work.skip - offset, 0, WARPGROUP_ROWS)
        count = jnp.clip(work.skip + work.own - offset, 0, WARPGROUP_ROWS) - begin
        for power in reversed(range(WARPGROUP_ROWS.bit_length())):
            size = 1 << power
            done = begin + (count >> (power + 1) << (power + 1))
            source = staged.at[pl.ds(done, size)]
            target = out.at[pl.ds(work.row + offset + done, size), pl.ds(column, plan.staged)]
            pl.when((count & size) != 0)(functools.partial(plgpu.copy_smem_to_gmem, source, target))
