"""The arrays one mesh keeps between steps, and how many KV pages fit in its memory.

Layers with the same window form a **cache group** with a pool and page tables of its own. KV is page-major: contiguous
per page and shard for gathers and transfers. The layers of a group lie in one array, so a step passes two KV leaves per
group whatever the depth (on 8 devices 72 leaves cost 0.84 ms per call where 2 cost 0.41), and a hand-off is one gather.
Page tables lie on the device as well, so that a decode step is told only of the pages it writes to. Who holds which
page is `pages.py`'s business.

Every `ModelConfig` here is the mesh's own: its KV heads are those that lie on the mesh (`tensor_parallel.py`).
"""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..models.config import ModelConfig
from .config import EngineConfig, MeshSpec, PoolSize
from .logits import empty_dense
from .mesh import replicated, sharding
from .request_state import Float, Int, RequestState, Scalars

KV_AXES = (None, None, None, "kv_heads", None)
# Left to XLA's temporaries, the collectives' buffers and fragmentation on devices that report their memory.
_USABLE = 0.9


class Group(NamedTuple):
    """A cache group: the attention window of its layers (None: they see everything) and the layers' indices."""

    window: int | None
    layers: tuple[int, ...]


class KVCache(NamedTuple):
    """One group's pool: `k` and `v` [layers of the group, pages, page_size, kv_heads, head_dim]."""

    k: jax.Array
    v: jax.Array


class DeviceState(NamedTuple):
    """Everything a step takes donated and gives back.

    `kv`: a pool per cache group. `tables`: a page table per cache group, [max_num_seqs, max_pages] int32; entries that
    no step has written are arbitrary. `requests`: one row per slot.
    """

    kv: tuple[KVCache, ...]
    tables: tuple[jax.Array, ...]
    requests: RequestState


def groups(model: ModelConfig) -> tuple[Group, ...]:
    """The cache groups, in the order in which the layers first use them; `EngineConfig.windows` are their windows."""
    windows = dict.fromkeys(spec.window for spec in model.layers)
    return tuple(
        Group(window, tuple(index for index, spec in enumerate(model.layers) if spec.window == window))
        for window in windows
    )


def abstract_state(
    model: ModelConfig, config: EngineConfig, pages: Sequence[int], dtype: jnp.dtype, mesh: Mesh
) -> DeviceState:
    """Shapes and shardings of a mesh's state, nothing allocated; `pages` of each cache group."""

    def pool(group: Group, count: int) -> KVCache:
        shape = (len(group.layers), count, config.page_size, model.num_kv_heads, model.head_dim)
        kv: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, KV_AXES))
        return KVCache(kv, kv)

    def whole(x: jax.ShapeDtypeStruct) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    table = whole(jax.ShapeDtypeStruct((config.max_num_seqs, config.max_pages), jnp.int32))
    kv = tuple(pool(group, count) for group, count in zip(groups(model), pages, strict=True))
    return DeviceState(kv, (table,) * len(kv), jax.tree.map(whole, _abstract_requests(model, config.max_num_seqs)))


def _abstract_requests(model: ModelConfig, slots: int) -> RequestState:
    def rows(columns: int, dtype: jax.typing.DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((slots, columns), dtype)

    scalars = Scalars(floats=rows(len(Float), jnp.float32), ints=rows(len(Int), jnp.int32))
    return RequestState(scalars, empty_dense(slots, model.vocab_size))


def copy_page(kv: KVCache, source: jax.Array, destination: jax.Array) -> KVCache:
    """Copy page `source` [] over page `destination` [] in all layers of a group; in place where `kv` is donated."""

    def copy(pool: jax.Array) -> jax.Array:
        page = jax.lax.dynamic_slice_in_dim(pool, source, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(pool, page, destination, axis=1)

    return KVCache(copy(kv.k), copy(kv.v))


def page_bytes(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> tuple[int, ...]:
    """Bytes of one page of each cache group: its layers' keys and values together, all shards."""
    per_layer = 2 * page_size * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize
    return tuple(len(group.layers) * per_layer for group in groups(model))


def request_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of request state and page tables on each device of a mesh: they do not shrink with its size."""
    requests = jax.tree.leaves(_abstract_requests(model, config.max_num_seqs))
    tables = len(groups(model)) * config.max_num_seqs * config.max_pages
    size: int = tables * 4 + sum(math.prod(x.shape) * x.dtype.itemsize for x in requests)
    return size


def state_bytes(model: ModelConfig) -> int:
    """Bytes of one request's state, which every transfer takes along to each device of its destination."""
    row = jax.tree.leaves(_abstract_requests(model, 1))
    return sum(math.prod(x.shape) * int(jnp.dtype(x.dtype).itemsize) for x in row)


def memory_for_kv(meshes: Sequence[Mesh], most: int | None, reserved: int) -> list[int]:
    """Bytes that KV pages and staging may take on each mesh, weights already loaded; meshes may share devices.

    Devices that report their memory give nine tenths of what is free on them, less `reserved` bytes (`request_bytes`)
    for each mesh that they are in. CPUs do not report: there it is a quarter of the machine's available memory for all
    meshes together, and at most 2 GiB each. `most` is a cap in bytes per mesh; on CPU it stands in place of both.
    """
    sharing = Counter(device for mesh in meshes for device in mesh.devices.flat)
    budgets = []
    for mesh in meshes:
        device = mesh.devices.flat[0]
        stats = device.memory_stats()
        if stats is not None:
            free = int(_USABLE * stats["bytes_limit"]) - int(stats["bytes_in_use"])
            budget = max(0, free // sharing[device] - reserved) * mesh.devices.size
            budgets.append(budget if most is None else min(budget, most))
        else:
            budgets.append(min(_available_memory() // (4 * len(meshes)), 2 << 30) if most is None else most)
    return budgets


def _available_memory() -> int:
    """Bytes that programs can take without swapping, as Linux reports it; 8 GiB elsewhere."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 8 << 30


def longest_that_fits(budget: int, per_page: tuple[int, ...], config: EngineConfig) -> int:
    """The longest `max_model_len`, at most the config's, of which one request fits into `budget` bytes.

    One page's tokens where not even those fit: `pool_that_fits` then says so.
    """

    def fits(pages: int) -> bool:
        shorter = replace(config, max_model_len=max(2, pages * config.page_size))
        return _staging(budget, per_page, shorter) + _request(per_page, shorter) <= budget

    pages = bisect_right(range(1, config.max_pages + 1), False, key=lambda pages: not fits(pages))
    return min(config.max_model_len, max(2, max(1, pages) * config.page_size))


def pool_that_fits(budget: int, per_page: tuple[int, ...], config: EngineConfig, spec: MeshSpec) -> PoolSize:
    """Divide `budget` bytes between a mesh's pools, one per cache group, and the staging of hand-offs.

    `per_page`: bytes of one page of each group. A request of `max_model_len` needs `EngineConfig.most_pages` of each;
    the groups get pages in that proportion, for as many such requests as fit, at most one per slot.

    Staging is an eighth, but holds one to eight requests of full length: with room for one only, short requests wait
    for each other's transfers, and each wait is as long as a prefill step.

    Raises:
        ValueError: not even one request of `max_model_len` fits; the message shows the arithmetic.
    """
    staging, request = _staging(budget, per_page, config), _request(per_page, config)
    rest = budget - staging
    if rest < request:
        raise ValueError(_too_small(budget, staging, per_page, config, spec))
    needed = [config.most_pages(window) for window in config.windows]
    pages = tuple(min(config.max_num_seqs * count, rest * count // request) for count in needed)
    return PoolSize(pages, per_page, staging)


def _staging(budget: int, per_page: tuple[int, ...], config: EngineConfig) -> int:
    """Bytes of `budget` that hand-offs on their way may take."""
    if not config.has_handoffs:
        return 0
    caps = [config.pages_to_send(window) for window in config.windows]
    whole = PoolSize((), per_page, 0).transfer_bytes(config.max_pages, caps)
    return min(max(budget // 8, whole), 8 * whole)


def _request(per_page: tuple[int, ...], config: EngineConfig) -> int:
    """Bytes of pages that one request of full length needs."""
    return sum(config.most_pages(window) * size for window, size in zip(config.windows, per_page, strict=True))


def _too_small(budget: int, staging: int, per_page: tuple[int, ...], config: EngineConfig, spec: MeshSpec) -> str:
    def mib(size: int) -> str:
        return f"{size / 2**20:.2f} MiB"

    parts = " + ".join(
        f"{config.most_pages(window)} pages of {mib(size)}"
        for window, size in zip(config.windows, per_page, strict=True)
    )
    aside = f", {mib(staging)} of them for hand-offs" if staging else ""
    return (
        f"the KV cache of the {spec.role} mesh does not fit: there are {mib(budget)}{aside}, and one request of "
        f"max_model_len={config.max_model_len} needs {parts} ({config.page_size} tokens each) = "
        f"{mib(_request(per_page, config))}: lower max_model_len, or raise kv_cache_bytes."
    )
