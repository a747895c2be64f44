"""Pages and slots: nothing is lost, doubled or mistaken for its predecessor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.pages import PageAllocator, SlotTable


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=60))
def test_pages_are_free_or_held_once(moves):
    pages, held = PageAllocator(16), {}
    for name, count in moves:
        holder = f"r{name}"
        if holder in held:
            pages.release(holder)
            del held[holder]
        elif pages.can_allocate(count):
            held[holder] = pages.allocate(holder, count)
            assert len(held[holder]) == count
        pages.check_integrity()
        assert pages.num_free == 16 - sum(map(len, held.values()))
    taken = [page for owned in held.values() for page in owned]
    assert len(taken) == len(set(taken))


def test_allocating_past_the_end_or_twice_is_a_bug_and_raises():
    pages = PageAllocator(2)
    pages.allocate("a", 1)
    with pytest.raises(RuntimeError, match="b cannot be given 2 pages"):
        pages.allocate("b", 2)
    with pytest.raises(RuntimeError, match="a cannot be given 1"):
        pages.allocate("a", 1)


def test_a_lost_page_is_noticed():
    pages = PageAllocator(3)
    pages._free.popleft()
    with pytest.raises(RuntimeError, match="lost"):
        pages.check_integrity()


def test_a_slot_knows_its_tenant_by_epoch():
    slots = SlotTable(1)
    slot, first = slots.allocate("a")
    assert slots.tenant(slot, first) == "a"
    slots.release(slot)
    assert slots.tenant(slot, first) is None
    again, second = slots.allocate("b")
    assert again == slot
    assert second != first
    assert slots.tenant(slot, first) is None
    assert slots.tenant(slot, second) == "b"
    slots.check_integrity()
