"""One thread block of the Hopper kernel for products with a stack of matrices, such as a layer's experts.

A piece of its work is up to N rows that all go to one matrix, times 64 outputs for each consumer, or 128. Operands are
swapped: outputs are the 64 rows of the tensor cores' tile and the few rows of x its columns, so that one row costs
hardly more padding than sixty. A producer warpgroup keeps a ring of stages full, each some units of the inputs, of x
and of the weights. Consumers make 16-bit numbers of quantised weights in registers, from which the tensor cores take
them (`fragments.py`): none are ever written. Two stacks of one shape, gate and up, are multiplied side by side, and
what becomes of both sums, `combine`, is computed on them where they are.

Weights that are 16-bit floats, [X, k, n], go from shared memory straight into the tensor cores.

Pieces are those of the rows that there are: matrices without rows are not read, and cost nothing. The last tile of
outputs may hold fewer than all consumers take: those that are left over multiply the last ones again, and write
nothing. Where a matrix has no multiple of 64 outputs, its last 64 are the last sum: some of them are in the sum before
it too, and `stacks.py` takes them from there. A piece writes its own rows only, although it multiplies N.

Invariant: a row's sum is added up in the order of the inputs, whatever the rows beside it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .block_tiles import BLOCK, LAYOUTS, OUTPUTS, Tiles
from .fragments import ROWS, RUN, fragment, store_transposed
from .mosaic import CONSUMERS, PRODUCER, Ref, per_row, smem
from .work import ceil_div

_TILES = ROWS // OUTPUTS  # of `block_tiles.py`, in the outputs of one sum
_PLACE = 128  # bytes that a copy into shared memory begins at a multiple of
_STAGED = 64  # rows of a result that are copied to global memory at a time
_REGISTERS = 232, 40  # per thread of a consumer and of the producer
UNIT = {True: BLOCK, False: 64}  # inputs of a unit, by whether weights are quantised

# From the sum of each stack, [64, N] float32 with biases, to the result, elementwise. Two that do the same are equal.
type Combine = Callable[..., Array]


@dataclass(frozen=True)
class Plan:
    """The static parameters of a call."""

    format: str | None  # of the weights; None: they are 16-bit floats
    stacks: int  # whose products are combined
    width: int  # times 64 outputs of a stack for each consumer
    rows: int  # N, a multiple of 8
    inputs: int  # k, a multiple of `units` units
    outputs: int  # n, 64 or more, a multiple of 16; of floats, of 64
    units: int  # of a stage
    parts: int  # of the inputs, each a piece of work of its own
    stages: int  # of the ring
    blocks: int  # thread blocks
    combine: Combine | None  # None: one stack, whose sums are the result
    dtype: Any  # of the result
    interpret: bool  # whether the kernel runs in the interpreter on the CPU

    @property
    def unit(self) -> int:
        """Return how many inputs a unit has."""
        return UNIT[self.format is not None]

    @property
    def runs(self) -> int:
        """Return how many runs of bytes the values of a block of a tile are."""
        return 2 * BLOCK * LAYOUTS[self.format].bits // RUN if self.format else 1

    @property
    def steps(self) -> int:
        """Return how many stages a piece of work takes."""
        return self.inputs // (self.unit * self.units * self.parts)

    @property
    def tiles(self) -> int:
        """Return how many pieces of work there are for the same rows and inputs."""
        return ceil_div(self.columns, self.width * CONSUMERS)

    @property
    def columns(self) -> int:
        """Return how many times 64 outputs are summed."""
        return ceil_div(self.outputs, ROWS)

    @property
    def sums(self) -> int:
        """Return how many sums [64, N] a consumer holds."""
        return self.stacks * self.width

    @property
    def staged(self) -> int:
        """Return how many rows of a result are copied to global memory at a time."""
        return min(self.rows, _STAGED)

    def number(self, tile: Array, consumer: Array | int, column: int) -> Array:
        """Number the 64 outputs, of all of a matrix, that a consumer sums as its `column`-th of `width`."""
        return (tile * CONSUMERS + consumer) * self.width + column

    def lies(self, number: Array) -> Array:
        """Return the tile of 16 outputs with which they begin; what is past the end is the last 64 again."""
        return jnp.minimum(number * _TILES, self.outputs // OUTPUTS - _TILES)


class Weights(NamedTuple):
    """The arrays of a stack, or their parts in shared memory: floats, or those of `QuantizedArray`."""

    # Floats [X, k, n], in the ring [stages, parts, k of a stage, 64]; or runs [X, T, B * runs, 256], [.., 4, .., 256].
    values: Ref
    scales: Ref | None = None  # [X, T, B, 16], in the ring [stages, parts, 4 or 8, B of a stage, 16]
    mins: Ref | None = None


class Buffers(NamedTuple):
    """The buffers in shared memory: a ring of stages, and results on their way out."""

    x: Ref  # [stages, units, N, unit]
    weights: Weights  # of every part: stack by stack, consumer by consumer, `width` each
    out: Ref  # [consumers, staged, 64]
    tile: Ref | None  # [consumers, 64, unit] of weights, for the interpreter; None on a GPU


class Barriers(NamedTuple):
    """The barriers: a stage is full once its copies have arrived, and free once all consumers have read it."""

    full: Ref
    free: Ref


def stage_bytes(plan: Plan) -> int:
    """Count the bytes of a stage."""
    return _weight_bytes(plan) * plan.sums * CONSUMERS + 2 * plan.units * plan.unit * plan.rows


def staging_bytes(plan: Plan) -> int:
    """Count the bytes of results on their way out."""
    return CONSUMERS * plan.staged * ROWS * int(jnp.dtype(plan.dtype).itemsize)


def _weight_bytes(plan: Plan) -> int:
    """Count the bytes of 64 outputs of a stage."""
    if plan.format is None:
        return 2 * plan.units * plan.unit * ROWS
    layout = LAYOUTS[plan.format]
    scales = int(jnp.dtype(layout.scale_dtype).itemsize) * (1 + layout.has_mins) * _lying(plan) // _TILES
    return plan.units * ROWS * (BLOCK * layout.bits // 8 + scales)


def _lying(plan: Plan) -> int:
    """Return for how many tiles of scales there is room, so that each part lies at a multiple of 128 bytes."""
    assert plan.format is not None
    scales = _TILES * plan.units * OUTPUTS * int(jnp.dtype(LAYOUTS[plan.format].scale_dtype).itemsize)
    return _TILES * _PLACE // math.gcd(_PLACE, scales)


def scratch(plan: Plan, dtype: jax.typing.DTypeLike) -> tuple[Buffers, Barriers]:
    """Describe the shared memory and the barriers of a thread block; `dtype` is that of x."""
    parts, swizzle = plan.sums * CONSUMERS, 2 * plan.unit
    if plan.format is None:
        weights = Weights(smem((plan.stages, parts, plan.units * plan.unit, ROWS), dtype))
        arrays = 1
    else:
        layout, of = LAYOUTS[plan.format], (plan.stages, parts, _TILES, plan.units)
        scales = plgpu.SMEM((*of[:2], _lying(plan), *of[3:], OUTPUTS), jnp.dtype(layout.scale_dtype))
        values = plgpu.SMEM((*of[:3], plan.units * plan.runs, RUN), jnp.uint8)
        weights = Weights(values, scales, scales if layout.has_mins else None)
        arrays = 2 + layout.has_mins
    needs_tile = plan.interpret and plan.format is not None
    buffers = Buffers(
        x=smem((plan.stages, plan.units, plan.rows, plan.unit), dtype, swizzle),
        weights=weights,
        out=plgpu.SMEM((CONSUMERS, plan.staged, ROWS), plan.dtype),
        tile=smem((CONSUMERS, ROWS, plan.unit), dtype, swizzle) if needs_tile else None,
    )
    barriers = Barriers(
        full=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=1 + arrays * parts),
        free=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=CONSUMERS),
    )
    return buffers, barriers


@dataclass(frozen=True)
class _Block:
    """The arguments, the shared memory, and the block's place in the list of work."""

    plan: Plan
    x: Ref  # [k / unit, P, unit]
    weights: tuple[Weights, ...]  # of each stack
    biases: tuple[Ref, ...]  # [X, n] of each stack, or none
    items: Ref  # [U, 4], as `stacks.Work` has them
    out: Ref  # [parts, M, 64 * columns], written
    smem: Buffers
    barriers: Barriers
    mine: Array  # pieces of work of this block

    def place(self, i: Array) -> tuple[Array, Array, Array]:
        """Return the row of `items`, the tile of outputs and the part of the inputs of the block's i-th piece."""
        at = lax.axis_index("block") + i * self.plan.blocks
        whole = lax.div(at, self.plan.parts)
        return lax.div(whole, self.plan.tiles), lax.rem(whole, self.plan.tiles), lax.rem(at, self.plan.parts)


def stack_block(
    plan: Plan,
    x: Ref,
    weights: tuple[Weights, ...],
    biases: tuple[Ref, ...],
    items: Ref,
    used: Ref,
    out: Ref,
    buffers: Buffers,
    barriers: Barriers,
) -> None:
    """Run the kernel in one thread block; `used` [1] is the number of rows of `items` that are used."""
    warpgroup = lax.axis_index("warpgroup")
    pieces = used[0] * plan.tiles * plan.parts
    mine = lax.div(pieces - lax.axis_index("block") + (plan.blocks - 1), plan.blocks)
    block = _Block(plan, x, weights, biases, items, out, buffers, barriers, mine)

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS[1], action="decrease")
        pl.loop(0, mine)(functools.partial(_load_piece, block))
        for stage in range(plan.stages):  # a warp that waits on a barrier must wait for all its phases
            pl.when(mine * plan.steps > stage)(functools.partial(plgpu.barrier_wait, barriers.free.at[stage]))

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        pl.loop(0, mine)(functools.partial(_sum_piece, block, warpgroup))
        plgpu.wait_smem_to_gmem(0)


def _load_piece(block: _Block, i: Array) -> None:
    """Load the block's i-th piece, a stage after the other."""
    plan = block.plan
    number, tile, part = block.place(i)
    matrix, row, begin = block.items[number, 0], block.items[number, 1], part * plan.steps

    @pl.loop(0, plan.steps)
    def _stage(step: Array) -> None:
        use = i * plan.steps + step
        slot, unit = lax.rem(use, plan.stages), (begin + step) * plan.units
        full = block.barriers.full.at[slot]
        pl.when(use >= plan.stages)(functools.partial(plgpu.barrier_wait, block.barriers.free.at[slot]))
        rows = block.x.at[pl.ds(unit, plan.units), pl.ds(pl.multiple_of(row, 8), plan.rows)]
        plgpu.copy_gmem_to_smem(rows, block.smem.x.at[slot], full)
        for target_part in range(plan.sums * CONSUMERS):
            stack, rest = divmod(target_part, CONSUMERS * plan.width)
            column = plan.number(tile, *divmod(rest, plan.width))
            lies = plan.lies(column)  # what is left over is loaded, not written
            for source, target in zip(block.weights[stack], block.smem.weights, strict=True):
                if source is None:
                    continue
                if plan.format is None:
                    inputs = pl.ds(pl.multiple_of(unit * plan.unit, plan.unit), plan.units * plan.unit)
                    # Mosaic finds a layout for whole swizzled tiles only.
                    whole = jnp.minimum(column, plan.columns - 1) * ROWS
                    some = source.at[matrix, inputs, pl.ds(pl.multiple_of(whole, ROWS), ROWS)]
                else:
                    runs = plan.runs if target is block.smem.weights.values else 1
                    blocks = pl.ds(unit * runs, plan.units * runs)
                    some = source.at[matrix, pl.ds(lies, _TILES), blocks]
                place = target.at[slot, target_part]
                plgpu.copy_gmem_to_smem(some, place if plan.format is None else place.at[pl.ds(0, _TILES)], full)


def _sum_piece(block: _Block, warpgroup: Array, i: Array) -> None:
    """Sum and write one consumer's part of the block's i-th piece."""
    plan = block.plan
    sums = pl.run_scoped(
        functools.partial(_sums, block, warpgroup, i),
        *[plgpu.WGMMAAccumulatorRef((ROWS, plan.rows), jnp.float32) for _ in range(plan.sums)],
    )
    number, tile, part = block.place(i)
    matrix, row, count = (block.items[number, column] for column in (0, 2, 3))
    for column in range(plan.width):
        at = plan.number(tile, warpgroup, column)
        of_stacks = sums[column :: plan.width]

        @pl.when(at < plan.columns)
        def _write(at: Array = at, of_stacks: Sequence[Array] = of_stacks) -> None:
            outputs = pl.ds(pl.multiple_of(at * ROWS, ROWS), ROWS)
            biased = of_stacks
            if block.biases:
                own = pl.ds(pl.multiple_of(plan.lies(at) * OUTPUTS, OUTPUTS), ROWS)
                biases = [_bias(bias.at[matrix, own]) for bias in block.biases]
                biased = [total + per_row(bias, total.shape) for total, bias in zip(of_stacks, biases, strict=True)]
            result = biased[0] if plan.combine is None else plan.combine(*biased)
            _store(block, warpgroup, result.astype(plan.dtype), block.out.at[part, :, outputs], row, count)


def _bias(bias: Ref) -> Array:
    """Read the biases of 64 outputs as float32."""
    read: Array = plgpu.load(bias, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return read.astype(jnp.float32)


def _sums(block: _Block, warpgroup: Array, i: Array, *sums: Ref) -> tuple[Array, ...]:
    """Sum a consumer's part of a piece."""
    plan = block.plan

    @pl.loop(0, plan.steps)
    def _stage(step: Array) -> None:
        use = i * plan.steps + step
        slot = lax.rem(use, plan.stages)
        plgpu.barrier_wait(block.barriers.full.at[slot])
        for unit in range(plan.units):
            for at, total in enumerate(sums):
                stack, column = divmod(at, plan.width)
                part = (stack * CONSUMERS + warpgroup) * plan.width + column
                weights = _operand(block, warpgroup, slot, part, unit)
                plgpu.wgmma(total, weights, block.smem.x.at[slot, unit].transpose((1, 0)))
                # The next weights are made while these are multiplied, and the interpreter's have one place.
                plgpu.wgmma_wait(0 if block.smem.tile is not None else 1)
        # Products of different stages may not overlap: the compiler would make all of them wait.
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()  # orders this thread's reads of weights before the copy that overwrites them
        plgpu.barrier_arrive(block.barriers.free.at[slot])

    return tuple(total[...] for total in sums)


def _operand(block: _Block, warpgroup: Array, slot: Array, part: Array, unit: int) -> Any:
    """Find the weights of a unit, [64, unit]: floats in shared memory, or dequantised in registers."""
    plan, ring = block.plan, block.smem.weights
    if plan.format is None:
        return ring.values.at[slot, part, pl.ds(unit * plan.unit, plan.unit)].transpose((1, 0))
    own, values = pl.ds(0, _TILES), ring.values.at[slot, part, :, unit]
    if plan.runs > 1:
        values = ring.values.at[slot, part, :, pl.ds(unit * plan.runs, plan.runs)]
    factors = (None if array is None else array.at[slot, part, own, unit] for array in (ring.scales, ring.mins))
    tiles = Tiles(values, *factors)
    weights = fragment(plan.format, tiles, block.smem.x.dtype, interpret=plan.interpret)
    if block.smem.tile is None:
        return weights
    staged = block.smem.tile.at[warpgroup]
    staged[...] = weights
    plgpu.commit_smem()
    return staged


def _store(block: _Block, warpgroup: Array, result: Array, out: Ref, row: Array, count: Array) -> None:
    """Write the first `count` columns of a result [64, N] as rows of `out`, by copies of powers of two rows."""
    plan, staged = block.plan, block.smem.out.at[warpgroup]
    for first in range(0, plan.rows, plan.staged):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store_transposed(result[:, first : first + plan.staged], staged, interpret=plan.interpret)
        plgpu.commit_smem()
        own = jnp.clip(count - first, 0, plan.staged)
        for power in reversed(range(plan.staged.bit_length())):
            size = 1 << power
            done = own >> (power + 1) << (power + 1)
            target = out.at[pl.ds(row + first + done, size)]
            copy = functools.partial(plgpu.copy_smem_to_gmem, staged.at[pl.ds(done, size)], target)
            pl.when((own & size) != 0)(copy)
