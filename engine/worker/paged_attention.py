"""The engine's `Attend`: paged attention for the decoder, over one or several cache groups and devices.

A cache group is the layers with the same attention window; each has its own pool and page tables. A pool is flat to the
kernels: the group's layer l owns pages l * pages to (l + 1) * pages - 1 of one long array, because a slice per layer
would copy it. Padding must therefore point past the whole pool, not past the layer's part.

On a mesh of several devices append and attention run per device, each over its own heads: no KV is ever gathered, and
nothing but heads may be split. Shapes: T packed tokens, R prefill rows, B decode rows, M pages per table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from ...kernels_pallas import append_kv, paged_decode_attention, paged_prefill_attention
from ...models.config import AttentionSpec, ModelConfig
from ..sharding.mesh import AXIS
from .kv_cache import KVCache, groups


class PrefillRows(NamedTuple):
    """Chunks of R prompts: `tables`, one [R, M] per cache group; `kv_len` [R], tokens of the request in the cache once
    its chunk is in; `q_start` [R + 1], where each chunk begins, counted from the first prefill token of the step."""

    tables: tuple[jax.Array, ...]
    kv_len: jax.Array
    q_start: jax.Array


class DecodeRows(NamedTuple):
    """One token of B requests each: `tables`, one [B, M] per cache group; `kv_len` [B], that token included; 0: no
    request."""

    tables: tuple[jax.Array, ...]
    kv_len: jax.Array


class _Tokens(NamedTuple):
    """What one layer needs to know about the step's tokens, its own part of the pool already chosen."""

    slots: jax.Array  # [T]
    decode: tuple[jax.Array, jax.Array] | None  # table [B, M], kv_len [B]
    prefill: tuple[jax.Array, jax.Array, jax.Array] | None  # table [R, M], kv_len [R], q_start [R + 1]


class PagedAttention:
    """While tracing, threads the KV pools of a mesh through the layers of one step.

    The step's T tokens are those of `decode`, one per row, and then those of `prefill`; either may be None. All of them
    are appended before any of them attends.

    Args:
        mesh: where the step runs.
        model: the model as it runs there (`tensor_parallel.model_on`): its cache groups, windows, softcaps, scale.
        kv: the pools, one per group.
        slots: where each token's keys and values go, one [T] int32 per group: page * page_size + offset within any of
            its layers; pages * page_size or more writes nothing.
        decode: rows of one token.
        prefill: rows of packed chunks.
    """

    def __init__(
        self,
        mesh: Mesh,
        model: ModelConfig,
        kv: tuple[KVCache, ...],
        slots: tuple[jax.Array, ...],
        *,
        decode: DecodeRows | None = None,
        prefill: PrefillRows | None = None,
    ) -> None:
        """Nothing is traced yet."""
        self._mesh, self._model = mesh, model
        self._places = _places(model)
        self._kv = list(kv)
        self._slots, self._decode, self._prefill = slots, decode, prefill

    @property
    def kv(self) -> tuple[KVCache, ...]:
        """The pools after the layers traced so far."""
        return tuple(self._kv)

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]."""
        group, index = self._places[layer]
        spec, scale = self._model.layers[layer], self._model.attention_scale

        def step(kv: KVCache, q: jax.Array, k: jax.Array, v: jax.Array, tokens: _Tokens) -> tuple[jax.Array, KVCache]:
            shape = kv.k.shape
            k_pages, v_pages = (_reshape(x, (-1, *shape[2:])) for x in kv)
            flat = KVCache(*append_kv(k_pages, v_pages, k, v, tokens.slots))
            return _attend(flat, q, tokens, spec, scale), KVCache(*(_reshape(x, shape) for x in flat))

        if self._mesh.size > 1:
            heads, pool, whole = PartitionSpec(None, AXIS), PartitionSpec(None, None, None, AXIS), PartitionSpec()
            # The loops of the kernels start from constants, which the check takes for values equal on all devices.
            step = jax.shard_map(
                step, mesh=self._mesh, in_specs=(pool, heads, heads, heads, whole), out_specs=(heads, pool),
                check_vma=False,
            )  # fmt: skip
        attended, self._kv[group] = step(self._kv[group], q, k, v, self._tokens(group, index))
        return attended

    def _tokens(self, group: int, index: int) -> _Tokens:
        """Ids within a layer become ids of the flat pool."""
        layers, pages, page_size, *_ = self._kv[group].k.shape

        def table(rows: PrefillRows | DecodeRows) -> jax.Array:
            return _offset(rows.tables[group], pages, index, layers)

        decode, prefill = self._decode, self._prefill
        return _Tokens(
            _offset(self._slots[group], pages * page_size, index, layers),
            None if decode is None else (table(decode), decode.kv_len),
            None if prefill is None else (table(prefill), prefill.kv_len, prefill.q_start),
        )


def _places(model: ModelConfig) -> dict[int, tuple[int, int]]:
    """For each layer its cache group and its index within it."""
    return {
        layer: (number, index)
        for number, group in enumerate(groups(model))
        for index, layer in enumerate(group.layers)
    }  # fmt: skip


def _attend(kv: KVCache, q: jax.Array, tokens: _Tokens, spec: AttentionSpec, scale: float) -> jax.Array:
    """Decode rows come first in `q`, then prefill tokens. [T, Hq, D]."""
    rows = 0 if tokens.decode is None else tokens.decode[1].shape[0]
    parts = []
    if tokens.decode is not None:
        parts.append(
            paged_decode_attention(
                q[:rows], *kv, *tokens.decode, scale=scale, window=spec.window, softcap=spec.softcap
            )
        )  # fmt: skip
    if tokens.prefill is not None:
        parts.append(
            paged_prefill_attention(
                q[rows:], *kv, *tokens.prefill, scale=scale, window=spec.window, softcap=spec.softcap
            )
        )  # fmt: skip
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _reshape(pool: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The same bytes. Left to itself XLA picks an odd layout around an axis of size 1, such as the only head of a
    device, and copies the pool to get back from it."""
    reshaped: jax.Array = with_layout_constraint(pool.reshape(shape), Layout(tuple(range(len(shape)))))
    return reshaped


def _offset(ids: jax.Array, per_layer: int, layer: int, layers: int) -> jax.Array:
    """What pointed past one layer's part points past all of them."""
    return jnp.where(ids < per_layer, ids + layer * per_layer, layers * per_layer)
