"""Pages of one cache group: free, held or cached, never lost."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.paging.allocator import PageAllocator, SlotTable


def test_the_page_used_least_recently_is_given_out_first():
    pages = PageAllocator(3)
    held = pages.allocate(3)
    for page in held:
        pages.cached.add([page], [bytes([page])])
    for page in (held[1], held[0], held[2]):
        pages.release([page])
    assert pages.allocate(2) == [held[1], held[0]]
    assert pages.cached.find(bytes([held[2]])) == held[2]
    assert pages.cached.find(bytes([held[0]])) is None


def test_a_cached_page_counts_as_free_until_it_is_held_again():
    pages = PageAllocator(2)
    (page,) = pages.allocate(1)
    pages.cached.add([page], [b"a"])
    pages.release([page])
    assert pages.num_free == 2
    pages.hold(np.array([page]))
    assert pages.num_free == 1
    assert pages.holders(page) == 1


def test_a_page_may_be_written_by_its_only_holder_unless_it_is_cached():
    pages = PageAllocator(2)
    page, other = pages.allocate(2)
    assert pages.is_writable(page)
    pages.hold(np.array([page]))
    assert not pages.is_writable(page)
    pages.cached.add([other], [b"a"])
    assert not pages.is_writable(other)


def test_the_first_page_with_a_hash_stays_the_cached_one():
    pages = PageAllocator(2)
    first, second = pages.allocate(2)
    pages.cached.add([first], [b"a"])
    pages.cached.add([second], [b"a"])
    assert pages.cached.find(b"a") == first
    assert pages.is_writable(second)


def test_flushing_forgets_every_hash_and_frees_what_nobody_holds():
    pages = PageAllocator(2)
    first, second = pages.allocate(2)
    pages.cached.add([first], [b"a"])
    pages.cached.add([second], [b"b"])
    pages.release([second])
    pages.flush()
    assert (pages.cached.find(b"a"), pages.cached.find(b"b"), pages.num_free) == (None, None, 1)
    pages.check(Counter([first]))


def test_allocating_past_the_end_is_a_bug_and_raises():
    with pytest.raises(RuntimeError, match="3 pages cannot be allocated: 2 of 2"):
        PageAllocator(2).allocate(3)


def test_a_lost_page_is_noticed():
    pages = PageAllocator(3)
    pages.num_pages += 1  # one that nobody counts
    with pytest.raises(RuntimeError, match="lost or doubled"):
        pages.check(Counter())


def test_a_page_held_by_someone_unknown_is_noticed():
    pages = PageAllocator(3)
    pages.allocate(1)
    with pytest.raises(RuntimeError, match="pages held"):
        pages.check(Counter())


@given(st.lists(st.tuples(st.sampled_from("ahrcf"), st.integers(0, 7)), max_size=80))
def test_whatever_is_done_every_page_is_accounted_for(steps):
    pages, held = PageAllocator(5), Counter()
    for kind, pick in steps:
        known = sorted(held.elements())
        if kind == "a" and pick <= pages.num_free:
            held.update(pages.allocate(pick))
        elif kind == "h" and known:
            pages.hold(np.array([known[pick % len(known)]]))
            held[known[pick % len(known)]] += 1
        elif kind == "r" and known:
            page = known[pick % len(known)]
            pages.release([page])
            held -= Counter([page])
        elif kind == "c" and known:
            pages.cached.add([known[pick % len(known)]], [bytes([pick])])
        elif kind == "f" and pick == 0:
            pages.flush()
        pages.check(held)
        assert pages.num_free == 5 - len(held)


def test_a_slot_has_one_holder_at_a_time():
    slots = SlotTable(2)
    first, second = slots.allocate(1), slots.allocate(2)
    assert slots.holders == {first: 1, second: 2}
    assert slots.num_free == 0
    slots.release(first)
    assert slots.allocate(3) == first
