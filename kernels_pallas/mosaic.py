"""What the Mosaic GPU kernels for Hopper share: shared-memory layouts, loads of page tiles, products, masks.

A tile is `rows` consecutive tokens of one key/value head, [rows, D] in shared memory, tiled and swizzled as the tensor
cores want it. Tiles begin at absolute multiples of `rows`, so the sums of a request do not depend on where a window, a
chunk or a split begins. `rows` is a multiple of the page size or divides it.

Invariants:
- A page is read only if it holds a visible token of the request; other parts of a tile read such a page again, so that
  every tile announces the same number of bytes, and are masked.
- Values of masked tokens are set to zero in shared memory before the product: 0 x NaN is NaN.

The interpreter on the CPU (`interpret`) takes the left operand of a product only from shared memory and knows no
accumulators that begin with a value; that is the only difference between what it runs and what the GPU runs.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any  # a Pallas reference; JAX gives them no public type

CONSUMERS = 2  # warpgroups of a block that multiply
PRODUCER = CONSUMERS  # the warpgroup that copies
WARPGROUP_ROWS = 64  # rows of the accumulator that one warpgroup holds
LOG2E = math.log2(math.e)
LOWEST = -1e30  # finite, so that a row which has seen nothing yet stays free of inf - inf
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)

_SWIZZLE = 128  # bytes of a swizzled row


@dataclass(frozen=True)
class Softmax:
    """How scores become weights; `scale` and `softcap` as in the package."""

    scale: float
    softcap: float | None

    def prepared(self, scores: jax.Array) -> jax.Array:
        """Raw products to what `factor` turns into logits in base 2, so that exp2 takes them as they are."""
        if self.softcap is not None:
            return jnp.tanh(scores * (self.scale / self.softcap)) * (self.softcap * LOG2E)
        return scores if self.scale > 0 else scores * (self.scale * LOG2E)

    @property
    def factor(self) -> float:
        """Left to the exponent, where it is part of a fused multiply-add; above zero."""
        return self.scale * LOG2E if self.softcap is None and self.scale > 0 else 1.0

    def online(self, peak: jax.Array, prepared: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One step of the online softmax over [M, N]: the new peak (base 2), the rescale of what was summed, weights.

        `prepared` is -inf where nothing is visible.
        """
        risen = jnp.maximum(peak, prepared.max(axis=1) * self.factor)
        weights = jnp.exp2(prepared * self.factor - per_row(risen, prepared.shape))
        return risen, jnp.exp2(peak - risen), weights


def why_unsupported(q: jax.Array, k_pages: jax.Array) -> str | None:
    """One sentence on what these kernels do not take of q [.., Hq, D] and k_pages [N, P, Hk, D]; None if they do."""
    page_size, kv_heads, head_dim = k_pages.shape[1:]
    group = q.shape[1] // kv_heads
    if k_pages.dtype not in DTYPES:
        return f"k_pages has dtype {k_pages.dtype}: the Hopper kernels take bfloat16 and float16."
    if head_dim not in HEAD_DIMS:
        return f"k_pages has head_dim {head_dim}: the Hopper kernels take {_either(HEAD_DIMS)}."
    if page_size not in PAGE_SIZES:
        return f"k_pages has page_size {page_size}: the Hopper kernels take {_either(PAGE_SIZES)}."
    if group > WARPGROUP_ROWS:
        return (
            f"q has {group} heads for each of k_pages' {kv_heads}: the Hopper kernels take up to {WARPGROUP_ROWS} "
            "query heads for a key/value head."
        )
    return None


def refuse(q: jax.Array, k_pages: jax.Array) -> None:
    """Raise `why_unsupported` as a ValueError, if there is a reason."""
    reason = why_unsupported(q, k_pages)
    if reason is not None:
        raise ValueError(reason)


def smem(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """Shared memory for operands of the tensor cores, swizzled; the last axis is contiguous."""
    columns = _SWIZZLE // jnp.dtype(dtype).itemsize
    tiled: Any = plgpu.TilingTransform  # both are abstract as JAX annotates them
    swizzled: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiled((8, columns)), swizzled(_SWIZZLE)))


def copies_per_tile(rows: int, page_size: int) -> int:
    """Copies that `load_tile` issues, each an arrival on its barrier."""
    return max(1, rows // page_size)


@dataclass(frozen=True)
class Pages:
    """Where the tiles of `rows` tokens of one request come from; its visible tokens are begin to end - 1.

    A loop over tiles carries the id of the next one's page if that is all a tile needs: read while this one is copied.
    """

    table: Ref  # [R, max_pages]
    request: jax.Array
    begin: jax.Array
    end: jax.Array
    page_size: int
    rows: int

    def of(self, token: jax.Array) -> jax.Array:
        """The id of a token's page; of a token that is not visible, the nearest page that holds one that is."""
        first, last = lax.div(self.begin, self.page_size), lax.div(self.end - 1, self.page_size)
        page = jnp.minimum(jnp.maximum(lax.div(token, self.page_size), first), last)
        found: jax.Array = self.table[self.request, page]
        return found

    @property
    def reads_ahead(self) -> bool:
        """Whether a tile lies in one page."""
        return copies_per_tile(self.rows, self.page_size) == 1

    def ahead(self, base: jax.Array, otherwise: jax.Array | None = None) -> jax.Array:
        """What the loop carries for the tile at `base`."""
        if self.reads_ahead:
            return self.of(base)
        return jnp.int32(0) if otherwise is None else otherwise

    def ids(self, ahead: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """From a token of the tile that `ahead` was carried for to the id of its page."""
        return (lambda _: ahead) if self.reads_ahead else self.of


def load_tile(
    pages: Ref,  # [N, P, Hk, D]
    page: Callable[[jax.Array], jax.Array],  # from a token to the id of its page
    base: jax.Array,
    head: jax.Array,
    target: Ref,  # [rows, D] in shared memory
    barrier: Ref,
) -> None:
    """Start the copies of the tile whose first token is `base`; `barrier` completes when they have arrived."""
    rows, page_size = target.shape[0], pages.shape[1]
    if page_size > rows:
        offset = pl.multiple_of(lax.rem(base, page_size), rows)
        plgpu.copy_gmem_to_smem(pages.at[page(base), pl.ds(offset, rows), head], target, barrier)
    elif page_size == rows:
        plgpu.copy_gmem_to_smem(pages.at[page(base), :, head], target, barrier)
    else:
        # A loop: unrolled, it takes more registers than a producer has.
        @pl.loop(0, rows // page_size)
        def _copy(i: jax.Array) -> None:
            offset = pl.multiple_of(i * page_size, page_size)
            source = pages.at[page(base + offset), :, head]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(offset, page_size)], barrier)


def full(shape: tuple[int, ...], value: float) -> jax.Array:
    """A float32 constant [M, N] as accumulators lie in registers, or [M] as their rows' statistics do."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    filled: jax.Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
    return filled


def per_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[M] -> [M, N]."""
    return lax.broadcast_in_dim(x, shape, (0,))


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Indices along an axis, int32, as accumulators lie in registers."""
    indices: jax.Array = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    return indices


def product(a: Ref, b: Ref, after_issue: Callable[[], None] | None = None) -> jax.Array:
    """a [M, K] @ b [N, K] transposed, both in shared memory: float32 [M, N]; `after_issue` runs meanwhile."""

    def scores(acc: Ref) -> jax.Array:
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        if after_issue is not None:
            after_issue()
        read: jax.Array = acc[...]
        return read

    computed: jax.Array = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32))
    return computed


def accumulate(acc: jax.Array, weights: jax.Array, values: Ref, staging: Ref | None) -> jax.Array:
    """acc [M, D] + weights [M, K] @ values [K, D]; `staging` [M, K] in shared memory when interpreted, else None."""
    added: jax.Array
    if staging is None:
        begun = plgpu.WGMMAAccumulatorRef.init(acc)
        added = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(begun)
        return added
    staging[...] = weights
    plgpu.commit_smem()

    def summed(ref: Ref) -> jax.Array:
        plgpu.wgmma(ref, staging, values)
        read: jax.Array = ref[...]
        return read

    added = acc + pl.run_scoped(summed, plgpu.WGMMAAccumulatorRef((acc.shape[0], acc.shape[1]), jnp.float32))
    return added


def sinks_in_base_2(sink: jax.Array | None, heads: int) -> jax.Array:
    """[Hq] float32 for exponents of 2; as good as none where there is none."""
    if sink is None:
        return jnp.full(heads, LOWEST)
    return jnp.maximum(sink.astype(jnp.float32) * LOG2E, LOWEST)


def zero_hidden_rows(values: Ref, base: jax.Array, begin: jax.Array, end: jax.Array) -> None:
    """Zero the rows of a tile [rows, D] in shared memory whose tokens, base + row, are not in begin to end - 1.

    For the tensor cores to read: the caller's warpgroup only, unless a barrier follows.
    """
    height = width = 64  # a few registers at a time, and in a loop: producers have no more

    @pl.loop(0, values.shape[0] // height)
    def _row(i: jax.Array) -> None:
        @pl.loop(0, values.shape[1] // width)
        def _column(j: jax.Array) -> None:
            row = pl.multiple_of(i * height, height)
            part = values.at[pl.ds(row, height), pl.ds(pl.multiple_of(j * width, width), width)]
            token = iota((height, width), 0) + (base + row)
            kept = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
            part[...] = jnp.where((token >= begin) & (token < end), kept, jnp.zeros_like(kept))

    plgpu.commit_smem()


def _either(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" and {values[-1]}"


@functools.cache
def compiler_params() -> Any:
    """For every kernel: exp2 and tanh by the special function unit."""
    return plgpu.CompilerParams(approx_math=True)


def launch(
    body: Callable[..., None], *, out_type: Any, scratch_types: Any, blocks: int, name: str, interpret: Any
) -> Callable[..., Any]:
    """A kernel of so many blocks, each of a producer warpgroup and the consumers; axes "block" and "warpgroup"."""
    kernel: Callable[..., Any] = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        kernel_name=name,
        interpret=interpret,
    )
    return kernel
