"""Products with a stack of matrices for Hopper: rows that are grouped by matrix, in Mosaic GPU.

Rows lie in the order of matrices, and `sizes` counts those of each. They are cut into items of up to N rows of one
matrix, a list of work that is computed on the device; N follows from the shapes alone. `grouped_matmul_block.py` is the
code of a thread block. Weights are 16-bit floats or one of `HOPPER_FORMATS`, which is read as it lies and
dequantised in the kernel. Activations are brought into the order that the tensor cores read them in by one pass in XLA,
which may be part of gathering them. One stack's products of few rows are cut along the inputs too, where that shares
the work more evenly: XLA adds up the parts.

Not here: how rows get their matrices (`grouped.py`), routers, what is done with the results; other devices.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .block_tiles import BLOCK, OUTPUTS
from .formats.hopper import HOPPER_FORMATS
from .fragments import ROWS, RUN, ordered
from .grouped_matmul_block import grouped_matmul_block
from .grouped_matmul_plan import UNIT, Combine, Plan, Weights, scratch, stage_bytes, staging_bytes
from .mosaic import CONSUMERS, DTYPES, launch
from .quantized import QuantizedArray
from .work import ceil_div

_FEWEST, _MOST = 8, 128  # rows of an item
_TILE = 8  # rows of x in a tile of the tensor cores
_UNITS = 4  # the most of a stage
_STAGES = 8  # the most of the ring
_PARTS = 16  # the most of the inputs
_SHARED = 220 * 1024  # bytes of shared memory for ring and staging


class Work(NamedTuple):
    """The work that there is for M rows: at most U items, and where P rows of x are to lie for them."""

    items: Array  # [U, 4] int32: matrix, first row of x as it lies, first row of the result, number of rows
    used: Array  # [1] int32: items from this one on are unused
    source: Array  # [P] int32, the row of x that each place takes; M: none


def list_work(sizes: Array, rows: int, count: int) -> Work:
    """Cut groups of rows, M in all at most, into items of up to `count` rows of one matrix.

    Groups lie at multiples of eight rows, as the tensor cores' tiles do, and `count` is one; the last item goes on for
    `count` rows whatever it has.
    """
    matrices = sizes.shape[0]
    places = _TILE * (ceil_div(rows, _TILE) + min(matrices, rows)) + count
    cuts, lying = ceil_div(sizes, count), _TILE * ceil_div(sizes, _TILE)
    end, after, past = (jnp.cumsum(x, dtype=jnp.int32) for x in (cuts, sizes, lying))
    index = jnp.arange(min(rows, matrices + rows // count), dtype=jnp.int32)
    matrix = _interval(end, index)
    done = (index - (end - cuts)[matrix]) * count
    own = jnp.clip(sizes[matrix] - done, 0, count)
    items = jnp.stack([matrix, (past - lying)[matrix] + done, (after - sizes)[matrix] + done, own], axis=1)
    place = jnp.arange(places, dtype=jnp.int32)
    of = _interval(past, place)
    offset = place - (past - lying)[of]
    source = jnp.where(offset < sizes[of], (after - sizes)[of] + offset, rows)
    return Work(items, end[-1:], source)


def _interval(ends: Array, index: Array) -> Array:
    """Find in which interval each index lies; past them all, the last."""
    return jnp.minimum(jnp.sum(ends <= index[:, None], axis=1, dtype=jnp.int32), ends.shape[0] - 1)


def item_rows(rows: int, matrices: int) -> int:
    """Choose N for M rows: twice what a matrix gets on average, so that most need one pass over their weights."""
    share = 2 * ceil_div(rows, matrices)
    return max(_FEWEST, min(_MOST, 1 << (share - 1).bit_length(), 1 << (rows - 1).bit_length()))


def why_unsupported(x: Array, w: Array | QuantizedArray) -> str | None:
    """Say in one sentence why this kernel does not multiply x [M, k] by a stack; None if it does."""
    if x.dtype not in DTYPES:
        return f"Activations are {x.dtype}: the Hopper kernel takes bfloat16 and float16."
    if isinstance(w, QuantizedArray):
        if w.format not in HOPPER_FORMATS:
            return f"Weights are {w.format}: the Hopper kernel takes {', '.join(HOPPER_FORMATS)} and 16-bit floats."
        outputs, inputs = w.values.shape[1] * OUTPUTS, w.values.shape[2] * BLOCK
    else:
        if w.dtype != x.dtype:
            return f"Weights are {w.dtype} and activations {x.dtype}: the Hopper kernel takes floats of one dtype."
        inputs, outputs = w.shape[1:]
    is_quantized = isinstance(w, QuantizedArray)
    unit, step = UNIT[is_quantized], OUTPUTS if is_quantized else ROWS
    if outputs < ROWS or outputs % step or inputs % unit:
        units = f"{ROWS} or more in multiples of {step}, and multiples of {unit}"
        return f"A matrix has {outputs} outputs and {inputs} inputs: the Hopper kernel takes {units}."
    return None


# Jitted, so that the layers of a model share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("combine", "dtype", "cores", "interpret"))
def grouped_matmul(
    x: Array,
    stacks: tuple[Array | QuantizedArray, ...],
    biases: tuple[Array, ...],
    sizes: Array,
    *,
    combine: Combine | None = None,
    dtype: Any,
    cores: int,
    interpret: Any = None,
) -> Array:
    """Multiply groups of rows by a matrix each, of one stack, or of several whose products are combined.

    Args:
        x: [M, k], the rows of the first matrix, those of the second, and so on.
        stacks: one, or several of the same shape and format: [X, k, n] of x's dtype, or quantised.
        biases: [X, n] floats of each stack, or none.
        sizes: [X] int32, rows of each matrix, M or less together.
        combine: from the products of each stack, float32 with their biases, to the result, elementwise; it sees parts
            of them, outputs by rows. None: there is one stack, and its products are the result.
        dtype: the result's, of 16 bits or float32.
        cores: multiprocessors of the GPU, one thread block each.
        interpret: `plgpu.InterpretGPUParams()` to run on the CPU.

    Returns:
        [M, n]; rows that belong to no matrix hold anything.

    Raises:
        ValueError: a shape, dtype or format that the kernel does not support; names it.
    """
    for w in stacks:
        if (reason := why_unsupported(x, w)) is not None:
            raise ValueError(reason)
    rows, inputs = x.shape
    plan = plan_for(x, stacks, combine, dtype, cores, interpret is not None)
    if combine is None and not biases:
        plan = _cut(plan, rows, matrices=sizes.shape[0])
    work = list_work(sizes, rows, plan.rows)
    lying = x.at[work.source].get(mode="fill", fill_value=0)
    units = lying.reshape(lying.shape[0], inputs // plan.unit, plan.unit)
    units = jnp.swapaxes(units if plan.format is None else ordered(units), 0, 1)
    kernel = launch(
        functools.partial(grouped_matmul_block, plan),
        out_type=jax.ShapeDtypeStruct((plan.parts, rows, plan.columns * ROWS), plan.dtype),
        scratch_types=scratch(plan, x.dtype),
        blocks=plan.blocks,
        name="grouped_matmul",
        interpret=interpret,
    )
    weights = tuple(map(_weights, stacks))
    biases = tuple(jnp.pad(bias, ((0, 0), (0, plan.outputs - bias.shape[1]))) for bias in biases)  # to whole tiles
    made = kernel(units, weights, biases, work.items, work.used)
    first = stacks[0]
    outputs = min(plan.outputs, first.matrix[0]) if isinstance(first, QuantizedArray) else plan.outputs
    product: Array = _in_order(functools.reduce(jnp.add, made).astype(dtype), plan.outputs)[:, :outputs]
    return product


def _weights(w: Array | QuantizedArray) -> Weights:
    """Take the arrays of a stack as the kernel copies them: values in runs of bytes."""
    if isinstance(w, QuantizedArray):
        return Weights(w.values.reshape(*w.values.shape[:2], -1, RUN), w.scales, w.mins)
    return Weights(w)


def _in_order(made: Array, outputs: int) -> Array:
    """Drop from the last 64 outputs those that the 64 before them end with, [M, columns * 64] -> [M, outputs]."""
    whole, own = divmod(outputs, ROWS)
    return jnp.concatenate([made[:, : whole * ROWS], made[:, -own:]], axis=1) if own else made


def plan_for(
    x: Array,
    stacks: Sequence[Array | QuantizedArray],
    combine: Combine | None,
    dtype: Any,
    cores: int,
    interpret: bool,
) -> Plan:
    """Choose the sizes of a call."""
    first, (rows, inputs) = stacks[0], x.shape
    if isinstance(first, QuantizedArray):  # a part has whole tiles; its shape is still that of the whole
        name, matrices, outputs = first.format, first.values.shape[0], first.values.shape[1] * OUTPUTS
    else:
        name, matrices, outputs = None, first.shape[0], first.shape[2]
    count, unit = item_rows(rows, matrices), UNIT[name is not None]
    # With many rows x is most of what is read, so that each thread block takes as many outputs as registers hold.
    width = 2 if len(stacks) == 1 and count == _MOST and outputs >= 2 * ROWS * CONSUMERS else 1
    plan = Plan(
        format=name,
        stacks=len(stacks),
        width=width,
        rows=count,
        inputs=inputs,
        outputs=outputs,
        units=max(n for n in range(1, _UNITS + 1) if inputs // unit % n == 0),
        parts=1,
        stages=0,
        blocks=cores,
        combine=combine,
        dtype=jnp.dtype(dtype),
        interpret=interpret,
    )
    return _with_ring(plan)


def _cut(plan: Plan, rows: int, matrices: int) -> Plan:
    """Cut the inputs so that blocks share the work evenly, and partial sums cost little beside the weights."""
    chosen = min(rows, matrices)
    items = chosen * ceil_div(rows, plan.rows * chosen)

    def cost(parts: int) -> float:
        pieces = items * plan.tiles * parts
        rounds = ceil_div(pieces, plan.blocks)
        weights = stage_bytes(plan) * plan.steps / parts * rounds * plan.blocks
        return weights + 8.0 * (parts - 1) * plan.outputs * items * plan.rows

    parts = min((n for n in range(1, _PARTS + 1) if plan.steps % n == 0), key=cost)
    return plan if parts == 1 else replace(plan, parts=parts, dtype=jnp.dtype(jnp.float32))


def _with_ring(plan: Plan) -> Plan:
    """Fill the shared memory with stages; smaller ones, if it would hold fewer than three."""
    stages = min(_STAGES, (_SHARED - staging_bytes(plan)) // stage_bytes(plan))
    if stages < 3 and plan.units > 1:
        return _with_ring(replace(plan, units=max(n for n in range(1, plan.units) if plan.units * plan.steps % n == 0)))
    return replace(plan, stages=stages)
