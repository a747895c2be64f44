"""Stagings whose every slice of heads has bits of its own, so that one that went astray is seen: for tests of links.

It runs in both processes of a test, which therefore know each other's bits.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from twinmesh.engine.sampling.request_state import Scalars
from twinmesh.engine.sharding.mesh import replicated
from twinmesh.engine.sharding.rules import TP
from twinmesh.engine.worker.kv_cache import DeviceState, KVCache, abstract_pages
from twinmesh.engine.worker.kv_transfer import Staging, abstract_staging, plan
from twinmesh.engine.worker.links.parcels import leaves_by_piece

LAYERS, SIZE, DIM, BUCKETS = (2, 1), 4, 8, (4, 1)


def mesh_on(first, tp):
    return Mesh(np.array(jax.devices()[first : first + tp]), (TP,))


def expected(kv_heads, mesh, route, dtype="float32"):
    """What `gather` returns, or `scatter` takes, on a mesh: two cache groups, with keys and values of one dtype."""
    on_mesh = max(kv_heads, mesh.size)

    def pool(layers):
        return abstract_pages((layers, 8, SIZE, on_mesh, DIM), jnp.dtype(dtype), mesh)

    def rows(columns, kind):
        return jax.ShapeDtypeStruct((5, columns), kind, sharding=replicated(mesh))

    kv = tuple(KVCache(pool(layers), pool(layers)) for layers in LAYERS)
    state = DeviceState(kv, (), Scalars(rows(6, np.float32), rows(5, np.int32)))
    return abstract_staging(state, mesh, route, BUCKETS)


def bits(name, index, shape, dtype):
    """Random bits, NaN and all."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    seed = hashlib.sha256(f"{name} {index}".encode()).digest()
    random = np.random.default_rng(np.frombuffer(seed, np.uint32))
    return np.frombuffer(random.bytes(size), dtype).reshape(shape)


def staged(kv_heads, mesh, destination_tp, dtype="float32"):
    """Make a staging on a source mesh; return it and its route."""
    route = plan(kv_heads, mesh.size, destination_tp)
    like, devices = expected(kv_heads, mesh, route, dtype), list(mesh.devices.flat)

    def filled(x, leaf, piece):
        shape = x.sharding.shard_shape(x.shape)
        parts = [bits(leaf, i * route.slices // mesh.size + piece, shape, x.dtype) for i in range(mesh.size)]
        placed = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)

    groups = []
    leaf = 0
    for group in like.kv:
        pieces = []
        for piece, pages in enumerate(group):
            flat, tree = jax.tree.flatten(pages)
            made = [filled(x, leaf + n, piece) for n, x in enumerate(flat)]
            pieces.append(jax.tree.unflatten(tree, made))
        leaf += len(flat)
        groups.append(tuple(pieces))
    rows = zip(Scalars._fields, like.scalars, strict=True)
    scalars = Scalars(*(jax.device_put(bits(name, 0, x.shape, x.dtype), replicated(mesh)) for name, x in rows))
    return Staging(tuple(groups), scalars), route


def difference(staging, mesh, route):
    """Say which part of a destination's staging has other bits than its source's; None: none has."""
    devices = list(mesh.devices.flat)
    for piece, leaves in enumerate(leaves_by_piece(staging)):
        for leaf, x in enumerate(leaves):
            for shard in x.addressable_shards:
                index = route.slice_on(devices.index(shard.device), piece)
                if np.asarray(shard.data).tobytes() != bits(leaf, index, shard.data.shape, x.dtype).tobytes():
                    return f"leaf {leaf}, piece {piece} on {shard.device} is not slice {index}"
    for name in Scalars._fields:
        row = getattr(staging.scalars, name)
        for shard in row.addressable_shards:
            if np.asarray(shard.data).tobytes() != bits(name, 0, row.shape, row.dtype).tobytes():
                return f"{name} on {shard.device}"
    return None
