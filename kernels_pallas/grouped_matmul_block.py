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
it too, and `grouped_matmul.py` takes them from there. A piece writes its own rows only, although it multiplies N.

Invariant: a row's sum is added up in the order of the inputs, whatever the rows beside it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .block_tiles import OUTPUTS, Tiles
from .fragments import ROWS, fragment, store_transposed
from .grouped_matmul_plan import TILES, Barriers, Block, Buffers, Plan, Weights
from .mosaic import CONSUMERS, PRODUCER, Ref, per_row

_REGISTERS = 232, 40  # per thread of a consumer and of the producer


def grouped_matmul_block(
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
    block = Block(plan, x, weights, biases, items, out, buffers, barriers, mine)

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


def _load_piece(block: Block, i: Array) -> None:
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
                    some = source.at[matrix, pl.ds(lies, TILES), blocks]
                place = target.at[slot, target_part]
                plgpu.copy_gmem_to_smem(some, place if plan.format is None else place.at[pl.ds(0, TILES)], full)


def _sum_piece(block: Block, warpgroup: Array, i: Array) -> None:
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


def _sums(block: Block, warpgroup: Array, i: Array, *sums: Ref) -> tuple[Array, ...]:
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


def _operand(block: Block, warpgroup: Array, slot: Array, part: Array, unit: int) -> Any:
    """Find the weights of a unit, [64, unit]: floats in shared memory, or dequantised in registers."""
    plan, ring = block.plan, block.smem.weights
    if plan.format is None:
        return ring.values.at[slot, part, pl.ds(unit * plan.unit, plan.unit)].transpose((1, 0))
    own, values = pl.ds(0, TILES), ring.values.at[slot, part, :, unit]
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


def _store(block: Block, warpgroup: Array, result: Array, out: Ref, row: Array, count: Array) -> None:
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
