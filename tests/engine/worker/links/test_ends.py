"""Between meshes over several processes, every process gets each slice of heads that it needs, from one that has it."""

import itertools

import pytest
from twinmesh.engine.protocol.offers import KVOffer
from twinmesh.engine.protocol.worker import Member
from twinmesh.engine.worker.kv_transfer import plan
from twinmesh.engine.worker.links.link import LinkError
from twinmesh.engine.worker.links.parcels import ALONE, ends_between, for_member, slices_of


@pytest.mark.parametrize(
    ("heads", "source_tp", "tp"), [(8, 2, 2), (8, 2, 4), (8, 4, 2), (2, 2, 4), (2, 4, 4), (1, 4, 2)]
)
@pytest.mark.parametrize(("sources", "destinations"), [(2, 2), (1, 2), (2, 1), (1, 1)])
def test_each_process_is_offered_what_it_needs_once_by_one_that_holds_it(heads, source_tp, tp, sources, destinations):
    route = plan(heads, source_tp, tp)
    all_ = ends_between(route, sources, destinations)
    for destination in range(destinations):
        mine = [ends for ends in all_ if ends.destination == destination]
        shards = range(destination * tp // destinations, (destination + 1) * tp // destinations)
        needed = {route.slice_on(shard, piece) for shard in shards for piece in range(route.pieces_on(tp))}
        assert sorted(itertools.chain(*(slices_of(route, ends) for ends in mine))) == sorted(needed)
        assert [ends.source for ends in mine].count(0) == 1  # which brings the scalars
    for ends in all_:
        for index in slices_of(route, ends):
            assert route.holder(index)[0] * sources // source_tp == ends.source


def test_processes_alone_offer_everything():
    route = plan(8, 2, 4)
    assert ends_between(route, 1, 1) == [ALONE]
    assert slices_of(route, ALONE) == list(range(route.slices))


def test_parts_are_found_by_their_place_and_counted():
    route, member = plan(8, 2, 2), Member(1, 2, "")
    parts = tuple(KVOffer("shared_memory", uuid, "", 0, ()) for uuid in range(len(ends_between(route, 2, 2))))
    found = for_member(KVOffer("shared_memory", 0, "", 0, (), parts), route, member)
    assert {(ends.source, ends.destination, offer.uuid) for ends, offer in found} == {(0, 1, 1), (1, 1, 2)}
    with pytest.raises(LinkError, match="1 parts are offered where 3 are wanted"):
        for_member(KVOffer("shared_memory", 0, "", 0, (), parts[:1]), route, member)
