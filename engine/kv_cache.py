"""The arrays one mesh keeps between steps, and how many KV pages fit in its memory.

KV is page-major: contiguous per page and shard for gathers and transfers. The layers of a model lie in one array, so a
step passes two KV leaves whatever the depth (on 8 devices 72 leaves cost 0.84 ms per call where 2 cost 0.41), and a
hand-off is one gather. Who holds which page is `pages.py`'s business.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..models.config import ModelConfig
from .config import EngineConfig, MeshSpec, PoolSize, Role
from .mesh import replicated, sharding
from .sampling import SamplingInputs

KV_AXES = (None, None, None, "kv_heads", None)
# Left to XLA's temporaries, the collectives' buffers and fragmentation on devices that report their memory.
_USABLE = 0.9


class KVCache(NamedTuple):
    """`k` and `v`: [layers, pages, page_size, kv_heads, head_dim]."""

    k: jax.Array
    v: jax.Array


class RequestState(NamedTuple):
    """What a request needs on the device besides KV, one row per slot; it moves with the KV in a hand-off.

    `last_token` [S] int32: sampled last, fed next. `sampling`: each field [S].
    """

    last_token: jax.Array
    sampling: SamplingInputs


class DeviceState(NamedTuple):
    """Everything a step takes donated and gives back."""

    kv: KVCache
    requests: RequestState


def abstract_state(
    model: ModelConfig, config: EngineConfig, num_pages: int, dtype: jnp.dtype, mesh: Mesh
) -> DeviceState:
    """Shapes and shardings of a mesh's state, nothing allocated."""
    kv_shape = (model.num_layers, num_pages, config.page_size, model.num_kv_heads, model.head_dim)
    kv: Any = jax.ShapeDtypeStruct(kv_shape, dtype, sharding=sharding(mesh, KV_AXES))

    def row(row_dtype: jax.typing.DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((config.max_num_seqs,), row_dtype, sharding=replicated(mesh))

    sampling = SamplingInputs(
        temperature=row(jnp.float32), top_p=row(jnp.float32), top_k=row(jnp.int32), seed=row(jnp.uint32)
    )
    return DeviceState(KVCache(kv, kv), RequestState(row(jnp.int32), sampling))


def page_bytes(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page over all layers, keys and values together, all shards."""
    return 2 * model.num_layers * page_size * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize


def memory_for_kv(meshes: Sequence[Mesh], most: int | None) -> list[int]:
    """Bytes that KV pages and staging may take on each mesh, weights already loaded; meshes may share devices.

    Devices that report their memory give nine tenths of what is free on them. CPUs do not report: there it is a
    quarter of the machine's available memory for all meshes together, and at most 2 GiB each. `most` is a cap in bytes
    per mesh; on CPU it stands in place of both.
    """
    sharing = Counter(device for mesh in meshes for device in mesh.devices.flat)
    budgets = []
    for mesh in meshes:
        device = mesh.devices.flat[0]
        stats = device.memory_stats()
        if stats is not None:
            free = int(_USABLE * stats["bytes_limit"]) - int(stats["bytes_in_use"])
            budget = free // sharing[device] * mesh.devices.size
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


def pool_that_fits(budget: int, per_page: int, config: EngineConfig, spec: MeshSpec) -> PoolSize:
    """Divide `budget` bytes between a mesh's pool and the staging of what leaves or arrives at it.

    Staging is an eighth, but holds one to eight requests of full length: with room for one only, short requests wait
    for each other's transfers, and each wait is as long as a prefill step. A pool never exceeds what all slots can use.

    Raises:
        ValueError: not even one request of `max_model_len` fits; the message shows the arithmetic.
    """
    total = budget // per_page
    hands_off = spec.role is not Role.BOTH
    staging = min(max(total // 8, config.max_pages), 8 * config.max_pages) if hands_off else 0
    if total - staging < config.max_pages:
        aside = f", {staging} of them for hand-offs" if hands_off else ""
        raise ValueError(
            f"the KV cache of the {spec.role} mesh does not fit: {budget / 2**20:.0f} MiB are {total} pages of "
            f"{per_page / 2**20:.2f} MiB ({config.page_size} tokens){aside}, and one request of max_model_len="
            f"{config.max_model_len} needs {config.max_pages}: lower max_model_len, or raise kv_cache_bytes."
        )
    return PoolSize(min(total - staging, config.max_num_seqs * config.max_pages), staging)
