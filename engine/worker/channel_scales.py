"""The channels' scales of 8-bit keys and values: what a probe's keys and values measure in a model.

The probe is a fixed sequence of token ids, spread evenly over the vocabulary, so that scales hang on the parameters
alone: not on anything that a request brings. Pages can then be shared between requests, stay as they are once they are
full, and are the same however a prompt was cut into chunks or sent. How large a token's numbers are besides is its own
scale (`kernels_pallas/pages.py`), so nothing is ever cut off: what a probe's channels tell is how errors are divided.
Rotation mixes the two channels of a pair, which therefore have one scale.

One mesh measures, and all meshes are given its numbers (`share`), because pages that move are read with the scales of
where they arrive, and a model divided otherwise computes other last bits.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ...kernels_pallas.rotary import Rotation
from ...models.config import ModelConfig
from ...models.decoder import Decoder, dense_causal
from ..kv_dtypes import KVDtype
from ..sizing.cache_groups import groups
from .kv_cache import KVCache, Scales, jax_dtype

_LEAST = 1e-3  # of a head's largest scale: channels that are always zero have some scale too
_TOKENS = 256
# Knuth, The Art of Computer Programming 3, section 6.4: multiples of 2^32 / golden ratio are spread evenly below 2^32.
_STRIDE = 2654435761


type _Found = tuple[tuple[jax.Array, jax.Array], ...]  # of each layer so far, the scales of keys and of values


class Measures(Protocol):
    """A mesh that can measure channels, or is given those of another."""

    @property
    def has_scales(self) -> bool:
        """Return whether it stores or sends 8-bit pages."""
        ...

    def measure_scales(self) -> Scales:
        """Compute the scales of the model's layers and heads, on the host."""
        ...

    def use_scales(self, scales: Scales) -> None:
        """Give its pools these scales, from here on."""
        ...


def share(meshes: Sequence[Measures]) -> None:
    """Have the first mesh that has 8-bit pages measure the channels, for all that have such pages.

    It is the one that has the program for it (`MeshPlan.measures_scales`).
    """
    concerned = [mesh for mesh in meshes if mesh.has_scales]
    if not concerned:
        return
    scales = concerned[0].measure_scales()
    for mesh in concerned:
        mesh.use_scales(scales)


def probe(vocab_size: int) -> np.ndarray:
    """Make the probe: [256] int32 ids, spread over the vocabulary."""
    spread = np.arange(1, _TOKENS + 1, dtype=np.uint64) * np.uint64(_STRIDE) % np.uint64(2**32)
    return (spread * np.uint64(vocab_size) >> np.uint64(32)).astype(np.int32)


def measure(decoder: Decoder) -> Scales:
    """Pass the probe through all layers, and measure their channels.

    Everything of heads is computed where the heads are: nothing of a token is gathered.
    """
    dense = dense_causal(decoder.config)

    def attend(
        kv: _Found,
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rotation: Rotation,
        sink: jax.Array | None,
        rows: None,
    ) -> tuple[jax.Array, _Found]:
        attended, _ = dense(None, layer, q, k, v, rotation, sink, rows)
        first, second = jnp.split(_largest(rotation.apply(q, k)[1]), 2, axis=-1)
        keys = jnp.tile(jnp.maximum(first, second), 2)
        return attended, (*kv, (_scales(keys), _scales(_largest(v))))

    tokens = jnp.asarray(probe(decoder.config.vocab_size))
    nothing: _Found = ()
    _, found = decoder.hidden(tokens, jnp.arange(_TOKENS, dtype=jnp.int32), attend, nothing, None)
    keys, values = zip(*found, strict=True)
    return Scales(jnp.stack(keys), jnp.stack(values))


def of_groups(scales: Scales, model: ModelConfig, kv: KVDtype) -> tuple[KVCache, ...]:
    """Take the scales of each cache group's layers, of keys and values that have 8 bits; None for others."""

    def of(side: jax.Array, name: str, layers: tuple[int, ...]) -> jax.Array | None:
        return side[np.array(layers)] if jax_dtype(name).itemsize == 1 else None

    return tuple(
        KVCache(of(scales.k, kv.k, group.layers), of(scales.v, kv.v, group.layers))  # type: ignore[arg-type]
        for group in groups(model)
    )


def _largest(x: jax.Array) -> jax.Array:
    """Find each channel's largest number, by magnitude: [T, Hk, D] -> [Hk, D] float32."""
    return jnp.abs(x.astype(jnp.float32)).max(axis=0)


def _scales(sizes: jax.Array) -> jax.Array:
    """Turn sizes [Hk, D] into scales above zero; a head whose numbers overflow has channels of one scale."""
    largest = sizes.max(axis=-1, keepdims=True)
    scales = jnp.maximum(sizes, jnp.maximum(_LEAST * largest, 1e-20))
    return jnp.where(jnp.isfinite(largest), scales, 1.0)
