"""An experiment: products of a few rows with a large weight, as in a decode step, by a Mosaic GPU kernel and by XLA.

Not part of the engine. It moves into `kernels_pallas` when a measurement on a GPU shows that it pays; until then it
runs only in `gpu_suite.py`'s section `gemms` and in its tests.

Such a product takes as long as reading its weight, so the kernel is designed for that. Operands are swapped: 64 columns
of the weight are the rows of the tensor cores' tile and the few rows of x its columns, so that there is hardly any
padding. A producer warpgroup keeps a ring of weight tiles full, two consumers hold 64 columns each. Pieces of work are
(128 columns, part of K), distributed over as many blocks as there are multiprocessors. Partial sums are float32 and are
added in a fixed order by a second kernel, XLA's, which also transposes and rounds them. Only the shapes determine how K
is cut.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from twinmesh.kernels_pallas.mosaic import CONSUMERS, PRODUCER, Ref, launch, smem
from twinmesh.kernels_pallas.work import ceil_div
from twinmesh.scripts.gpu.facts import Facts
from twinmesh.scripts.gpu.timing import copy_bandwidth, noise, reason, seconds

_WIDTH = 128  # columns of the weight in a tile, 64 for each consumer
_DEPTH = 64  # rows of the weight in a tile
_SHARED = 220 * 1024  # bytes of shared memory for ring and staging
MOST_ROWS = 128

# Of Qwen3-8B: (K, N). The engine runs q, k, v and gate, up separately; fused they are qkv and gate_up.
SHAPES = {
    "o": (4096, 4096),
    "gate": (4096, 12288),
    "down": (12288, 4096),
    "head": (4096, 151936),
    "qkv": (4096, 6144),
    "gate_up": (4096, 24576),
    "k": (4096, 1024),
}
ROWS = (1, 32, 8, 128)


@dataclass(frozen=True)
class _Plan:
    rows: int  # of x, padded to a multiple of 8
    columns: int  # N
    depth: int  # K
    parts: int  # of K
    stages: int  # tiles in the ring
    blocks: int  # thread blocks

    @property
    def tiles(self) -> int:
        return self.columns // _WIDTH

    @property
    def steps(self) -> int:
        """Return the number of tiles of one piece of work."""
        return self.depth // _DEPTH // self.parts


# Jitted, so that layers of one shape share a trace and the kernel is lowered once a program.
@functools.partial(jax.jit, static_argnames=("cores", "interpret"))
def skinny_matmul(x: Array, weight: Array, *, cores: int, interpret: Any = None) -> Array:
    """Multiply x [M, K] by weight [K, N] for few rows.

    Args:
        x: up to 128 rows, bfloat16 or float16.
        weight: of x's dtype; K a multiple of 64, N a multiple of 128.
        cores: multiprocessors of the GPU.
        interpret: `plgpu.InterpretGPUParams()` to run on the CPU.

    Returns:
        [M, N] of x's dtype, summed in float32.

    Raises:
        ValueError: a shape or dtype does not fit; names it.
    """
    rows, (depth, columns) = x.shape[0], weight.shape
    if x.ndim != 2 or x.shape[1] != depth or not 1 <= rows <= MOST_ROWS:
        raise ValueError(
            f"x has shape {x.shape}: it must be [1 to {MOST_ROWS}, {depth}], as weight {weight.shape} asks."
        )
    if depth % _DEPTH or columns % _WIDTH:
        raise ValueError(
            f"weight has shape {weight.shape}: K must be a multiple of {_DEPTH} and N a multiple of {_WIDTH}."
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16) or weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: both must be bfloat16, or both float16.")
    padded = ceil_div(rows, 8) * 8
    plan = cut(padded, columns, depth, cores)
    sums = _stream(plan, jnp.pad(x, ((0, padded - rows), (0, 0))), weight, interpret)  # [parts, N, rows]
    return functools.reduce(jnp.add, sums).T[:rows].astype(x.dtype)


def cut(rows: int, columns: int, depth: int, cores: int) -> _Plan:
    """Choose the parts of K: so many that blocks share the work evenly, and so few that partial sums cost little."""
    tiles = columns // _WIDTH

    def cost(parts: int) -> float:
        pieces = tiles * parts
        rounds = ceil_div(pieces, cores)
        return 2.0 * depth * columns * rounds * cores / pieces + 8.0 * parts * columns * rows  # bytes

    parts = min((n for n in range(1, 33) if depth // _DEPTH % n == 0), key=cost)
    staging = 4 * CONSUMERS * 64 * rows
    stages = min(8, (_SHARED - staging) // (2 * _DEPTH * (_WIDTH + rows)))
    return _Plan(rows, columns, depth, parts, stages, min(cores, tiles * parts))


def _stream(plan: _Plan, x: Array, weight: Array, interpret: Any) -> Array:
    """Compute the partial sums [parts, N, rows] float32."""
    kernel = launch(
        functools.partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct((plan.parts, plan.columns, plan.rows), jnp.float32),
        scratch_types=dict(
            w_smem=smem((plan.stages, _DEPTH, _WIDTH), weight.dtype),
            x_smem=smem((plan.stages, plan.rows, _DEPTH), x.dtype),
            sum_smem=plgpu.SMEM((CONSUMERS, 64, plan.rows), jnp.float32),
            full=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=2),
            free=plgpu.Barrier(num_barriers=plan.stages, num_arrivals=CONSUMERS),
        ),
        blocks=plan.blocks,
        name="skinny_gemm",
        interpret=interpret,
    )
    sums: Array = kernel(x, weight)
    return sums


class _Ring(NamedTuple):
    """Tiles of the weight and of x, and the barriers of each slot."""

    weight: Ref  # [stages, _DEPTH, _WIDTH]
    x: Ref  # [stages, rows, _DEPTH]
    full: Ref  # barriers: both copies of a slot have arrived
    free: Ref  # barriers: both consumers have read a slot


def _kernel(
    plan: _Plan, x: Ref, weight: Ref, sums: Ref, *, w_smem: Ref, x_smem: Ref, sum_smem: Ref, full: Ref, free: Ref
) -> None:
    warpgroup, ring = lax.axis_index("warpgroup"), _Ring(w_smem, x_smem, full, free)
    pl.when(warpgroup == PRODUCER)(functools.partial(_produce, plan, x, weight, ring))
    pl.when(warpgroup < CONSUMERS)(functools.partial(_consume, plan, ring, sum_smem, sums))


def _mine(plan: _Plan) -> Array:
    """Count the pieces of work of this block."""
    pieces = plan.tiles * plan.parts
    return lax.div(pieces - lax.axis_index("block") + (plan.blocks - 1), plan.blocks)


def _piece(plan: _Plan, index: Array) -> tuple[Array, Array]:
    """Return tile and part of this block's piece number `index`."""
    at = lax.axis_index("block") + index * plan.blocks
    return lax.rem(at, plan.tiles), lax.div(at, plan.tiles)


def _produce(plan: _Plan, x: Ref, weight: Ref, ring: _Ring) -> None:
    """Keep the ring full."""
    plgpu.set_max_registers(40, action="decrease")
    total = _mine(plan) * plan.steps  # tiles that pass through the ring

    @pl.loop(0, total)
    def _load(use: Array) -> None:
        slot = lax.rem(use, plan.stages)
        tile, part = _piece(plan, lax.div(use, plan.steps))
        row = pl.ds(pl.multiple_of((part * plan.steps + lax.rem(use, plan.steps)) * _DEPTH, _DEPTH), _DEPTH)
        pl.when(use >= plan.stages)(functools.partial(plgpu.barrier_wait, ring.free.at[slot]))
        column = pl.ds(pl.multiple_of(tile * _WIDTH, _WIDTH), _WIDTH)
        plgpu.copy_gmem_to_smem(weight.at[row, column], ring.weight.at[slot], ring.full.at[slot])
        plgpu.copy_gmem_to_smem(x.at[:, row], ring.x.at[slot], ring.full.at[slot])

    for i in range(plan.stages):  # a warp that waits on a barrier must wait for all its phases
        pl.when(total > i)(functools.partial(plgpu.barrier_wait, ring.free.at[i]))


def _consume(plan: _Plan, ring: _Ring, sum_smem: Ref, sums: Ref) -> None:
    """Sum and write this warpgroup's 64 columns of each piece."""
    plgpu.set_max_registers(232, action="increase")
    warpgroup = lax.axis_index("warpgroup")

    @pl.loop(0, _mine(plan))
    def _store(index: Array) -> None:
        acc = _sum(plan, ring, index)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sum_smem[warpgroup] = acc
        plgpu.commit_smem()
        tile, part = _piece(plan, index)
        first = pl.multiple_of(tile * _WIDTH + warpgroup * 64, 64)
        plgpu.copy_smem_to_gmem(sum_smem.at[warpgroup], sums.at[part, pl.ds(first, 64)])

    plgpu.wait_smem_to_gmem(0)


def _sum(plan: _Plan, ring: _Ring, index: Array) -> Array:
    """Sum a piece to [64, rows], and free its slots of the ring."""
    columns = pl.ds(lax.axis_index("warpgroup") * 64, 64)

    def summed(acc: Ref) -> Array:
        @pl.loop(0, plan.steps)
        def _step(k: Array) -> None:
            use = index * plan.steps + k
            slot = lax.rem(use, plan.stages)
            plgpu.barrier_wait(ring.full.at[slot])
            plgpu.wgmma(acc, ring.weight.at[slot, :, columns].transpose((1, 0)), ring.x.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)  # the one before has read its tiles
            before = lax.rem(use + (plan.stages - 1), plan.stages)
            pl.when(k > 0)(functools.partial(plgpu.barrier_arrive, ring.free.at[before]))

        read: Array = acc[...]
        return read

    acc: Array = pl.run_scoped(summed, plgpu.WGMMAAccumulatorRef((64, plan.rows), jnp.float32))
    plgpu.barrier_arrive(ring.free.at[lax.rem(index * plan.steps + (plan.steps - 1), plan.stages)])
    return acc


def gemms(scale: float) -> Iterator[Facts]:
    """Measure the decode step's products: time, and bytes per second compared with a copy's in the same process."""
    copy = copy_bandwidth(4e9 * scale)
    yield {"copy_tb_s": copy / 1e12}
    for rows in ROWS:
        for name, shape in SHAPES.items():
            depth, columns = (max(128, int(size * scale) // 128 * 128) for size in shape)
            yield {"rows": {f"{name} {rows}": gemm_row(rows, depth, columns, copy)}}


def gemm_row(rows: int, depth: int, columns: int, copy: float) -> Facts:
    """Measure XLA's product and ours over weights that exceed the cache; if ours fails, null and the reason."""
    count = max(1, ceil_div(int(3e8), 2 * depth * columns)) if jax.default_backend() == "gpu" else 1
    weights = [noise((depth, columns), seed) for seed in range(count)]
    xs = [noise((rows, depth), seed + 100) for seed in range(count)]  # all different: XLA merges products of one x
    size = 2 * (depth * columns + rows * depth + rows * columns)

    def timed(product: Any) -> tuple[float, np.ndarray]:
        run = jax.jit(lambda xs, weights: [product(x, weight) for x, weight in zip(xs, weights, strict=True)])
        return seconds(run, xs, weights) / count, np.asarray(run(xs, weights)[0], np.float32)

    taken, want = timed(jnp.matmul)
    facts: Facts = {"xla_us": 1e6 * taken, "xla_of_copy": size / taken / copy}
    try:
        ours, got = timed(functools.partial(skinny_matmul, cores=jax.devices()[0].core_count))
    except Exception as error:  # not a Hopper GPU, or the compiler refuses
        return facts | {"pallas_us": None, "ratio": None, "reason": reason(error)}
    facts |= {"pallas_us": 1e6 * ours, "pallas_of_copy": size / ours / copy, "ratio": taken / ours}
    return facts | {"difference": float(np.linalg.norm(got - want) / np.linalg.norm(want))}
