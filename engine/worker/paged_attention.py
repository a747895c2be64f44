"""The engine's `Attend`: paged attention for the decoder, over one or several cache groups and devices.

A cache group is the layers with the same attention window; it has its own pool and page tables. The kernels see a flat
pool: the group's layer l owns pages l * pages to (l + 1) * pages - 1 of one long array, because a slice per layer
would copy it. They take the layer's first page and add it to page ids themselves: tables and slots are the same
arrays for all layers, and no layer computes its own. A slot of padding must point past the whole pool, because the page
after a layer's last is the next layer's first.

On a mesh of several devices, append and attention run per device, each over its own heads: no KV is ever gathered, and
only heads may be split. Shapes: T packed tokens, R prefill rows, B decode rows, M pages per table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from ...kernels_pallas.attention import (
    Pages,
    QuantizedPages,
    Rotation,
    paged_decode_attention,
    paged_prefill_attention,
    prepare_heads,
)
from ...models.config import AttentionSpec, ModelConfig
from ..sharding.mesh import rules_of
from ..sizing.cache_groups import groups
from .kv_cache import KVCache, specs_of

# Of queries, and the new keys and values that go with them, and of sinks.
_AXES = (None, "q_heads"), ("q_heads",)


class PrefillRows(NamedTuple):
    """Chunks of R prompts."""

    tables: tuple[jax.Array, ...]  # one [R, M] per cache group
    kv_len: jax.Array  # [R], cached tokens of the request, its chunk included
    q_start: jax.Array  # [R + 1], where each chunk begins, counted from the first prefill token of the step


class DecodeRows(NamedTuple):
    """One token of each of B requests."""

    tables: tuple[jax.Array, ...]  # one [B, M] per cache group
    kv_len: jax.Array  # [B], cached tokens of the request, this one included; 0: no request


class StepRows(NamedTuple):
    """The T tokens of a step: those of the decode rows, one each, and then those of the prefill chunks."""

    slots: tuple[jax.Array, ...]  # per group [T]: page * page_size + offset; past the whole pool: not written
    decode: DecodeRows | None = None  # None: the step has no decode rows
    prefill: PrefillRows | None = None  # None: the step has no chunks


class _Tokens(NamedTuple):
    """A step's tokens as the kernels of a group's layers take them."""

    slots: jax.Array  # [T]
    decode: tuple[jax.Array, jax.Array] | None  # table [B, M], kv_len [B]
    prefill: tuple[jax.Array, jax.Array, jax.Array] | None  # table [R, M], kv_len [R], q_start [R + 1]


class PagedAttention:
    """The attention of a mesh: appends a step's keys and values to the pools, and attends over them.

    All tokens of the step are appended before any of them attends.

    Args:
        mesh: runs the step.
        model: the model as the mesh runs it (`tensor_parallel.model_on`).
    """

    def __init__(self, mesh: Mesh, model: ModelConfig) -> None:
        self._mesh, self._model, self._places = mesh, model, _places(model)

    def __call__(
        self,
        kv: tuple[KVCache, ...],
        layer: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rotation: Rotation,
        sink: jax.Array | None,
        rows: StepRows,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Rotate q [T, Hq, D] and k, append k and v [T, Hk, D] to the layer's pool in `kv`, and attend over that pool.

        `sink` [Hq] joins the softmax's denominator only. Returns [T, Hq, D], and `kv` with the updated pool.
        """
        group, index = self._places[layer]
        spec, scale = self._model.layers[layer], self._model.attention_scale

        def step(
            kv: KVCache,
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            rotation: Rotation,
            sink: jax.Array | None,
            tokens: _Tokens,
        ) -> tuple[jax.Array, KVCache]:
            k_pages, v_pages = (_flat(pages, index) for pages in kv)
            first_page = index * kv.num_pages
            q, *pools = prepare_heads(q, k, v, rotation, k_pages, v_pages, tokens.slots, first_page=first_page)
            flat = KVCache(*pools)
            attended = _attend(flat, q, sink, tokens, spec, scale=scale, first_page=first_page)
            return attended, KVCache(*map(_as_before, flat, kv))

        if self._mesh.size > 1:
            (heads, sinks), whole = map(rules_of(self._mesh).spec, _AXES), PartitionSpec()
            pool = specs_of(kv[group], self._mesh)
            # The kernels' loops start from constants, which the check would treat as values equal on all devices.
            step = jax.shard_map(
                step, mesh=self._mesh, in_specs=(pool, heads, heads, heads, whole, sinks, whole),
                out_specs=(heads, pool), check_vma=False,
            )  # fmt: skip
        attended, pool_after = step(kv[group], q, k, v, rotation, sink, _tokens(rows, group))
        return attended, (*kv[:group], pool_after, *kv[group + 1 :])


def _tokens(rows: StepRows, group: int) -> _Tokens:
    """Take a group's tables and slots out of those of all groups."""
    decode, prefill = rows.decode, rows.prefill
    return _Tokens(
        rows.slots[group],
        None if decode is None else (decode.tables[group], decode.kv_len),
        None if prefill is None else (prefill.tables[group], prefill.kv_len, prefill.q_start),
    )


def _places(model: ModelConfig) -> dict[int, tuple[int, int]]:
    """Map each layer to its cache group and its index within the group."""
    return {
        layer: (number, index)
        for number, group in enumerate(groups(model))
        for index, layer in enumerate(group.layers)
    }  # fmt: skip


def _attend(
    kv: KVCache,
    q: jax.Array,
    sink: jax.Array | None,
    tokens: _Tokens,
    spec: AttentionSpec,
    *,
    scale: float,
    first_page: int,
) -> jax.Array:
    """Attend from q [T, Hq, D], whose rows are the decode rows and then the prefill tokens."""
    rows = 0 if tokens.decode is None else tokens.decode[1].shape[0]
    parts = []
    if tokens.decode is not None:
        parts.append(
            paged_decode_attention(
                q[:rows], *kv, *tokens.decode, scale=scale, first_page=first_page, window=spec.window,
                softcap=spec.softcap, sink=sink,
            )
        )  # fmt: skip
    if tokens.prefill is not None:
        parts.append(
            paged_prefill_attention(
                q[rows:], *kv, *tokens.prefill, scale=scale, first_page=first_page, window=spec.window,
                softcap=spec.softcap, sink=sink,
            )
        )  # fmt: skip
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _flat(pages: Pages, index: int) -> Pages:
    """Take the pages of all layers of a group as one long pool, with the channels' scales of one layer."""
    if not isinstance(pages, QuantizedPages):
        return _reshape(pages, (-1, *pages.shape[2:]))
    values, tokens = (_reshape(x, (-1, *x.shape[2:])) for x in (pages.values, pages.tokens))
    return QuantizedPages(values, tokens, pages.channels[index])


def _as_before(flat: Pages, pages: Pages) -> Pages:
    """Undo `_flat`."""
    if not isinstance(pages, QuantizedPages) or not isinstance(flat, QuantizedPages):
        return _reshape(flat, pages.shape)  # type: ignore[arg-type]
    values, tokens = (_reshape(new, old.shape) for new, old in zip(flat[:2], pages[:2], strict=True))
    return QuantizedPages(values, tokens, pages.channels)


def _reshape(pool: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Reshape a pool without copying it.

    Without the constraint XLA picks another layout around an axis of size 1, such as a device's only head, and copies
    the pool to convert back from it.
    """
    reshaped: jax.Array = with_layout_constraint(pool.reshape(shape), Layout(tuple(range(len(shape)))))
    return reshaped
