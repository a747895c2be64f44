"""Pages of keys or values: an array of floats, or 8-bit numbers with their scales.

A stored number stands for number * token * channel. `tokens` has a scale for each token and head, so that the largest
number of a head uses all of the format, whatever a model has computed; it is written with the token, and a page never
changes once it is full. `channels` has a scale for each channel, fixed for as long as a pool's pages live: channels of
keys differ by orders of magnitude in some models, and without it the small ones would be rounded to the largest one's
steps. Neither costs an inner loop anything: attention multiplies queries by the channels of keys and its results by
those of values, scores by the tokens' scales of keys and weights by those of values.

Not here: which numbers `channels` holds (`engine/worker/channel_scales.py`); where pages lie.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

# The formats of 8 bits, and the largest number of each.
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
_LEAST = 1e-30  # a token's scale at least: a token of zeros has one too


class QuantizedPages(NamedTuple):
    """Pages of 8-bit numbers; leading axes, such as of layers, may come before all of them."""

    values: Array  # [N, P, Hk, D] int8 or float8_e4m3fn
    tokens: Array  # [N, Hk, P] float32
    channels: Array  # [Hk, D] float32, above zero

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the numbers."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Return the number of axes of the numbers."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Return the dtype of the numbers."""
        return jnp.dtype(self.values.dtype)

    @property
    def nbytes(self) -> int:
        """Return the bytes of numbers and scales."""
        return self.values.nbytes + self.tokens.nbytes + self.channels.nbytes


# What the pages of a pool are, of keys or of values.
type Pages = Array | QuantizedPages


def quantize(x: Array, channels: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Round keys or values to 8 bits.

    Args:
        x: [..., Hk, D] float; a NaN or infinity makes its token's scale NaN or infinite, and so what it stands for NaN.
        channels: [Hk, D], scales of channels.
        dtype: one of `LARGEST`.

    Returns:
        The numbers [..., Hk, D] and the tokens' scales [..., Hk] float32.
    """
    largest = LARGEST[jnp.dtype(dtype)]
    scaled = x.astype(jnp.float32) / channels
    scales = jnp.maximum(jnp.abs(scaled).max(axis=-1) / largest, _LEAST)
    numbers = jnp.clip(scaled / scales[..., None], -largest, largest)
    return (jnp.round(numbers) if jnp.dtype(dtype) == jnp.int8 else numbers).astype(dtype), scales


def dequantize(values: Array, tokens: Array, channels: Array) -> Array:
    """Return what numbers [..., Hk, D] stand for, float32; `tokens` [..., Hk] are the scales of their tokens."""
    return values.astype(jnp.float32) * tokens[..., None] * channels


def gather(pages: Pages, ids: Array) -> Array:
    """Read whole pages: ids [...] -> [..., P, Hk, D], floats as they lie, 8-bit numbers as float32."""
    if not isinstance(pages, QuantizedPages):
        return pages[ids]
    return dequantize(pages.values[ids], jnp.swapaxes(pages.tokens[ids], -1, -2), pages.channels)


def of_queries(q: Array, k_pages: Pages) -> Array:
    """Multiply queries [R, Hq, D] by the channels of the keys that they will meet; the dtype stays."""
    return _by_channels(q, k_pages)


def of_results(out: Array, v_pages: Pages) -> Array:
    """Multiply results [R, Hq, D] by the channels of the values that they are sums of; the dtype stays."""
    return _by_channels(out, v_pages)


def _by_channels(x: Array, pages: Pages) -> Array:
    if not isinstance(pages, QuantizedPages):
        return x
    group = x.shape[1] // pages.channels.shape[0]
    return (x.astype(jnp.float32) * jnp.repeat(pages.channels, group, axis=0)).astype(x.dtype)
