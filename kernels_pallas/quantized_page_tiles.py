"""8-bit tiles for the Hopper kernels: a producer copies them into shared memory as they lie, and makes floats of them.

What the consumers then find in a slot of the ring is what a pool of q's dtype would hold: number times its token's
scale, rounded to that dtype. (The channels' scales are not the kernels' business: `pages.of_queries`, `of_results`.)
There are two raw tiles: while the producer converts one, the copies of the next are under way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic import Ref, copies_per_tile, load_tile, per_row
from .pages import Pages, QuantizedPages

_SIDE = 64  # of the part that is converted at a time, because producers have few registers
_TILES = 2


class RawPools(NamedTuple):
    """The pools of 8-bit keys and values."""

    k: Ref  # [N, P, Hk, D]
    v: Ref
    k_tokens: Ref  # [N, Hk, P] float32
    v_tokens: Ref


class RawBuffers(NamedTuple):
    """The raw tiles in shared memory."""

    k: Ref  # [tiles, rows, D]
    v: Ref
    k_tokens: Ref  # [tiles, rows] float32
    v_tokens: Ref


def scratch(rows: int, head_dim: int, dtypes: tuple[Any, Any], page_size: int) -> tuple[RawBuffers, Any]:
    """Describe the shared memory, and the barriers, of which each is full once a tile's copies have arrived."""

    def tiles(dtype: Any) -> Any:
        tiled: Any = plgpu.TilingTransform  # both are abstract as JAX annotates them
        swizzled: Any = plgpu.SwizzleTransform
        return plgpu.SMEM((_TILES, rows, head_dim), dtype, transforms=(tiled((8, _SIDE)), swizzled(_SIDE)))

    scales = plgpu.SMEM((_TILES, rows), jnp.float32)
    arrivals = 4 * copies_per_tile(rows, page_size)
    keys, values = map(tiles, dtypes)
    return RawBuffers(keys, values, scales, scales), plgpu.Barrier(num_barriers=_TILES, num_arrivals=arrivals)


def dtypes_of(k_pages: Pages, v_pages: Pages) -> tuple[Any, Any] | None:
    """Return the dtypes of 8-bit keys and values; None: they are floats."""
    if isinstance(k_pages, QuantizedPages) and isinstance(v_pages, QuantizedPages):
        return k_pages.dtype, v_pages.dtype
    return None


def arguments(k_pages: Pages, v_pages: Pages) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """Return the arrays of keys and values that a kernel takes, and those of their tokens' scales, if they have any."""
    if isinstance(k_pages, QuantizedPages) and isinstance(v_pages, QuantizedPages):
        return (k_pages.values, v_pages.values), (k_pages.tokens, v_pages.tokens)
    assert not isinstance(k_pages, QuantizedPages)
    assert not isinstance(v_pages, QuantizedPages)
    return (k_pages, v_pages), ()


def load_raw(
    pools: RawPools,
    page: Callable[[jax.Array], jax.Array],  # from a token to the id of its page
    base: jax.Array,
    head: jax.Array,
    buffers: RawBuffers,
    tile: jax.Array,
    barriers: Ref,
) -> None:
    """Start the copies of the tile whose first token is `base` into the raw tile of this number."""
    barrier = barriers.at[tile]
    load_tile(pools.k, page, base, head, buffers.k.at[tile], barrier)
    load_tile(pools.v, page, base, head, buffers.v.at[tile], barrier)
    for source, target in ((pools.k_tokens, buffers.k_tokens), (pools.v_tokens, buffers.v_tokens)):
        _load_scales(source, page, base, head, target.at[tile], barrier)


def _load_scales(
    tokens: Ref,  # [N, Hk, P]
    page: Callable[[jax.Array], jax.Array],
    base: jax.Array,
    head: jax.Array,
    target: Ref,  # [rows]
    barrier: Ref,
) -> None:
    rows, page_size = target.shape[0], tokens.shape[2]
    if page_size >= rows:
        offset = pl.multiple_of(lax.rem(base, page_size), rows)
        plgpu.copy_gmem_to_smem(tokens.at[page(base), head, pl.ds(offset, rows)], target, barrier)
        return

    @pl.loop(0, rows // page_size)
    def _copy(i: jax.Array) -> None:
        offset = pl.multiple_of(i * page_size, page_size)
        plgpu.copy_gmem_to_smem(tokens.at[page(base + offset), head], target.at[pl.ds(offset, page_size)], barrier)


def convert(raw: Ref, scales: Ref, target: Ref) -> None:
    """Write the floats of a raw tile [rows, D], whose tokens have these scales [rows], to shared memory.

    The tensor cores do not see them before `plgpu.commit_smem()`.
    """
    between = jnp.bfloat16 if raw.dtype == jnp.int8 else jnp.float16  # holds all numbers, and converts fast

    @pl.loop(0, raw.shape[0] // _SIDE)
    def _row(i: jax.Array) -> None:
        row = pl.multiple_of(i * _SIDE, _SIDE)
        scale = plgpu.load(scales.at[pl.ds(row, _SIDE)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

        @pl.loop(0, raw.shape[1] // _SIDE)
        def _column(j: jax.Array) -> None:
            column = pl.multiple_of(j * _SIDE, _SIDE)
            at = pl.ds(row, _SIDE), pl.ds(column, _SIDE)
            numbers = plgpu.load(raw.at[at], layout=plgpu.Layout.WGMMA, optimized=False)
            floats = numbers.astype(between).astype(jnp.float32)
            target.at[at][...] = (floats * per_row(scale, floats.shape)).astype(target.dtype)
