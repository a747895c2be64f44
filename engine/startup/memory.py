"""How many pages a mesh has memory for, and refusals that show the arithmetic."""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ...models.config import ModelConfig
from ..config import EngineConfig, PoolSize
from ..sampling.logits_processors import empty_dense
from ..topology import MeshSpec
from ..worker.kv_cache import abstract_scalars, groups

# Left to XLA's temporaries, the collectives' buffers and fragmentation on devices that report their memory.
_USABLE = 0.9


def page_bytes(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> tuple[int, ...]:
    """Return bytes of one page of each cache group: its layers' keys and values together, all shards."""
    per_layer = 2 * page_size * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize
    return tuple(len(group.layers) * per_layer for group in groups(model))


def request_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Return bytes of request state and page tables on each device of a mesh: they do not shrink with its size."""
    slots = config.max_num_seqs
    requests = jax.tree.leaves((abstract_scalars(slots), empty_dense(slots, model.vocab_size)))
    tables = len(groups(model)) * config.max_num_seqs * config.max_pages
    size: int = tables * 4 + sum(math.prod(x.shape) * x.dtype.itemsize for x in requests)
    return size


def state_bytes() -> int:
    """Return bytes of one request's scalars, which every transfer takes along to each device of its destination."""
    return sum(math.prod(x.shape) * int(jnp.dtype(x.dtype).itemsize) for x in abstract_scalars(1))


def memory_for_kv(meshes: Sequence[Mesh], most: int | None, reserved: int) -> list[int]:
    """Return bytes that KV pages and staging may take on each mesh, weights already loaded; meshes may share devices.

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
    """Return bytes that programs can take without swapping, as Linux reports it; 8 GiB elsewhere."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 8 << 30


def longest_that_fits(budget: int, per_page: tuple[int, ...], config: EngineConfig) -> int:
    """Find the longest `max_model_len`, at most the config's, of which one request fits into `budget` bytes.

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
    """Return bytes of `budget` that hand-offs on their way may take."""
    if not config.has_handoffs:
        return 0
    caps = [config.pages_to_send(window) for window in config.windows]
    whole = PoolSize((), per_page, 0).transfer_bytes(config.max_pages, caps)
    return min(max(budget // 8, whole), 8 * whole)


def _request(per_page: tuple[int, ...], config: EngineConfig) -> int:
    """Return bytes of pages that one request of full length needs."""
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
