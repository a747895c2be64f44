"""Combines the splits of each request's decode attention, with one thread block per request and query head.

Partial sums are read several at a time, whatever their number, and in order: neither the order nor the grouping depends
on the batch. An attention sink is one more logit, without a value.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic import LOWEST, Ref, compiler_params, sinks_in_base_2

_THREADS = 128


def combine_splits(
    sums: Array, logs: Array, start: Array, sink: Array | None, group: int, dtype: jax.typing.DTypeLike, interpret: Any
) -> Array:
    """Add up each request's partial sums, weighted by the logarithms that come with them.

    Args:
        sums: [U, parts, Hk, rows, D] float32; rows of a head past the first `group` are padding.
        logs: [U, parts, Hk, rows] float32, base-2 logarithms of the sums' weights.
        start: [R + 1] int32; request r has splits start[r] to start[r + 1] - 1; without any, its result is zeros.
        sink: [Hq] float, or None.
        group: query heads per key/value head.
        dtype: of the result.
        interpret: as `plgpu.kernel` takes it.

    Returns:
        [R, Hq, D] of `dtype`.
    """
    requests, head_dim, heads = start.shape[0] - 1, sums.shape[-1], sums.shape[2] * group
    kernel = plgpu.kernel(
        functools.partial(_kernel, group),
        out_type=jax.ShapeDtypeStruct((requests, heads, head_dim), dtype),
        scratch_types=[plgpu.SMEM((head_dim,), dtype)],
        grid=(requests, heads),
        grid_names=("request", "head"),
        compiler_params=compiler_params(),
        kernel_name="combine_splits",
        interpret=interpret,
    )
    combined: Array = kernel(sums, logs, start, sinks_in_base_2(sink, heads))
    return combined


def _kernel(group: int, sums: Ref, logs: Ref, start: Ref, sinks: Ref, out: Ref, staged: Ref) -> None:
    request, head = lax.axis_index("request"), lax.axis_index("head")
    kv_head, row = lax.div(head, group), lax.rem(head, group)
    parts, head_dim = sums.shape[1], sums.shape[-1]
    at_once = 8 if head_dim % _THREADS == 0 else 4  # partial sums whose reads are in flight together
    first = start[request] * parts
    count = start[request + 1] * parts - first

    def several(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, peak, total = state
        terms = []
        for j in range(at_once):
            index = i * at_once + j
            part = first + jnp.minimum(index, count - 1)
            at = (lax.div(part, parts), lax.rem(part, parts), kv_head, row)
            log = jnp.where(index < count, logs[at], jnp.float32(LOWEST))
            terms.append((log, _load(sums.at[*at])))
        risen = functools.reduce(jnp.maximum, [log for log, _ in terms], peak)
        rescale = jnp.exp2(peak - risen)
        acc, total = acc * rescale, total * rescale
        for log, values in terms:
            weight = jnp.exp2(log - risen)
            acc, total = acc + values * weight, total + weight
        return acc, risen, total

    zero = plgpu.layout_cast(jnp.zeros((head_dim,), jnp.float32), _layout(head_dim))
    init = (zero, sinks[head], jnp.float32(1.0))
    acc, _, total = lax.fori_loop(0, lax.div(count + (at_once - 1), at_once), several, init)
    staged[...] = (acc / total).astype(staged.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, out.at[request, head])
    plgpu.wait_smem_to_gmem(0)


def _load(ref: Ref) -> Array:
    return plgpu.load(ref, layout=_layout(ref.shape[0]), optimized=False)


def _layout(head_dim: int) -> Any:
    """Choose the layout of [D] in a warpgroup's registers; with fewer columns than threads, each is held repeatedly."""
    if head_dim % _THREADS:
        return plgpu.Layout.WGMMA.reduce(0)
    return plgpu.Layout.WG_STRIDED((head_dim,), 1)
