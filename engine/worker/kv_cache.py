"""The arrays that a mesh keeps between steps: KV pools, page tables and request state.

Dense rows are apart from what a step takes and returns: only stages of sampling read them.

Layers with the same window form a **cache group** with a pool and page tables of its own. KV is page-major: contiguous
per page and shard for gathers and transfers. All layers of a group share one array, so a step passes two KV leaves per
group whatever the depth (on 8 devices 72 leaves cost 0.84 ms per call where 2 cost 0.41), and a hand-off is one gather.
Page tables are kept on the device as well, so that a decode step is sent only the pages it writes to.
`paging/allocator.py` decides which request holds which page.

Every `ModelConfig` here is the model as the mesh runs it: its KV heads are those on the mesh (`tensor_parallel.py`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...kernels_pallas.pages import Pages, QuantizedPages
from ...models.config import ModelConfig
from ..config import EngineConfig
from ..kv_dtypes import KVDtype
from ..sampling.logits_processors import empty_dense
from ..sampling.request_state import DenseRows, Float, Int, Scalars
from ..sharding.mesh import replicated, sharding
from ..sharding.rules import TENSOR_PARALLEL
from ..sizing.cache_groups import Group, groups
from .unwritten import FEWEST_BYTES, unwritten

KV_AXES = (None, None, None, "kv_heads", None)
# Of 8-bit numbers, and of their scales.
CHANNEL_AXES = (None, "kv_heads", None)
QUANTIZED_AXES: tuple[tuple[str | None, ...], ...] = (KV_AXES, (None, None, "kv_heads", None), CHANNEL_AXES)
_JAX_NAMES = {"fp8": "float8_e4m3fn"}


class KVCache(NamedTuple):
    """One cache group's pool of keys and values: floats, or 8-bit numbers with their scales."""

    k: Pages  # [layers of the group, pages, page_size, kv_heads, head_dim]
    v: Pages  # [layers of the group, pages, page_size, kv_heads, head_dim]

    @property
    def num_pages(self) -> int:
        """Return the pages of each layer."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Return the tokens of a page."""
        return self.k.shape[2]


class Scales(NamedTuple):
    """The channels' scales of all layers, which pages of 8 bits have for as long as the parameters stay."""

    k: jax.Array  # [layers, kv_heads, head_dim] float32
    v: jax.Array  # [layers, kv_heads, head_dim] float32


class DeviceState(NamedTuple):
    """The state that a step takes, donated, and returns."""

    kv: tuple[KVCache, ...]  # a pool per cache group
    tables: tuple[jax.Array, ...]  # per cache group [max_num_seqs, max_pages] int32; unwritten entries are arbitrary
    scalars: Scalars  # a row per slot


def fresh(state: DeviceState, dense: DenseRows) -> tuple[DeviceState, DenseRows]:
    """Make a state and dense rows as described by shapes and shardings, while tracing; all zero but the pools.

    A large pool on one CPU device takes memory as its pages are written (`unwritten.py`): it is sized for full slots.
    """

    def pool(x: Any) -> jax.Array:
        devices: list[Any] = list(x.sharding.device_set)
        is_large = math.prod(x.shape) * x.dtype.itemsize >= FEWEST_BYTES
        is_lazy = is_large and len(devices) == 1 and devices[0].platform == "cpu"
        return unwritten(x.shape, x.dtype) if is_lazy else jnp.zeros(x.shape, x.dtype)

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

    return DeviceState(jax.tree.map(pool, state.kv), zeros(state.tables), zeros(state.scalars)), zeros(dense)


def abstract_state(
    model: ModelConfig, config: EngineConfig, pages: Sequence[int], dtypes: KVDtype, mesh: Mesh
) -> DeviceState:
    """Describe a mesh's state by shapes and shardings, without allocating it; `pages` counts each group's pages."""

    def pool(group: Group, count: int) -> KVCache:
        shape = (len(group.layers), count, config.page_size, model.num_kv_heads, model.head_dim)
        return KVCache(*(abstract_pages(shape, jax_dtype(name), mesh) for name in (dtypes.k, dtypes.v)))

    def whole(x: jax.ShapeDtypeStruct) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    table = whole(jax.ShapeDtypeStruct((config.max_num_seqs, config.max_pages), jnp.int32))
    kv = tuple(pool(group, count) for group, count in zip(groups(model), pages, strict=True))
    return DeviceState(kv, (table,) * len(kv), jax.tree.map(whole, abstract_scalars(config.max_num_seqs)))


def abstract_pages(shape: tuple[int, int, int, int, int], dtype: jnp.dtype, mesh: Mesh) -> Any:
    """Describe pages of keys or of values on a mesh; 8-bit numbers with their scales."""
    if dtype.itemsize > 1:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, KV_AXES))
    layers, count, page_size, heads, head_dim = shape
    shapes = shape, (layers, count, heads, page_size), (layers, heads, head_dim)
    parts = zip(shapes, (dtype, jnp.float32, jnp.float32), QUANTIZED_AXES, strict=True)
    made: list[Any] = [jax.ShapeDtypeStruct(*part, sharding=sharding(mesh, axes)) for *part, axes in parts]
    return QuantizedPages(*made)


def jax_dtype(name: str) -> jnp.dtype:
    """Return JAX's dtype of one of `KV_DTYPES`."""
    return jnp.dtype(_JAX_NAMES.get(name, name))


def specs_of(tree: Any) -> Any:
    """Return the partition of every array of pools, or of staging: the same trees, with a `PartitionSpec` for each."""
    split = TENSOR_PARALLEL.spec(KV_AXES)

    def of(pages: Any) -> Any:
        if not isinstance(pages, QuantizedPages):
            return split
        specs: list[Any] = [TENSOR_PARALLEL.spec(axes) for axes in QUANTIZED_AXES]
        found = QuantizedPages(*specs)
        return found if pages.channels is not None else found._replace(channels=None)

    return jax.tree.map(of, tree, is_leaf=lambda pages: isinstance(pages, QuantizedPages))


def with_scales(kv: tuple[KVCache, ...], scales: Sequence[KVCache]) -> tuple[KVCache, ...]:
    """Give the pools of 8-bit numbers the channels' scales of their layers; `scales` has those of each group."""

    def given(pages: Pages, channels: Any) -> Pages:
        return pages._replace(channels=channels) if isinstance(pages, QuantizedPages) else pages

    return tuple(KVCache(*map(given, pool, channels)) for pool, channels in zip(kv, scales, strict=True))


def abstract_dense(model: ModelConfig, config: EngineConfig, mesh: Mesh) -> DenseRows:
    """Describe the dense rows of a mesh's slots by shapes and shardings."""
    described: DenseRows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        empty_dense(config.max_num_seqs, model.vocab_size),
    )
    return described


def abstract_scalars(slots: int) -> Scalars:
    """Describe the scalars of so many slots by shape and dtype."""

    def rows(columns: int, dtype: jax.typing.DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((slots, columns), dtype)

    return Scalars(floats=rows(len(Float), jnp.float32), ints=rows(len(Int), jnp.int32))


def copy_page(kv: KVCache, source: jax.Array, destination: jax.Array) -> KVCache:
    """Copy page `source` [] over page `destination` [] in all layers of a group; in place where `kv` is donated."""

    def copy(pool: jax.Array) -> jax.Array:
        page = jax.lax.dynamic_slice_in_dim(pool, source, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(pool, page, destination, axis=1)

    def copied(pages: Pages) -> Pages:
        if not isinstance(pages, QuantizedPages):
            return copy(pages)
        return pages._replace(values=copy(pages.values), tokens=copy(pages.tokens))

    return KVCache(copied(kv.k), copied(kv.v))
