"""The channels' scales of 8-bit keys and values, from a model's parameters alone.

A channel's scale is what its keys, or values, are expected to measure: the input of a projection has passed a norm, so
its elements are about as large as the norm's weights, and an output is a sum of so many products of them plus a bias
(models with large biases have keys whose channels differ by orders of magnitude). Where keys pass a norm of their own,
its weights are their size. Rotation mixes the two channels of a pair, which therefore have one scale.

It hangs on nothing that a request brings, so that pages can be shared between requests, stay as they are once they are
full, and are the same however a prompt was cut into chunks or sent. How large a token's numbers are besides is its own
scale (`kernels_pallas/pages.py`), so nothing is ever cut off.
"""

import jax
import jax.numpy as jnp

from ...kernels_pallas.quantized import QuantizedArray, parameter
from ...models.config import ModelConfig
from ...models.decoder import Block, Decoder
from ...models.layers import value
from ..kv_dtypes import KVDtype
from ..sizing.cache_groups import groups
from .kv_cache import KVCache, Scales, jax_dtype

_LEAST = 1e-3  # of a head's largest scale: channels that are always zero have some scale too


def channel_scales(decoder: Decoder) -> Scales:
    """Compute the scales of all layers' channels."""
    keys, values = zip(*(_of_layer(block, decoder.config) for block in decoder.layers), strict=True)
    return Scales(jnp.stack(keys), jnp.stack(values))


def of_groups(scales: Scales, model: ModelConfig, kv: KVDtype) -> tuple[KVCache, ...]:
    """Take the scales of each cache group's layers, of keys and values that have 8 bits; None for others."""

    def of(side: jax.Array, name: str, layers: tuple[int, ...]) -> jax.Array | None:
        return side[jnp.array(layers)] if jax_dtype(name).itemsize == 1 else None

    return tuple(
        KVCache(of(scales.k, kv.k, group.layers), of(scales.v, kv.v, group.layers))  # type: ignore[arg-type]
        for group in groups(model)
    )


def _of_layer(block: Block, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Compute the scales [Hk, D] of a layer's keys and values."""
    attention, norm = block.attention, value(block.attention_norm.weight)
    k, v = (_squares(weight.get_value(), norm) for weight in (attention.k_proj, attention.v_proj))
    if config.qkv_bias:
        k = k + value(attention.k_bias).astype(jnp.float32) ** 2
        v = v + value(attention.v_bias).astype(jnp.float32) ** 2
    if config.qk_norm:
        k = jnp.broadcast_to(value(attention.k_norm.weight) ** 2, k.shape)
    first, second = jnp.split(k, 2, axis=-1)
    return _scales(jnp.tile((first + second) / 2, 2)), _scales(v)


def _squares(weight: jax.Array | QuantizedArray, norm: jax.Array) -> jax.Array:
    """Sum the squares of a projection's columns [E, Hk, D], whose inputs are as large as `norm` [E]: [Hk, D]."""
    full = parameter(weight) if isinstance(weight, QuantizedArray) else weight
    return jnp.einsum("ehd,e->hd", jnp.square(full.astype(jnp.float32)), jnp.square(norm))


def _scales(squares: jax.Array) -> jax.Array:
    """Turn expected squares [Hk, D] into scales."""
    scales = jnp.sqrt(squares)
    return jnp.maximum(scales, jnp.maximum(_LEAST * scales.max(axis=-1, keepdims=True), 1e-20))
