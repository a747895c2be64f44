"""One that found no room is asked again when there may be some for it, and not before."""

import pytest
from helpers.fake_device import block_hashes
from twinmesh.engine.paging.room import RoomChanges

HASHES = block_hashes("a", 12, 4)


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        (lambda room: room.touch(0), True),
        (lambda room: room.more(0), False),
        (lambda room: room.cached(HASHES, 0), False),
        (lambda room: room.cached(HASHES, 2), False),
        (lambda room: room.cached(HASHES, 3), True),
        (lambda room: room.cached((), 0), True),
        (lambda room: room.cached(block_hashes("b", 12, 4), 0), True),
    ],
)
def test_a_refusal_ends_when_there_may_be_room(change, holds):
    room = RoomChanges()
    refusal, who = room.refusal(), object()
    assert not refusal.holds(who)
    refusal.note(who, HASHES)
    assert refusal.holds(who)
    assert not refusal.holds(object())
    change(room)
    assert refusal.holds(who) == holds
