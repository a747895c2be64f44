"""Prepares the heads of a layer for attention on Hopper in one kernel: norm, rotation, and the append to the pages.

A thread block has one token. Its heads arrive in one copy, queries first, then keys, then values; queries and keys are
normed and rotated in place in shared memory, 64 heads at a time, and copies take queries to the result and keys and
values to their slot. The pools are written in place: nothing else of them is touched.

XLA would need eight kernels for this (one for each half of the heads, among others), and as many launches a layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .arguments import NewTokens, Pools
from .mosaic import WARPGROUP_ROWS, Ref, compiler_params, iota, per_row, refuse
from .work import ceil_div

_COLUMNS = 32  # of a half of the heads at a time: more take registers from the blocks that could run beside this one


# Jitted, so that the layers of a model share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("interpret",))
def prepare_heads(new: NewTokens, pools: Pools, *, interpret: Any = None) -> tuple[Array, Array, Array]:
    """See `attention.prepare_heads`.

    Raises:
        ValueError: a dtype, head_dim, page size or number of heads that the kernel does not support; names it.
    """
    q, k, v, rotation, slot = new
    refuse(q, pools.k_pages, pools.v_pages)
    with jax.named_scope("prepare_heads"):
        # Three slices of one product, which XLA then does not cut.
        heads = jnp.concatenate([x.reshape(x.shape[0], -1) for x in (q, k, v)], axis=1)
        heads = heads.reshape(q.shape[0], -1, q.shape[2])
        norms = () if rotation.q_norm is None else (rotation.q_norm, rotation.k_norm)
        k_ref, v_ref = jax.new_ref(pools.k_pages), jax.new_ref(pools.v_pages)
        rows = ceil_div(q.shape[1] + k.shape[1], WARPGROUP_ROWS) * WARPGROUP_ROWS
        kernel = plgpu.kernel(
            functools.partial(_kernel, rotation.eps, bool(norms)),
            out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
            scratch_types=[plgpu.SMEM((max(rows, heads.shape[1]), q.shape[2]), q.dtype), plgpu.Barrier()],
            grid=(q.shape[0],),
            grid_names=("token",),
            compiler_params=compiler_params(),
            kernel_name="prepare_heads",
            interpret=interpret,
        )
        prepared = kernel(heads, rotation.cos, rotation.sin, *norms, slot, pools.first_page, k_ref, v_ref)
        return prepared, jax.freeze(k_ref), jax.freeze(v_ref)


def _kernel(eps: float, has_norms: bool, heads: Ref, cos: Ref, sin: Ref, *refs: Ref) -> None:
    norms, (slot, first_page, k_pages, v_pages, out, smem, arrived) = refs[: 2 * has_norms], refs[2 * has_norms :]
    token = lax.axis_index("token")
    count, query_heads, kv_heads = heads.shape[1], out.shape[1], k_pages.shape[2]
    plgpu.copy_gmem_to_smem(heads.at[token], smem.at[pl.ds(0, count)], arrived)
    at = slot[token]
    plgpu.barrier_wait(arrived)
    for first in range(0, query_heads + kv_heads, WARPGROUP_ROWS):
        _rotate_rows(smem, first, query_heads, kv_heads, (cos.at[token], sin.at[token]), norms, eps)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, query_heads)], out.at[token])
    page_size = k_pages.shape[1]
    page = lax.div(at, page_size) + first_page[0]

    @pl.when(page < k_pages.shape[0])
    def _append() -> None:
        offset = lax.rem(at, page_size)
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(query_heads, kv_heads)], k_pages.at[page, offset])
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(query_heads + kv_heads, kv_heads)], v_pages.at[page, offset])

    plgpu.wait_smem_to_gmem(0)


def _rotate_rows(
    smem: Ref,  # [rows, D]
    first: int,
    query_heads: int,
    kv_heads: int,
    angles: tuple[Ref, Ref],  # cosine and sine, [D / 2] each
    norms: tuple[Ref, ...],  # weights [D] of queries and keys, or none
    eps: float,
) -> None:
    """Norm and rotate the 64 rows from `first` on in place; rows of values stay what they are."""
    half, width = smem.shape[1] // 2, min(_COLUMNS, smem.shape[1] // 2)
    shape = (WARPGROUP_ROWS, width)
    row = iota(shape, 0) + first

    def part(column: int) -> Ref:
        return smem.at[pl.ds(first, WARPGROUP_ROWS), pl.ds(column, width)]

    scale = None
    if norms:
        squares = [(x * x).sum(axis=1) for x in (_tile(part(column)) for column in range(0, 2 * half, width))]
        scale = per_row(lax.rsqrt(sum(squares[1:], squares[0]) * (1.0 / (2 * half)) + eps), shape)

    def normed(column: int) -> Array:
        x = _tile(part(column))
        if scale is None:
            return x
        of_q, of_k = (_per_column(_vector(norm.at[pl.ds(column, width)]), shape) for norm in norms)
        weighted = x * scale * jnp.where(row < query_heads, of_q, of_k)
        return weighted.astype(smem.dtype).astype(jnp.float32)

    for column in range(0, half, width):
        first_half, second_half = normed(column), normed(column + half)
        cos, sin = (_per_column(_vector(angle.at[pl.ds(column, width)]), shape) for angle in angles)
        turned = (first_half * cos - second_half * sin, second_half * cos + first_half * sin)
        for at, new in zip((column, column + half), turned, strict=True):
            part(at)[...] = jnp.where(row < query_heads + kv_heads, new, _tile(part(at))).astype(smem.dtype)


def _tile(ref: Ref) -> Array:
    loaded = plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
    return loaded.astype(jnp.float32)


def _vector(ref: Ref) -> Array:
    """Load [N] in the register layout of an accumulator's columns."""
    loaded: Array = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return loaded


def _per_column(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcast [N] -> [M, N]."""
    return lax.broadcast_in_dim(x, shape, (1,))
