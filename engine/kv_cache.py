"""The arrays one mesh keeps between steps, and how many KV pages fit in its memory.

KV is page-major: contiguous per page and shard for gathers and transfers. The layers of a model lie in one array, so a
step passes two KV leaves whatever the depth (on 8 devices 72 leaves cost 0.84 ms per call where 2 cost 0.41), and a
hand-off is one gather. Who holds which page is `pages.py`'s business.
"""

import os
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


class MeshState(NamedTuple):
    """Everything a step takes donated and gives back."""

    kv: KVCache
    requests: RequestState


def abstract_state(model: ModelConfig, config: EngineConfig, num_pages: int, dtype: jnp.dtype, mesh: Mesh) -> MeshState:
    """Shapes and shardings of a mesh's state, nothing allocated."""
    kv_shape = (model.num_layers, num_pages, config.page_size, model.num_kv_heads, model.head_dim)
    kv: Any = jax.ShapeDtypeStruct(kv_shape, dtype, sharding=sharding(mesh, KV_AXES))

    def row(row_dtype: jax.typing.DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((config.max_num_seqs,), row_dtype, sharding=replicated(mesh))

    sampling = SamplingInputs(
        temperature=row(jnp.float32), top_p=row(jnp.float32), top_k=row(jnp.int32), seed=row(jnp.uint32)
    )
    return MeshState(KVCache(kv, kv), RequestState(row(jnp.int32), sampling))


def page_bytes(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page over all layers, keys and values together, all shards."""
    return 2 * model.num_layers * page_size * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize


def memory_for_kv(mesh: Mesh, cpu_bytes: int | None, num_meshes: int) -> int:
    """Bytes per mesh that KV pages and staging may take, weights already loaded.

    Devices that report their memory give nine tenths of what is free. CPUs do not report: there it is `cpu_bytes`, by
    default a quarter of the machine's available memory shared by all meshes, and at most 2 GiB each.
    """
    device = mesh.devices.flat[0]
    stats = device.memory_stats()
    if stats is not None:
        free = int(_USABLE * stats["bytes_limit"]) - int(stats["bytes_in_use"])
        return free * mesh.devices.size
    if cpu_bytes is not None:
        return cpu_bytes
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available // (4 * num_meshes), 2 << 30)


def pool_that_fits(budget: int, per_page: int, config: EngineConfig, spec: MeshSpec) -> PoolSize:
    """Divide `budget` bytes between a mesh's pool and the staging of what arrives at it.

    Staging is an eighth, but holds one to eight requests of full length: with room for one only, short requests wait
    for each other's transfers, and each wait is as long as a prefill step. A pool never exceeds what all slots can use.

    Raises:
        ValueError: not even one request of `max_model_len` fits; the message shows the arithmetic.
    """
    total = budget // per_page
    arrives = spec.role is Role.DECODE
    staging = min(max(total // 8, config.max_pages), 8 * config.max_pages) if arrives else 0
    if total - staging < config.max_pages:
        aside = f", {staging} of them for hand-offs" if arrives else ""
        raise ValueError(
            f"the KV cache of the {spec.role} mesh does not fit: {budget / 2**20:.0f} MiB are {total} pages of "
            f"{per_page / 2**20:.2f} MiB ({config.page_size} tokens){aside}, and one request of max_model_len="
            f"{config.max_model_len} needs {config.max_pages}: lower max_model_len, or raise kv_cache_bytes."
        )
    return PoolSize(min(total - staging, config.max_num_seqs * config.max_pages), staging)
