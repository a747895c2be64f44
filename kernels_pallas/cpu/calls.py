"""Calls of the kernels from programs: what they take, and the shapes that they give. Traced; without numba."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from ..arguments import AttentionOptions, PagedKV
from ..pages import Pages, QuantizedPages, of_queries, of_results
from ..work import ceil_div
from . import loader
from .jobs import MOST_ROWS
from .kernels import PAGES

DTYPES = ("float32", "bfloat16")
_NAMES = {"float8_e4m3fn": "fp8"}  # of dtypes, where kernels have a shorter one
_BLOCK = 128  # tokens: `attention.MOST_TOKENS`
_SPLITS = 32  # the most of a request, which bounds the room for their parts
_LOWEST = -1e30  # a sink that is none
# Query heads of a key/value head, and their length, of which a thread's stack holds enough for prompts.
_MOST_GROUP, _MOST_DIM = 32, 256


def product(x: Array, w: Array, *, by_output: bool) -> Array | None:
    """Multiply x [T, K] by w [K, N], or [N, K] if `by_output`: [T, N] float32. None where XLA has to.

    A row's result depends on that row alone. Derivatives are XLA's products.
    """
    if x.shape[0] > MOST_ROWS or x.dtype != w.dtype or w.dtype.name not in DTYPES or 0 in (*x.shape, *w.shape):
        return None
    target = loader.target(f"{'score' if by_output else 'product'}_{w.dtype.name}")
    return None if target is None else _product(target, by_output, x, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(target: str, by_output: bool, x: Array, w: Array) -> Array:
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[0 if by_output else 1]), jnp.float32)
    taken = x if loader.takes_bfloat16() else x.astype(jnp.float32)
    called: Array = jax.ffi.ffi_call(target, result, vmap_method="sequential")(taken, w)
    return called


@_product.defjvp
def _product_jvp(
    target: str, by_output: bool, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, w), (x_tangent, w_tangent) = primals, tangents
    tangent = plain_product(x_tangent, w, by_output=by_output) + plain_product(x, w_tangent, by_output=by_output)
    return _product(target, by_output, x, w), tangent


def plain_product(x: Array, w: Array, *, by_output: bool) -> Array:
    """Compute what `product` does, in XLA."""
    spelling = "tk,nk->tn" if by_output else "tk,kn->tn"
    return jnp.einsum(spelling, x, w, precision=precision(w.dtype), preferred_element_type=jnp.float32)


def precision(dtype: DTypeLike) -> jax.lax.Precision:
    """Choose full precision for float32: a GPU would otherwise multiply in TF32, which keeps 10 bits of mantissa."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def kernels_of(
    dtype: DTypeLike, pages: Iterable[tuple[DTypeLike, DTypeLike]], head_dim: int, *, has_matrices: bool
) -> list[str]:
    """Name the kernels that steps of a model may call, as `loader.compile_ahead` takes them.

    `pages` are the dtypes of keys and of values on each mesh; `has_matrices` says whether any weights are matrices of
    `dtype`; otherwise all of them are quantised.
    """
    name, tools = jnp.dtype(dtype).name, loader.toolchain()
    if name not in DTYPES or tools is None:
        return []
    products = [f"product_{name}", f"score_{name}"] if has_matrices else []
    found = dict.fromkeys(kind_of(*kinds) for kinds in pages) if head_dim % tools.level.lanes == 0 else ()
    return [*products, *(f"{kind}_{of}:{head_dim}" for of in found if of for kind in ("decode", "prefill"))]


def kind_of(keys: DTypeLike, values: DTypeLike) -> str | None:
    """Name the kinds of pages as kernels' names end; None: no kernel takes them."""
    kinds = tuple(_NAMES.get(jnp.dtype(dtype).name, jnp.dtype(dtype).name) for dtype in (keys, values))
    return next((name for name, taken in PAGES.items() if taken == kinds), None)


def _target(phase: str, q: Array, kv: PagedKV) -> str | None:
    """Find the kernel for these pages, if there is one."""
    tools, kind = loader.toolchain(), kind_of(kv.k_pages.dtype, kv.v_pages.dtype)
    if tools is None or kind is None or q.dtype.name not in DTYPES or q.shape[2] % tools.level.lanes:
        return None
    return loader.target(f"{phase}_{kind}", q.shape[2])


def _arrays(kv: PagedKV) -> tuple[Array, ...]:
    """Return pages, table, lengths and the first page, in the order of the kernels' arguments."""
    numbers = (pages.values if isinstance(pages, QuantizedPages) else pages for pages in (kv.k_pages, kv.v_pages))
    return (*numbers, kv.page_table, kv.kv_len, kv.first_page)


def _scales(kv: PagedKV) -> list[Array]:
    """Return the tokens' scales of keys and values; a number that is not read where they have none."""

    def of(pages: Pages) -> Array:
        return pages.tokens if isinstance(pages, QuantizedPages) else jnp.zeros(1, jnp.float32)

    return [of(kv.k_pages), of(kv.v_pages)]


def paged_decode_attention(q: Array, kv: PagedKV, options: AttentionOptions) -> Array | None:
    """Compute `attention.paged_decode_attention`; None where XLA has to."""
    rows, query_heads, head_dim = q.shape
    target = None if options.softcap is not None else _target("decode", q, kv)
    if target is None:
        return None
    window = options.window or 0
    reach = min(window, kv.capacity) or kv.capacity
    split = ceil_div(reach, _BLOCK * _SPLITS) * _BLOCK
    most = ceil_div(reach, split) + (window > 0)
    sink = jnp.full(query_heads, _LOWEST, jnp.float32) if options.sink is None else options.sink.astype(jnp.float32)
    results = [
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct((rows, most, query_heads, head_dim + 2), jnp.float32),
    ]
    scaled = of_queries(q.astype(jnp.float32) * options.scale, kv.k_pages)
    arrays = (scaled, *_arrays(kv), sink, *_scales(kv))
    with jax.named_scope("paged_decode_attention"):
        called = jax.ffi.ffi_call(target, results, vmap_method="sequential")(
            *arrays, split=np.int64(split), window=np.int64(window)
        )
    return of_results(called[0], kv.v_pages).astype(q.dtype)


def paged_prefill_attention(q: Array, kv: PagedKV, q_start: Array, options: AttentionOptions) -> Array | None:
    """Compute `attention.paged_prefill_attention`; None where XLA has to."""
    query_heads, head_dim = q.shape[1:]
    if options.softcap is not None or 0 in q.shape:
        return None
    if head_dim > _MOST_DIM or query_heads // kv.k_pages.shape[2] > _MOST_GROUP:
        return None
    target = _target("prefill", q, kv)
    if target is None:
        return None
    sink = jnp.full(query_heads, _LOWEST) if options.sink is None else options.sink.astype(jnp.float32)
    scaled = of_queries(q.astype(jnp.float32) * options.scale, kv.k_pages)
    arrays = (scaled, *_arrays(kv), sink, q_start, *_scales(kv))
    with jax.named_scope("paged_prefill_attention"):
        called: Array = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(q.shape, jnp.float32), vmap_method="sequential")(
            *arrays, window=np.int64(options.window or 0)
        )
    return of_results(called, kv.v_pages).astype(q.dtype)
