"""The parts that the Mosaic GPU kernels for Hopper share: shared-memory layouts, loads of page tiles, products, masks.

A tile is `rows` consecutive tokens of one key/value head, [rows, D] in shared memory, tiled and swizzled as the tensor
cores require. Tiles begin at absolute multiples of `rows`, so the sums of a request do not depend on where a window, a
chunk or a split begins. `rows` is a multiple of the page size or divides it.

Invariants:
- A page is read only if it holds a visible token of the request. Other parts of a tile read such a page again, so that
  the copies of every tile have the same number of bytes, and are masked.
- Values of masked tokens are set to zero in shared memory before the product: 0 x NaN is NaN.

The interpreter on the CPU (`interpret`) takes the left operand of a product from shared memory only, and does not
support accumulators with an initial value; this is the only difference from the code that the GPU runs.
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

from .pages import Pages as StoredPages
from .pages import QuantizedPages

Ref = Any  # a Pallas reference; JAX gives them no public type

CONSUMERS = 2  # warpgroups of a block that multiply
PRODUCER = CONSUMERS  # index of the warpgroup that copies
WARPGROUP_ROWS = 64  # rows of the accumulator that one warpgroup holds
LOG2E = math.log2(math.e)
LOWEST = -1e30  # finite, so that a row without visible tokens so far never computes inf - inf
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
WIDEST_8_BITS = 128  # head_dim of 8-bit pages in prefill: with 256 its warpgroups need more registers than there are
FEWEST_SCALES = 32  # of a page's tokens: copies begin at multiples of 128 bytes in shared memory

_SWIZZLE = 128  # bytes of a swizzled row


@dataclass(frozen=True)
class Softmax:
    """How scores become weights."""

    scale: float  # as in the package's functions
    softcap: float | None  # as in the package's functions

    def prepared(self, scores: jax.Array) -> jax.Array:
        """Convert raw products to values that, times `factor`, are logits in base 2, the argument of exp2."""
        if self.softcap is not None:
            return jnp.tanh(scores * (self.scale / self.softcap)) * (self.softcap * LOG2E)
        return scores if self.scale > 0 else scores * (self.scale * LOG2E)

    @property
    def factor(self) -> float:
        """Return the part of the scale that is applied in the exponent, by a fused multiply-add; above zero."""
        return self.scale * LOG2E if self.softcap is None and self.scale > 0 else 1.0

    def online(self, peak: jax.Array, prepared: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Take one step of the online softmax over [M, N].

        `prepared` is -inf for tokens that are not visible. Returns the new peak [M] in base 2, the factor [M] on the
        sums so far, and the weights [M, N].
        """
        risen = jnp.maximum(peak, prepared.max(axis=1) * self.factor)
        weights = jnp.exp2(prepared * self.factor - per_row(risen, prepared.shape))
        return risen, jnp.exp2(peak - risen), weights


def why_unsupported(
    q: jax.Array, k_pages: StoredPages, v_pages: StoredPages, *, is_prefill: bool = False
) -> str | None:
    """Say in one sentence why these kernels do not support q [.., Hq, D] and pages [N, P, Hk, D]; None if they do."""
    page_size, kv_heads, head_dim = k_pages.shape[1:]
    group = q.shape[1] // kv_heads
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype}: the Hopper kernels take bfloat16 and float16."
    kinds = {isinstance(pages, QuantizedPages) for pages in (k_pages, v_pages)}
    if len(kinds) > 1 or (kinds == {False} and not k_pages.dtype == v_pages.dtype == q.dtype):
        return (
            f"k_pages are {k_pages.dtype}, v_pages {v_pages.dtype} and q {q.dtype}: the Hopper kernels take pages of "
            "q's dtype, or 8 bits for both keys and values."
        )
    if head_dim not in HEAD_DIMS:
        return f"k_pages has head_dim {head_dim}: the Hopper kernels take {_either(HEAD_DIMS)}."
    if kinds == {True} and is_prefill and head_dim > WIDEST_8_BITS:
        return f"k_pages of 8 bits have head_dim {head_dim}: the Hopper prefill kernel takes up to {WIDEST_8_BITS}."
    if kinds == {True} and page_size < FEWEST_SCALES:
        return f"k_pages has page_size {page_size}: the Hopper kernels take 8-bit pages of {FEWEST_SCALES} or more."
    if page_size not in PAGE_SIZES:
        return f"k_pages has page_size {page_size}: the Hopper kernels take {_either(PAGE_SIZES)}."
    if group > WARPGROUP_ROWS:
        return (
            f"q has {group} heads for each of k_pages' {kv_heads}: the Hopper kernels take up to {WARPGROUP_ROWS} "
            "query heads for a key/value head."
        )
    return None


def refuse(q: jax.Array, k_pages: StoredPages, v_pages: StoredPages, *, is_prefill: bool = False) -> None:
    """Raise the sentence of `why_unsupported` as a ValueError, if there is one."""
    reason = why_unsupported(q, k_pages, v_pages, is_prefill=is_prefill)
    if reason is not None:
        raise ValueError(reason)


def smem(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, swizzle: int = _SWIZZLE) -> Any:
    """Describe swizzled shared memory for operands of the tensor cores; the last axis is contiguous.

    `swizzle` is how many bytes of a row lie together.
    """
    columns = swizzle // jnp.dtype(dtype).itemsize
    tiled: Any = plgpu.TilingTransform  # both are abstract as JAX annotates them
    swizzled: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiled((8, columns)), swizzled(swizzle)))


def copies_per_tile(rows: int, page_size: int) -> int:
    """Count the copies that `load_tile` issues; each is an arrival on its barrier."""
    return max(1, rows // page_size)


@dataclass(frozen=True)
class RequestPages:
    """Finds the pages that hold the tiles of one request.

    If a tile is in one page, a loop over tiles carries the id of the next tile's page, read while this one is copied.
    """

    table: Ref  # [R, max_pages]
    first_page: jax.Array  # added to every id of the table
    request: jax.Array  # row of the table
    begin: jax.Array  # the first visible token
    end: jax.Array  # the token after the last visible one
    page_size: int
    rows: int  # tokens of a tile

    def of(self, token: jax.Array) -> jax.Array:
        """Read the id of a token's page; for a token that is not visible, of the nearest page with a visible one."""
        first, last = lax.div(self.begin, self.page_size), lax.div(self.end - 1, self.page_size)
        page = jnp.minimum(jnp.maximum(lax.div(token, self.page_size), first), last)
        found: jax.Array = self.table[self.request, page] + self.first_page
        return found

    @property
    def reads_ahead(self) -> bool:
        """Return whether each tile is in one page."""
        return copies_per_tile(self.rows, self.page_size) == 1

    def ahead(self, base: jax.Array, otherwise: jax.Array | None = None) -> jax.Array:
        """Return the value that the loop carries for the tile at `base`."""
        if self.reads_ahead:
            return self.of(base)
        return jnp.int32(0) if otherwise is None else otherwise

    def ids(self, ahead: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """Return the function from a token of the tile that `ahead` was carried for to the id of the token's page."""
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
        # A loop, because unrolled it takes more registers than a producer has.
        @pl.loop(0, rows // page_size)
        def _copy(i: jax.Array) -> None:
            offset = pl.multiple_of(i * page_size, page_size)
            source = pages.at[page(base + offset), :, head]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(offset, page_size)], barrier)


def full(shape: tuple[int, ...], value: float) -> jax.Array:
    """Make a float32 constant: [M, N] in the register layout of accumulators, or [M] in that of their rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    filled: jax.Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
    return filled


def per_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcast [M] -> [M, N]."""
    return lax.broadcast_in_dim(x, shape, (0,))


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Make int32 indices along an axis, in the register layout of accumulators."""
    indices: jax.Array = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    return indices


def product(a: Ref, b: Ref, after_issue: Callable[[], None] | None = None) -> jax.Array:
    """Multiply a [M, K] by b [N, K] transposed, both in shared memory, to float32 [M, N].

    `after_issue` runs while the tensor cores multiply.
    """

    def scores(acc: Ref) -> jax.Array:
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        if after_issue is not None:
            after_issue()
        read: jax.Array = acc[...]
        return read

    computed: jax.Array = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[0]), jnp.float32))
    return computed


def accumulate(acc: jax.Array, weights: jax.Array, values: Ref, staging: Ref | None) -> jax.Array:
    """Compute acc [M, D] + weights [M, K] @ values [K, D].

    `staging` [M, K] is shared memory for the interpreter, None on a GPU.
    """
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
    """Convert sinks to float32 logits [Hq] in base 2; without sinks, to logits of weight 0."""
    if sink is None:
        return jnp.full(heads, LOWEST)
    return jnp.maximum(sink.astype(jnp.float32) * LOG2E, LOWEST)


def zero_hidden_rows(values: Ref, base: jax.Array, begin: jax.Array, end: jax.Array) -> None:
    """Zero the rows of a tile [rows, D] in shared memory whose tokens, base + row, are not in begin to end - 1.

    The tensor cores see the zeros in products of the calling warpgroup, and of others after a barrier.
    """
    height = width = 64  # in a loop over small parts, because producers have few registers

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
    """Make the options of every kernel: exp2 and tanh run on the special function unit."""
    return plgpu.CompilerParams(approx_math=True)


def launch(
    body: Callable[..., None], *, out_type: Any, scratch_types: Any, blocks: int, name: str, interpret: Any
) -> Callable[..., Any]:
    """Make a kernel of `blocks` thread blocks, each with the consumers' warpgroups and a producer.

    Its axes are "block" and "warpgroup".
    """
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
