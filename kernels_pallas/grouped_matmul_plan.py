"""What the producer and the consumers of the Hopper kernel for grouped products share: sizes, shared memory, the work.

Not here: how many rows, stages and parts a call has (`grouped_matmul.py`), and what is done with them
(`grouped_matmul_block.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .block_tiles import BLOCK, LAYOUTS, OUTPUTS
from .fragments import ROWS, RUN
from .mosaic import CONSUMERS, Ref, smem
from .work import ceil_div

TILES = ROWS // OUTPUTS  # of `block_tiles.py`, in the outputs of one sum
_PLACE = 128  # bytes that a copy into shared memory begins at a multiple of
_STAGED = 64  # rows of a result that are copied to global memory at a time
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
        return jnp.minimum(number * TILES, self.outputs // OUTPUTS - TILES)


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
    scales = int(jnp.dtype(layout.scale_dtype).itemsize) * (1 + layout.has_mins) * _lying(plan) // TILES
    return plan.units * ROWS * (BLOCK * layout.bits // 8 + scales)


def _lying(plan: Plan) -> int:
    """Return for how many tiles of scales there is room, so that each part lies at a multiple of 128 bytes."""
    assert plan.format is not None
    scales = TILES * plan.units * OUTPUTS * int(jnp.dtype(LAYOUTS[plan.format].scale_dtype).itemsize)
    return TILES * _PLACE // math.gcd(_PLACE, scales)


def scratch(plan: Plan, dtype: jax.typing.DTypeLike) -> tuple[Buffers, Barriers]:
    """Describe the shared memory and the barriers of a thread block; `dtype` is that of x."""
    parts, swizzle = plan.sums * CONSUMERS, 2 * plan.unit
    if plan.format is None:
        weights = Weights(smem((plan.stages, parts, plan.units * plan.unit, ROWS), dtype))
        arrays = 1
    else:
        layout, of = LAYOUTS[plan.format], (plan.stages, parts, TILES, plan.units)
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
class Block:
    """The arguments, the shared memory, and the block's place in the list of work."""

    plan: Plan
    x: Ref  # [k / unit, P, unit]
    weights: tuple[Weights, ...]  # of each stack
    biases: tuple[Ref, ...]  # [X, n] of each stack, or none
    items: Ref  # [U, 4], as `grouped_matmul.Work` has them
    out: Ref  # [parts, M, 64 * columns], written
    smem: Buffers
    barriers: Barriers
    mine: Array  # pieces of work of this block

    def place(self, i: Array) -> tuple[Array, Array, Array]:
        """Return the row of `items`, the tile of outputs and the part of the inputs of the block's i-th piece."""
        at = lax.axis_index("block") + i * self.plan.blocks
        whole = lax.div(at, self.plan.parts)
        return lax.div(whole, self.plan.tiles), lax.rem(whole, self.plan.tiles), lax.rem(at, self.plan.parts)
