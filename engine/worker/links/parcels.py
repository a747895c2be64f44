"""Cuts a `Staging` into the arrays that a link offers, and joins what was fetched into a `Staging` of another mesh.

An offer holds each slice of heads once (`kv_transfer.Route`), as arrays of one device: slice by slice the leaves of all
cache groups, then the scalars. Both sides know that order from the route, so no message repeats it. Where several
devices of the destination need the same slice, the first fetches it and copies it on.

Where a mesh spans several processes (`Ends`), each process of the source offers each of the destination's what its
devices need of what that one holds, and the first of the source has the scalars for all.

Relies on `gather` and `abstract_staging` for what lies where. Moves nothing between processes: that is the links'.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from ...protocol.offers import KVOffer, joined
from ...protocol.worker import Member
from ..kv_transfer import Route, Staging
from .link import Link, LinkError


class Ends(NamedTuple):
    """The two processes that an offer is between, of those that the meshes of a route span in equal parts."""

    source: int = 0  # of the source mesh
    destination: int = 0  # of the destination mesh
    sources: int = 1  # how many processes the source mesh spans
    destinations: int = 1  # likewise the destination mesh

    def sends(self, route: Route, shard: int) -> bool:
        """Return whether this shard of the source mesh is the source process's."""
        return shard * self.sources // route.source_tp == self.source

    def needing(self, route: Route) -> range:
        """Return the shards of the destination mesh that are the destination process's."""
        each = route.destination_tp // self.destinations
        return range(self.destination * each, (self.destination + 1) * each)


ALONE = Ends()


def ends_between(route: Route, sources: int, destinations: int) -> list[Ends]:
    """List the offers that a transfer takes between meshes over so many processes, those of one source together."""
    all_ = [Ends(s, d, sources, destinations) for s in range(sources) for d in range(destinations)]
    return [ends for ends in all_ if ends.source == 0 or slices_of(route, ends)]


def offer_staging(link: Link, staging: Staging, mesh: Mesh, route: Route, ends: Ends = ALONE) -> KVOffer:
    """Offer what `gather` returned on `mesh`, the route's source; blocks as `Link.offer` does, and raises the same."""
    return link.offer(cut(staging, mesh, route, ends))


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
    return fetch_parts(link, [(ALONE, offer)], expected, mesh, route, timeout)


def fetch_parts(
    link: Link,
    offers: Sequence[tuple[Ends, KVOffer]],
    expected: Staging,
    mesh: Mesh,
    route: Route,
    timeout: float,
) -> Staging:
    """Fetch all offers of a transfer that are for this process, each within `timeout`; else as `fetch_staging`."""
    fetched = [(ends, link.fetch(offer, wanted(expected, mesh, route, ends), timeout)) for ends, offer in offers]
    return join(fetched, expected, mesh, route)


def offer_of_member(link: Link, staging: Staging, mesh: Mesh, route: Route, member: Member) -> KVOffer:
    """Offer what a process of a group has of `mesh`, to each process of the destination; else as `offer_staging`.

    Both meshes span as many processes. If one of the offers cannot be made, none is left.
    """
    made = list[KVOffer]()
    try:
        for ends in ends_between(route, member.count, member.count):
            if ends.source == member.index:
                made.append(offer_staging(link, staging, mesh, route, ends))
    except BaseException:
        for offer in made:
            link.withdraw(offer.uuid)
        raise
    return joined(made)


def for_member(offer: KVOffer, route: Route, member: Member) -> list[tuple[Ends, KVOffer]]:
    """Find those parts of an offer, of all processes of the source, that are for one process of the destination.

    Raises:
        LinkError: the source has offered more or less than this route takes.
    """
    all_ = ends_between(route, member.count, member.count)
    if len(offer.parts) != len(all_):
        raise LinkError(f"{len(offer.parts)} parts are offered where {len(all_)} are wanted.")
    return [pair for pair in zip(all_, offer.parts, strict=True) if pair[0].destination == member.index]


def cut(staging: Staging, mesh: Mesh, route: Route, ends: Ends = ALONE) -> list[jax.Array]:
    """List the arrays of an offer, each on one device of `mesh`, the route's source; copies nothing."""
    devices = list(mesh.devices.flat)
    pieces = [[_by_device(x) for x in leaves] for leaves in leaves_by_piece(staging)]
    arrays = []
    for index in slices_of(route, ends):
        shard, piece = route.holder(index)
        arrays += [shards[devices[shard]] for shards in pieces[piece]]
    if ends.source == 0:
        arrays += [_by_device(x)[devices[0]] for x in jax.tree.leaves(staging.scalars)]
    return arrays


def wanted(expected: Staging, mesh: Mesh, route: Route, ends: Ends = ALONE) -> list[jax.ShapeDtypeStruct]:
    """Describe the arrays of an offer as the destination wants them: shape, dtype, and the device that fetches each."""
    described, pieces = [], leaves_by_piece(expected)
    for index in slices_of(route, ends):
        shard, piece = _first_need(route, index, ends)
        described += [_on(mesh, shard, x, x.sharding.shard_shape(x.shape)) for x in pieces[piece]]
    if ends.source == 0:
        first = ends.needing(route)[0]
        described += [_on(mesh, first, x, x.shape) for x in jax.tree.leaves(expected.scalars)]
    return described


def join(fetched: Sequence[tuple[Ends, Sequence[jax.Array]]], expected: Staging, mesh: Mesh, route: Route) -> Staging:
    """Make `expected` of all fetched arrays that are for this process, which lie where `wanted` says."""
    shards, tree = fetched[0][0].needing(route), jax.tree.structure(expected.kv)
    devices = [mesh.devices.flat[shard] for shard in shards]
    count = sum(len(leaves) for leaves in leaves_by_piece(expected)[:1])
    scalars, slices = jax.tree.leaves(expected.scalars), dict[int, Sequence[jax.Array]]()
    for ends, arrays in fetched:
        for place, index in enumerate(slices_of(route, ends)):
            slices[index] = arrays[place * count : (place + 1) * count]
        if ends.source == 0:
            given = arrays[len(arrays) - len(scalars) :]
    made = [
        [
            _assemble(x, [slices[route.slice_on(shard, piece)][leaf] for shard in shards], devices)
            for leaf, x in enumerate(leaves)
        ]
        for piece, leaves in enumerate(leaves_by_piece(expected))
    ]
    groups = _regroup(made, expected)
    rows = [_assemble(x, [row] * len(devices), devices) for x, row in zip(scalars, given, strict=True)]
    return Staging(jax.tree.unflatten(tree, groups), jax.tree.unflatten(jax.tree.structure(expected.scalars), rows))


def leaves_by_piece(staging: Staging) -> list[list[Any]]:
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


def slices_of(route: Route, ends: Ends) -> list[int]:
    """List the slices of an offer: those that the destination process needs and the source process is to give."""
    per_device = range(route.pieces_on(route.destination_tp))
    needed = {route.slice_on(shard, piece) for shard in ends.needing(route) for piece in per_device}
    return [index for index in sorted(needed) if ends.sends(route, route.holder(index)[0])]


def _first_need(route: Route, index: int, ends: Ends) -> tuple[int, int]:
    """Find the first (shard, piece) of the destination process that needs slice `index`."""
    per_device = range(route.pieces_on(route.destination_tp))
    return next((i, p) for i in ends.needing(route) for p in per_device if route.slice_on(i, p) == index)


def _on(mesh: Mesh, shard: int, x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=SingleDeviceSharding(mesh.devices.flat[shard]))


def _by_device(x: jax.Array) -> dict[jax.Device, jax.Array]:
    return {shard.device: shard.data for shard in x.addressable_shards}


def _assemble(x: Any, parts: list[jax.Array], devices: list[jax.Device]) -> jax.Array:
    """Join an array of one part per device of this process; a part that lies on another device is copied."""
    placed = [
        part if part.sharding.device_set == {device} else jax.device_put(part, device)
        for part, device in zip(parts, devices, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)
