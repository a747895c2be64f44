"""Bundles the arguments of both attentions and of what comes before, and checks them while a program is traced.

Not here: limits of single implementations (`mosaic.why_unsupported`), and checks of arrays' contents.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .pages import LARGEST, Pages, QuantizedPages
from .rotary import Rotation


class PagedKV(NamedTuple):
    """The pools, and the pages in them that R requests hold; see the package for the layouts."""

    k_pages: Pages  # [N, P, Hk, D]
    v_pages: Pages  # [N, P, Hk, D]
    page_table: Array  # [R, max_pages]
    kv_len: Array  # [R]
    first_page: Array = np.zeros(1, np.int32)  # type: ignore[assignment]  # [1], added to every id of `page_table`

    @property
    def capacity(self) -> int:
        """Return the most tokens that a request can hold."""
        return int(self.page_table.shape[1] * self.k_pages.shape[1])


class NewTokens(NamedTuple):
    """T tokens of a layer as projected, and where their keys and values go."""

    q: Array  # [T, Hq, D]
    k: Array  # [T, Hk, D]
    v: Array  # [T, Hk, D]
    rotation: Rotation
    slot: Array  # [T], page * P + offset; past the pool: written nowhere


class Pools(NamedTuple):
    """The pools that they go to."""

    k_pages: Pages  # [N, P, Hk, D]
    v_pages: Pages  # [N, P, Hk, D]
    first_page: Array  # [1], added to the page of every slot


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["sink"], meta_fields=["scale", "window", "softcap"]
)  # fmt: skip
@dataclass(frozen=True)
class AttentionOptions:
    """How scores become weights; see the package's functions. All but `sink` are static in a program."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sink: Array | None = None  # [Hq]


def check_attention(q: Array, kv: PagedKV, options: AttentionOptions) -> int:
    """Check the arguments of both attentions and return the number of requests.

    Raises:
        ValueError: one of them does not fit; names it.
    """
    _check_pages(kv.k_pages, kv.v_pages)
    kv_heads, head_dim = kv.k_pages.shape[2:]
    if q.ndim != 3 or q.shape[2] != head_dim or 0 in q.shape or q.shape[1] % kv_heads:
        raise ValueError(
            f"q has shape {q.shape}: it must be [1 or more rows, Hq, D] with Hq a multiple of k_pages' {kv_heads} "
            f"heads and D = {head_dim} as in k_pages."
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}: it must be a floating point type.")
    if kv.page_table.ndim != 2 or 0 in kv.page_table.shape:
        raise ValueError(f"page_table has shape {kv.page_table.shape}: it must be [R, max_pages], neither of them 0.")
    requests = kv.page_table.shape[0]
    check_ints("page_table", kv.page_table, kv.page_table.shape, "[R, max_pages]")
    check_ints("kv_len", kv.kv_len, (requests,), "[R], one per row of page_table")
    _check_options(q.shape[1], options)
    return requests


def as_first_page(first_page: int | Array) -> Array:
    """Return a layer's first page as `PagedKV` has it.

    Raises:
        ValueError: it is not one int32 that is not negative; an array's content is trusted.
    """
    if isinstance(first_page, int) and not isinstance(first_page, bool) and 0 <= first_page < 2**31:
        return jnp.full(1, first_page, jnp.int32)
    if not isinstance(first_page, Array):
        raise ValueError(f"first_page={first_page!r}: it must be a whole number, 0 or more, or an int32 array.")
    check_ints("first_page", first_page, (), "a scalar")
    return first_page.reshape(1)


def check_append(k_pages: Pages, v_pages: Pages, k: Array, v: Array, slot: Array) -> None:
    """Check the arguments of `append_kv`.

    Raises:
        ValueError: one of them does not fit; names it.
    """
    _check_pages(k_pages, v_pages)
    num_pages, page_size, kv_heads, head_dim = k_pages.shape
    for name, new in (("k", k), ("v", v)):
        if new.shape != (slot.shape[0] if slot.ndim else -1, kv_heads, head_dim):
            raise ValueError(
                f"{name} has shape {new.shape}: it must be [T, Hk, D] with T the length of slot (shape {slot.shape}) "
                f"and Hk, D = {kv_heads}, {head_dim} as in k_pages."
            )
        if not jnp.issubdtype(new.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {new.dtype}: it must be a floating point type.")
    check_ints("slot", slot, (k.shape[0],), "[T], as long as k")
    if num_pages * page_size >= 2**31:
        raise ValueError(f"k_pages has {num_pages * page_size} slots: N * P must be below 2**31, slots are int32.")


def check_rotation(q: Array, k: Array, rotation: Rotation, k_pages: Pages) -> None:
    """Check what `prepare_heads` takes besides the arguments of `append_kv`.

    Raises:
        ValueError: one of them does not fit; names it.
    """
    tokens, head_dim = q.shape[0], k_pages.shape[3]
    if q.ndim != 3 or q.shape[2] != head_dim or q.shape[1] % k_pages.shape[2] or q.dtype != k.dtype:
        raise ValueError(
            f"q is {q.dtype}{list(q.shape)}: it must be [T, Hq, D] with Hq a multiple of k_pages' heads, D as in "
            f"k_pages, {list(k_pages.shape)}, and dtype as k, {k.dtype}."
        )
    if (rotation.q_norm is None) != (rotation.k_norm is None):
        raise ValueError("rotation has one norm of q_norm and k_norm: it must have both or neither.")
    shapes = {
        "cos": (tokens, head_dim // 2),
        "sin": (tokens, head_dim // 2),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }
    for name, shape in shapes.items():
        array = getattr(rotation, name)
        if array is not None and (array.shape != shape or array.dtype != jnp.float32):
            raise ValueError(f"rotation.{name} is {array.dtype}{list(array.shape)}: it must be float32{list(shape)}.")


def check_ints(name: str, value: Array, shape: tuple[int, ...], wanted: str) -> None:
    """Check that an array is int32 and of this shape, which `wanted` describes.

    Raises:
        ValueError: it is not; names it.
    """
    if value.shape != shape or value.dtype != jnp.int32:
        raise ValueError(f"{name} is {value.dtype}{list(value.shape)}: it must be {wanted}, here int32{list(shape)}.")


def _check_options(query_heads: int, options: AttentionOptions) -> None:
    scale, window, softcap, sink = options.scale, options.window, options.softcap, options.sink
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: it must be a finite number.")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window={window!r}: it must be a whole number, 1 or more, or None.")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap!r}: it must be a finite number above 0, or None.")
    if sink is not None and (sink.shape != (query_heads,) or not jnp.issubdtype(sink.dtype, jnp.floating)):
        raise ValueError(
            f"sink is {sink.dtype}{list(sink.shape)}: it must be float [Hq] with Hq = {query_heads} as in q."
        )


def _check_pages(k_pages: Pages, v_pages: Pages) -> None:
    if k_pages.ndim != 4 or 0 in k_pages.shape:
        raise ValueError(f"k_pages has shape {k_pages.shape}: it must be [N, P, Hk, D], none of them 0.")
    if v_pages.shape != k_pages.shape:
        raise ValueError(f"v_pages has shape {v_pages.shape}: it must be as k_pages, {k_pages.shape}.")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if isinstance(pages, QuantizedPages):
            _check_scales(name, pages)
        elif not jnp.issubdtype(pages.dtype, jnp.floating) or pages.dtype in LARGEST:
            raise ValueError(
                f"{name} has dtype {pages.dtype}: it must be a floating point type of 16 or 32 bits, or 8-bit numbers "
                "with their scales, `QuantizedPages`."
            )


def _check_scales(name: str, pages: QuantizedPages) -> None:
    num_pages, page_size, kv_heads, head_dim = pages.shape
    if pages.dtype not in LARGEST:
        raise ValueError(f"{name} has dtype {pages.dtype}: 8-bit numbers are int8 or float8_e4m3fn.")
    for part, shape in (("tokens", (num_pages, kv_heads, page_size)), ("channels", (kv_heads, head_dim))):
        scales = getattr(pages, part)
        if scales.shape != shape or scales.dtype != jnp.float32:
            raise ValueError(f"{name}.{part} is {scales.dtype}{list(scales.shape)}: it must be float32{list(shape)}.")
