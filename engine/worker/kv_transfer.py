"""Moves KV and request state from one mesh to another.

A transfer has three dispatches: `gather` on the source copies a request's pages into a staging buffer of a bucketed
page count, `send` copies the staging to the destination's devices, and `scatter` writes it into the destination's
pool, donated. The caller dispatches the scatter only when the staging has arrived: earlier, it would join the
destination's dependency chain, and every decode step would wait for the running prefill (703 ms instead of 4.6,
measured).

`jax.device_put` between meshes is direct and asynchronous only if shards match one to one; otherwise it goes through
the host, silently. So the heads are cut into slices such that every shard on either side holds a whole number of them
(`plan`). The gather makes each slice an array of its own, `send` copies single-device shards directly to the devices
that need them, and the scatter joins a device's slices. Between meshes of the same size this is one device_put.

Staging is stored as the meshes that decode store KV: a source that stores it in another way converts in the gather,
before anything is sent, so that 8-bit pages cost a link half of 16-bit ones. Scales of tokens move with their pages;
those of channels are the same on all meshes.

Example: a source of 4 devices, a destination of 2, and 4 key/value heads give 4 slices, one per source shard and two
per destination shard. The gather returns one piece (its shard i is slice i), and the scatter takes two (shard i of
piece j is slice 2 i + j).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...kernels_pallas.pages import Pages, QuantizedPages, dequantize, quantize
from ...kernels_pallas.scatter import write_rows
from ..config import EngineConfig
from ..kv_dtypes import KVDtype
from ..sampling.request_state import Scalars
from ..sharding.mesh import replicated, rules_of, ways
from ..topology import TopologyError
from .kv_cache import CHANNEL_AXES, DeviceState, KVCache, abstract_pages, jax_dtype, specs_of

_WHOLE = PartitionSpec()
_HEADS, _TOKEN_HEADS = 3, 2  # axes of numbers, and of their tokens' scales, that count heads


class Staging(NamedTuple):
    """The pages and scalars of one request on their way between meshes. Its dense row, if it has one, stays behind:
    the destination gets it from the host."""

    # Per cache group and piece, [layers, bucket, page_size, heads of the piece on all shards, head_dim]; of 8-bit
    # numbers without the channels' scales.
    kv: tuple[tuple[KVCache, ...], ...]
    scalars: Scalars  # the request's row without the slot axis; replicated


def _specs(tree: DeviceState | Staging, mesh: Mesh) -> Any:
    """Return the partitions of a state or of staging; where nothing is divided, one for all that is below it."""
    whole = dict.fromkeys(tree._fields, _WHOLE) | {"kv": specs_of(tree.kv, mesh)}
    return type(tree)(**whole)


@dataclass(frozen=True)
class Route:
    """How a model's key/value heads are cut into slices for a transfer between two meshes.

    A shard holds consecutive slices; with more devices than heads, neighbouring devices hold the same slice.
    """

    kv_heads: int  # of the model
    source_tp: int  # devices of the source mesh
    destination_tp: int  # devices of the destination mesh
    slices: int  # equal runs of neighbouring heads

    @property
    def piece_heads(self) -> int:
        """Return the heads of one slice, which is the part of a piece that one device holds."""
        return self.kv_heads // self.slices

    def pieces_on(self, tp: int) -> int:
        """Count the slices on a device of the side with `tp` devices.

        As many arrays per pool are returned by the gather, or taken by the scatter.
        """
        return max(1, self.slices // tp)

    def slice_on(self, shard: int, piece: int) -> int:
        """Find the slice that a destination shard needs as `piece`."""
        return shard * self.slices // self.destination_tp + piece

    def holder(self, index: int) -> tuple[int, int]:
        """Find slice `index` on the source: the first (shard, piece) that holds it."""
        if self.slices < self.source_tp:
            return index * (self.source_tp // self.slices), 0
        return divmod(index, self.pieces_on(self.source_tp))

    def origin(self, shard: int, piece: int) -> tuple[int, int]:
        """Find the slice that a destination shard needs as `piece`: the first (shard, piece) that holds it there."""
        return self.holder(self.slice_on(shard, piece))


def plan(kv_heads: int, source_tp: int, destination_tp: int) -> Route:
    """Find the coarsest cut of `kv_heads` that suits both sides; degrees that `check_tp` accepts always have one.

    Raises:
        TopologyError: the heads cannot be cut evenly.
    """
    slices = min(kv_heads, math.lcm(source_tp, destination_tp))
    even = kv_heads % slices == 0 and all(max(slices, tp) % min(slices, tp) == 0 for tp in (source_tp, destination_tp))
    if not even:
        raise TopologyError(
            f"{kv_heads} key/value heads cannot be handed from a mesh of tp {source_tp} to one of tp {destination_tp}: "
            "use degrees that divide them, or multiples of them."
        )
    return Route(kv_heads, source_tp, destination_tp, slices)


def staged_pages(config: EngineConfig, bucket: int) -> tuple[int, ...]:
    """Count the pages per cache group in a transfer of `bucket` pages; a windowed group sends at most its window."""
    return tuple(min(bucket, config.pages_to_send(window)) for window in config.windows)


def gather(
    state: DeviceState,
    pages: tuple[jax.Array, ...],
    slot: jax.Array,
    scales: tuple[KVCache, ...] | None = None,
    *,
    mesh: Mesh,
    route: Route,
    stored: KVDtype | None = None,
) -> Staging:
    """Copy a request's pages and state out of `mesh`, the route's source.

    Args:
        state: of the mesh.
        pages: per group [bucket of the group] int32 page ids; padding may be any id, as its copy is never written.
        slot: [] int32, the request's; past the end, the last slot's state is copied.
        scales: where it is to be stored in another way, the channels' scales of each group there, on this mesh.
        mesh: the source.
        route: how the heads are cut.
        stored: how the destination stores keys and values; None: as the source does.
    """
    pieces = route.pieces_on(mesh.size)

    def cut(pages: Pages, ids: jax.Array, name: str | None, channels: jax.Array | None) -> list[Pages]:
        taken = _take(pages, ids)
        return _split(taken if name is None else _converted(taken, jax_dtype(name), channels), pieces)

    def on_shard(
        state: DeviceState, pages: tuple[jax.Array, ...], slot: jax.Array, scales: tuple[KVCache, ...] | None
    ) -> Staging:
        names = (None, None) if stored is None else (stored.k, stored.v)
        kv = []
        for pool, ids, channels in zip(state.kv, pages, scales or (KVCache(None, None),) * len(pages), strict=True):  # type: ignore[arg-type]
            kv.append(tuple(map(KVCache, *map(cut, pool, (ids, ids), names, channels))))  # type: ignore[arg-type]
        return Staging(tuple(kv), state.scalars.at(slot))

    of_scales = None if scales is None else jax.tree.map(lambda _: rules_of(mesh).spec(CHANNEL_AXES), scales)
    in_specs = _specs(state, mesh), _WHOLE, _WHOLE, of_scales
    out = _specs(jax.eval_shape(on_shard, state, pages, slot, scales), mesh)
    step = _per_shard(on_shard, mesh, in_specs, out)
    with jax.named_scope("gather"):
        return step(state, pages, slot, scales)


def _take(pages: Pages, ids: jax.Array) -> Pages:
    """Copy whole pages of all layers, without the channels' scales."""

    def take(pool: jax.Array) -> jax.Array:
        return jnp.take(pool, ids, axis=1, mode="clip")

    if not isinstance(pages, QuantizedPages):
        return take(pages)
    return QuantizedPages(take(pages.values), take(pages.tokens), pages.channels)


def _converted(pages: Pages, dtype: jnp.dtype, channels: jax.Array | None) -> Pages:
    """Store pages in another way: floats by a cast, 8-bit numbers by what they stand for."""
    if isinstance(pages, QuantizedPages):
        tokens, own = jnp.swapaxes(pages.tokens, -1, -2), pages.channels[:, None, None]
        floats = dequantize(pages.values, tokens, own)
    else:
        floats = pages.astype(jnp.float32)
    if channels is None:
        return floats.astype(dtype)
    numbers, scales = quantize(floats, channels[:, None, None], dtype)
    return QuantizedPages(numbers, jnp.swapaxes(scales, -1, -2), channels)


def _split(pages: Pages, pieces: int) -> list[Pages]:
    """Cut pages into pieces of neighbouring heads, without the channels' scales."""
    if not isinstance(pages, QuantizedPages):
        return list(jnp.split(pages, pieces, axis=_HEADS))
    parts = jnp.split(pages.values, pieces, axis=_HEADS), jnp.split(pages.tokens, pieces, axis=_TOKEN_HEADS)
    return [QuantizedPages(*part, None) for part in zip(*parts, strict=True)]  # type: ignore[arg-type]


def scatter(
    state: DeviceState,
    staging: Staging,
    pages: tuple[jax.Array, ...],
    slot: jax.Array,
    tables: tuple[jax.Array, ...],
    *,
    mesh: Mesh,
) -> DeviceState:
    """Write a request's pages, tables and state into `mesh`, the route's destination; in place if `state` is donated.

    Args:
        state: of the mesh.
        staging: as `send` returns it.
        pages: per group [bucket of the group] int32 page ids; ids past the group's pool write nothing.
        slot: [] int32, where request state and tables are written; max_num_seqs writes neither, only pages.
        tables: the request's page table per group, [max_pages] int32.
        mesh: the destination.
    """

    def write(pool: jax.Array, ids: jax.Array, pieces: list[jax.Array], heads: int) -> jax.Array:
        return write_rows(pool, ids, pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=heads), axis=1)

    def join(pages: Pages, ids: jax.Array, pieces: list[Any]) -> Pages:
        if not isinstance(pages, QuantizedPages):
            return write(pages, ids, pieces, _HEADS)
        values = write(pages.values, ids, [x.values for x in pieces], _HEADS)
        tokens = write(pages.tokens, ids, [x.tokens for x in pieces], _TOKEN_HEADS)
        return QuantizedPages(values, tokens, pages.channels)

    def on_shard(
        state: DeviceState,
        staging: Staging,
        pages: tuple[jax.Array, ...],
        slot: jax.Array,
        tables: tuple[jax.Array, ...],
    ) -> DeviceState:
        kv = (
            KVCache(join(pool.k, ids, [x.k for x in pieces]), join(pool.v, ids, [x.v for x in pieces]))
            for pool, ids, pieces in zip(state.kv, pages, staging.kv, strict=True)
        )

        def store(rows: jax.Array, row: jax.Array) -> jax.Array:
            return write_rows(rows, slot[None], row[None])

        scalars = jax.tree.map(store, state.scalars, staging.scalars)
        return DeviceState(kv=tuple(kv), tables=tuple(map(store, state.tables, tables)), scalars=scalars)

    of_state, of_staging = _specs(state, mesh), _specs(staging, mesh)
    step = _per_shard(on_shard, mesh, (of_state, of_staging, _WHOLE, _WHOLE, _WHOLE), of_state)
    with jax.named_scope("scatter"):
        return step(state, staging, pages, slot, tables)


def send(staging: Staging, source: Mesh, destination: Mesh, route: Route) -> Staging:
    """Start to copy what `gather` returned on `source` to `destination`; returns at once and compiles nothing."""
    before, after = (list(mesh.devices.flat) for mesh in (source, destination))
    shardings = _shardings(destination, _specs(staging, destination))
    if len(before) == len(after) and (before == after or not set(before) & set(after)):
        sent: Staging = jax.device_put(staging, shardings)
        return sent

    def shard(x: jax.Array, index: int) -> jax.Array:
        found: jax.Array = next(shard.data for shard in x.addressable_shards if shard.device == before[index])
        return found

    def parts(pieces: tuple[KVCache, ...], piece: int) -> Any:
        """Collect the shards of one piece that each destination device needs, of every array."""
        needed = [pieces[j] for _, j in (route.origin(index, piece) for index in range(len(after)))]
        shards = [route.origin(index, piece)[0] for index in range(len(after))]
        return jax.tree.map(lambda *arrays: [shard(x, i) for x, i in zip(arrays, shards, strict=True)], *needed)

    wanted = range(route.pieces_on(len(after)))
    kv = tuple(tuple(parts(pieces, piece) for piece in wanted) for pieces in staging.kv)
    scalars = jax.tree.map(lambda x: [shard(x, 0)] * len(after), staging.scalars)
    pieces = _shardings(destination, specs_of(tuple(group[:1] * len(wanted) for group in staging.kv), destination))
    whole = jax.tree.map(lambda _: NamedSharding(destination, _WHOLE), staging.scalars)
    return Staging(_assemble(kv, pieces, after), _assemble(scalars, whole, after))


def _shardings(mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec)
    )


def _assemble(parts: Any, shardings: Any, devices: list[jax.Device]) -> Any:
    """Copy each leaf, a list with one array per device, to these devices and join it into one array."""
    leaves, structure = jax.tree.flatten(parts, is_leaf=lambda x: isinstance(x, list))
    moved = iter(jax.device_put([part for leaf in leaves for part in leaf], devices * len(leaves)))
    arrays = []
    for leaf, place in zip(leaves, jax.tree.leaves(shardings), strict=True):
        shape = list(leaf[0].shape)
        for index, axis in enumerate(place.spec):
            shape[index] *= ways(place.mesh, axis)
        own = [next(moved) for _ in devices]
        arrays.append(jax.make_array_from_single_device_arrays(tuple(shape), place, own))
    return jax.tree.unflatten(structure, arrays)


def abstract_staging(
    state: DeviceState, mesh: Mesh, route: Route, pages: tuple[int, ...], stored: KVDtype | None = None
) -> Staging:
    """Describe by shapes and shardings what `gather` returns or `scatter` takes on `mesh`, one side of the route.

    `state` is the abstract state of that mesh, `pages` the bucket of each group (`staged_pages`); `stored` as for
    `gather`.
    """

    def piece(pool: Pages, bucket: int, name: str | None) -> Any:
        layers, _, page_size, _, head_dim = pool.shape
        shape = (layers, bucket, page_size, mesh.size * route.piece_heads, head_dim)
        made: Any = abstract_pages(shape, pool.dtype if name is None else jax_dtype(name), mesh)
        is_quantized = isinstance(made, QuantizedPages)
        return made._replace(channels=None) if is_quantized else made

    def row(x: jax.Array) -> Any:
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=replicated(mesh))

    names = (None, None) if stored is None else (stored.k, stored.v)
    kv = (
        (KVCache(*(piece(pages, bucket, name) for pages, name in zip(pool, names, strict=True))),)
        * route.pieces_on(mesh.size)
        for pool, bucket in zip(state.kv, pages, strict=True)
    )
    return Staging(tuple(kv), jax.tree.map(row, state.scalars))


def _per_shard[**P, T](step: Callable[P, T], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[P, T]:
    """Run `step` on every device separately: arrays are split by heads only, and no device needs another's heads."""
    mapped: Callable[P, T] = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return mapped


def padded(pages: tuple[int, ...], bucket: int, padding: int) -> np.ndarray:
    """Make an array [bucket] int32 of page ids, filled up with `padding`."""
    return np.array(pages + (padding,) * (bucket - len(pages)), np.int32)
