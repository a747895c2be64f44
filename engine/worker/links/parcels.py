"""Cuts a `Staging` into the arrays that a link offers, and joins what was fetched into a `Staging` of another mesh.

An offer holds each slice of heads once (`kv_transfer.Route`), as arrays of one device: slice by slice the leaves of all
cache groups, then the scalars. Both sides know that order from the route, so no message repeats it. Where several
devices of the destination need the same slice, the first fetches it and copies it on.

Relies on `gather` and `abstract_staging` for what lies where. Moves nothing between processes: that is the links'.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from ...protocol.offers import KVOffer
from ..kv_transfer import Route, Staging
from .link import Link


def offer_staging(link: Link, staging: Staging, mesh: Mesh, route: Route) -> KVOffer:
    """Offer what `gather` returned on `mesh`, the route's source; blocks as `Link.offer` does, and raises the same."""
    return link.offer(cut(staging, mesh, route))


def fetch_staging(link: Link, offer: KVOffer, expected: Staging, mesh: Mesh, route: Route, timeout: float) -> Staging:
    """Fetch an offer onto `mesh`, the route's destination, as `scatter` takes it.

    Args:
        link: of the offer's kind.
        offer: of `offer_staging`, at the other end of the same route.
        expected: what has to arrive, `abstract_staging` of the destination.
        mesh: the destination.
        route: how the heads are cut.
        timeout: seconds.

    Raises:
        LinkError: as `Link.fetch` does.
    """
    arrays = link.fetch(offer, wanted(expected, mesh, route), timeout)
    return join(arrays, expected, mesh, route)


def cut(staging: Staging, mesh: Mesh, route: Route) -> list[jax.Array]:
    """List the arrays of an offer, each on one device of `mesh`, the route's source; copies nothing."""
    devices = list(mesh.devices.flat)
    pieces = [[_by_device(x) for x in leaves] for leaves in _leaves(staging)]
    arrays = []
    for index in range(route.slices):
        shard, piece = route.holder(index)
        arrays += [shards[devices[shard]] for shards in pieces[piece]]
    return arrays + [_by_device(x)[devices[0]] for x in jax.tree.leaves(staging.scalars)]


def wanted(expected: Staging, mesh: Mesh, route: Route) -> list[jax.ShapeDtypeStruct]:
    """Describe the arrays of an offer as the destination wants them: shape, dtype, and the device that fetches each."""
    described, pieces = [], _leaves(expected)
    for index in range(route.slices):
        shard, piece = _first_need(route, index)
        described += [_on(mesh, shard, x, x.sharding.shard_shape(x.shape)) for x in pieces[piece]]
    return described + [_on(mesh, 0, x, x.shape) for x in jax.tree.leaves(expected.scalars)]


def join(arrays: Sequence[jax.Array], expected: Staging, mesh: Mesh, route: Route) -> Staging:
    """Make `expected` of fetched arrays that lie where `wanted` says."""
    devices, tree = list(mesh.devices.flat), jax.tree.structure(expected.kv)
    scalars = jax.tree.leaves(expected.scalars)
    count = (len(arrays) - len(scalars)) // route.slices
    slices = [list(arrays[index * count : (index + 1) * count]) for index in range(route.slices)]
    made = [
        [
            _assemble(x, [slices[route.slice_on(shard, piece)][leaf] for shard in range(len(devices))], devices)
            for leaf, x in enumerate(leaves)
        ]
        for piece, leaves in enumerate(_leaves(expected))
    ]
    groups = _regroup(made, expected)
    rows = [
        _assemble(x, [row] * len(devices), devices)
        for x, row in zip(scalars, arrays[len(arrays) - len(scalars) :], strict=True)
    ]
    return Staging(jax.tree.unflatten(tree, groups), jax.tree.unflatten(jax.tree.structure(expected.scalars), rows))


def _leaves(staging: Staging) -> list[list[Any]]:
    """List the leaves of all cache groups, piece by piece."""
    return [jax.tree.leaves(groups) for groups in zip(*staging.kv, strict=True)]


def _regroup(pieces: list[list[jax.Array]], expected: Staging) -> list[jax.Array]:
    """Put leaves listed piece by piece into the order of `expected.kv`: group by group, then piece by piece."""
    sizes = [len(jax.tree.leaves(group[0])) for group in expected.kv]
    ordered, first = [], 0
    for size in sizes:
        ordered += [x for leaves in pieces for x in leaves[first : first + size]]
        first += size
    return ordered


def _first_need(route: Route, index: int) -> tuple[int, int]:
    """Find the first (shard, piece) of the destination that needs slice `index`."""
    per_device = route.pieces_on(route.destination_tp)
    devices = range(route.destination_tp)
    return next((i, p) for i in devices for p in range(per_device) if route.slice_on(i, p) == index)


def _on(mesh: Mesh, shard: int, x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=SingleDeviceSharding(mesh.devices.flat[shard]))


def _by_device(x: jax.Array) -> dict[jax.Device, jax.Array]:
    return {shard.device: shard.data for shard in x.addressable_shards}


def _assemble(x: Any, parts: list[jax.Array], devices: list[jax.Device]) -> jax.Array:
    """Join an array of one part per device; a part that lies on another device is copied."""
    placed = [
        part if part.sharding.device_set == {device} else jax.device_put(part, device)
        for part, device in zip(parts, devices, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)
