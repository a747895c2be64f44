"""The two step functions: model, paged attention and sampling in one dispatch each.

Pure functions of arrays, to be compiled once per (mesh, bucket) with the state donated. A decode step feeds itself: the
token sampled last lies in the state, so the host need not read it first. Shapes: T packed tokens, R prefill rows,
B decode rows, M pages per table, S slots. Padding: page id `num_pages`, slot S, kv_len 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..kernels_pallas import append_kv, paged_decode_attention, paged_prefill_attention
from ..models.config import ModelConfig
from ..models.decoder import Decoder
from .kv_cache import DeviceState, KVCache, RequestState
from .sampling import SamplingInputs, sample


class PrefillInputs(NamedTuple):
    """One packed prefill step, as the host lays it out.

    `tokens` [T]. `q_start` [R + 1]: row r's tokens are tokens[q_start[r]:q_start[r + 1]]. `kv_len` [R]: tokens of the
    request in the cache once this chunk is in. `page_table` [R, M]. `slot` [R]: where to keep the request's state; S
    unless the chunk is its prompt's last. `sampling`: each field [R].
    """

    tokens: jax.Array
    q_start: jax.Array
    kv_len: jax.Array
    page_table: jax.Array
    slot: jax.Array
    sampling: SamplingInputs


class DecodeInputs(NamedTuple):
    """One decode step: `slot` [B], `kv_len` [B] with the token being fed included, `page_table` [B, M]."""

    slot: jax.Array
    kv_len: jax.Array
    page_table: jax.Array


def prefill_step(
    decoder: Decoder, config: ModelConfig, state: DeviceState, inputs: PrefillInputs
) -> tuple[DeviceState, jax.Array]:
    """Append each chunk's KV, attend to prefix and chunk, sample after each row's last token.

    Returns the new state and the sampled tokens [R]; only rows whose chunk ends its prompt mean anything.
    """
    positions, row, valid = _positions(inputs)  # [T] each
    slots = _slot_mapping(state.kv, inputs.page_table[row], positions, valid)  # [T]

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, layer: int) -> jax.Array:
        spec = config.layers[layer]
        return paged_prefill_attention(
            q, k, v, table, inputs.kv_len, inputs.q_start,
            scale=config.attention_scale, window=spec.window, softcap=spec.softcap,
        )  # fmt: skip

    paged = _PagedAttention(state.kv, slots, inputs.page_table, attention)
    hidden = decoder.hidden(inputs.tokens, positions, paged)  # [T, E]
    last = jnp.maximum(inputs.q_start[1:] - 1, 0)
    with jax.named_scope("sample"):
        tokens = sample(decoder.logits(hidden[last]), inputs.sampling, inputs.kv_len)  # [R]
    requests = _store(state.requests, inputs.slot, RequestState(tokens, inputs.sampling))
    return DeviceState(paged.kv, requests), tokens


def decode_step(
    decoder: Decoder, config: ModelConfig, state: DeviceState, inputs: DecodeInputs
) -> tuple[DeviceState, jax.Array]:
    """Feed each row its last token, append its KV, attend, sample the next. Returns the new state and tokens [B]."""
    rows: RequestState = jax.tree.map(lambda x: x.at[inputs.slot].get(mode="clip"), state.requests)
    positions, used = jnp.maximum(inputs.kv_len - 1, 0), inputs.kv_len > 0
    slots = _slot_mapping(state.kv, inputs.page_table, positions, used)
    # Padding must not make the whole batch pay for sampling when every real row is greedy.
    sampling = rows.sampling._replace(temperature=jnp.where(used, rows.sampling.temperature, 0.0))

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, layer: int) -> jax.Array:
        spec = config.layers[layer]
        return paged_decode_attention(
            q, k, v, table, inputs.kv_len,
            scale=config.attention_scale, window=spec.window, softcap=spec.softcap,
        )  # fmt: skip

    paged = _PagedAttention(state.kv, slots, inputs.page_table, attention)
    hidden = decoder.hidden(rows.last_token, positions, paged)  # [B, E]
    with jax.named_scope("sample"):
        tokens = sample(decoder.logits(hidden), sampling, inputs.kv_len)  # [B]
    return DeviceState(paged.kv, _store(state.requests, inputs.slot, rows._replace(last_token=tokens))), tokens


class _PagedAttention:
    """The engine's `Attend`: while tracing, it threads the KV pool through the layers.

    The pool is flat to the kernels: layer l's pages are l * pages to (l + 1) * pages - 1 of one long array. A slice per
    layer would copy it. Padding must therefore point past the whole pool, not past the layer's part.
    """

    def __init__(
        self, kv: KVCache, slots: jax.Array, page_table: jax.Array, attention: Callable[..., jax.Array]
    ) -> None:
        self._shape = kv.k.shape
        self._k, self._v = (x.reshape(-1, *x.shape[2:]) for x in kv)
        self._slots, self._page_table, self._attention = slots, page_table, attention

    @property
    def kv(self) -> KVCache:
        """The pool after the layers traced so far."""
        return KVCache(self._k.reshape(self._shape), self._v.reshape(self._shape))

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [T, Hq, D], k and v [T, Hk, D] -> [T, Hq, D]."""
        layers, pages, page_size, *_ = self._shape
        slots = _offset(self._slots, pages * page_size, layer, layers)
        table = _offset(self._page_table, pages, layer, layers)
        self._k, self._v = append_kv(self._k, self._v, k, v, slots)
        return self._attention(q, self._k, self._v, table, layer)


def _offset(ids: jax.Array, per_layer: int, layer: int, layers: int) -> jax.Array:
    return jnp.where(ids < per_layer, ids + layer * per_layer, layers * per_layer)


def _positions(inputs: PrefillInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each packed token's position in its sequence, its row, and whether it is a token at all: [T] each."""
    index = jnp.arange(inputs.tokens.shape[0], dtype=jnp.int32)
    last_row = inputs.kv_len.shape[0] - 1
    row = jnp.minimum(jnp.searchsorted(inputs.q_start, index, side="right") - 1, last_row)
    past_end = inputs.q_start[row + 1] - index  # 1 for a row's last token
    valid = index < inputs.q_start[-1]
    return jnp.where(valid, inputs.kv_len[row] - past_end, 0), row, valid


def _slot_mapping(kv: KVCache, page_table: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
    """Where each token's KV goes: page * page_size + offset, or past the pool for padding. [T]."""
    _, pages, page_size, *_ = kv.k.shape
    page = jnp.take_along_axis(page_table, (positions // page_size)[:, None], axis=1)[:, 0]
    return jnp.where(valid, page * page_size + positions % page_size, pages * page_size)


def _store(requests: RequestState, slot: jax.Array, rows: RequestState) -> RequestState:
    """Write rows into their slots; slot S is nobody's."""
    stored: RequestState = jax.tree.map(lambda x, row: x.at[slot].set(row, mode="drop"), requests, rows)
    return stored
