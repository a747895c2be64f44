"""How KV and request state cross from one mesh to another.

Three dispatches: `gather` on the source copies a request's pages into staging of a bucketed page count, `send` moves
the staging to the destination's devices, `scatter` writes it into the destination's pool, donated. The caller
dispatches the scatter only when the staging has arrived: earlier it would join the destination's dependency chain, and
every decode step would wait for the running prefill (703 ms instead of 4.6, measured).

`send` must never fall back to the host: it is direct and asynchronous only where source and destination shards match
one to one. Today every mesh has one device, so they always do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .kv_cache import KV_AXES, DeviceState, KVCache, RequestState
from .mesh import replicated, sharding


class Staging(NamedTuple):
    """One request between meshes: `kv` [layers, bucket, page_size, kv_heads, head_dim], `request` one row per field."""

    kv: KVCache
    request: RequestState


def gather(state: DeviceState, pages: jax.Array, slot: jax.Array) -> Staging:
    """Copy out `pages` [bucket] and the row of `slot` []. Padding pages may name any page; they are not written."""
    kv = KVCache(*(jnp.take(x, pages, axis=1, mode="clip") for x in state.kv))
    return Staging(kv, jax.tree.map(lambda x: x[slot], state.requests))


def scatter(state: DeviceState, staging: Staging, pages: jax.Array, slot: jax.Array) -> DeviceState:
    """Write staging into `pages` [bucket] and the row of `slot` []. Padding pages are `num_pages`: dropped."""
    kv = KVCache(*(x.at[:, pages].set(new, mode="drop") for x, new in zip(state.kv, staging.kv, strict=True)))
    requests = jax.tree.map(lambda x, row: x.at[slot].set(row), state.requests, staging.request)
    return DeviceState(kv, requests)


def send(staging: Staging, mesh: Mesh) -> Staging:
    """Start the copy to `mesh`; returns at once."""
    kv_sharding, whole = sharding(mesh, KV_AXES), replicated(mesh)
    kv, request = jax.device_put((staging.kv, staging.request), (kv_sharding, whole))
    return Staging(kv, request)


def padded(pages: tuple[int, ...], bucket: int, padding: int) -> np.ndarray:
    """Page ids [bucket] int32, filled up with `padding`."""
    return np.array(pages + (padding,) * (bucket - len(pages)), np.int32)
