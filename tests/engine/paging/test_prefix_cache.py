"""The prefix cache finds what a walk over every block would find, whatever was cached and evicted before."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.paging.allocator import PageAllocator
from twinmesh.engine.paging.prefix_cache import PrefixCache


def chain(text):
    """A hash for each block of a text of one letter a block, which stands for all up to there."""
    return [text[: i + 1].encode() for i in range(len(text))]


TEXTS = st.text("ab", min_size=1, max_size=6)


@given(st.lists(st.tuples(st.sampled_from(["add", "add all", "evict", "ask", "ask", "clear"]), TEXTS), max_size=60))
def test_a_chain_is_cached_as_far_as_a_walk_over_it_finds(steps):
    cache, page_of, pages = PrefixCache(), {}, iter(range(10_000))
    for what, text in steps:
        hashes = chain(text)
        if what in ("add", "add all"):
            for block in hashes if what == "add all" else hashes[-1:]:
                page = next(pages)
                cache.add([page], [block])
                page_of.setdefault(block, page)
        elif what == "evict" and hashes[-1] in page_of:
            cache.evict([page_of.pop(hashes[-1])])
        elif what == "clear":
            cache.clear()
            page_of.clear()
        stop = len(hashes) - len(text) % 2
        expected = next((i for i, block in enumerate(hashes[:stop]) if block not in page_of), stop)
        assert cache.run_length(hashes, stop) == expected
        run = cache.run(hashes[:expected])
        assert run.pages == run.array.tolist() == [page_of[block] for block in hashes[:expected]]
        cache.check()


def test_what_is_found_is_remembered_for_every_prompt_that_begins_alike(monkeypatch):
    cache, hashes, looked_up = PrefixCache(), chain("a" * 500), Counter()

    class Counted(bytes):
        def __hash__(self):
            looked_up[len(self)] += 1
            return bytes.__hash__(self)

        __eq__ = bytes.__eq__

    for page, block in enumerate(hashes):
        cache.add([page], [block])
    assert cache.run_length(hashes, 500) == 500
    others = [Counted(block) for block in [*hashes[:400], *chain("a" * 400 + "b" * 100)[400:]]]
    for _ in range(3):
        assert cache.run_length(others, 500) == 400
    assert sum(looked_up.values()) < 50


@pytest.mark.parametrize("evicted", ["a", "ab", "abab"])
def test_an_evicted_block_ends_the_chain_there(evicted):
    cache, hashes = PrefixCache(), chain("abab")
    for page, block in enumerate(hashes):
        cache.add([page], [block])
    assert cache.run_length(hashes, 4) == 4
    cache.evict([len(evicted) - 1])
    assert cache.run_length(hashes, 4) == len(evicted) - 1
    cache.add([9], [evicted.encode()])
    assert cache.run_length(hashes, 4) == 4


def test_pages_held_together_are_counted_one_by_one():
    pages = PageAllocator(4)
    held = pages.allocate(3)
    for page in held:
        pages.cached.add([page], [bytes([page])])
    pages.release(held[:2])
    index = np.array(held)
    assert pages.count_idle(index) == 2
    pages.hold(index)
    assert [pages.holders(page) for page in held] == [1, 1, 2]
    assert pages.count_idle(index) == 0
    pages.check(Counter({held[0]: 1, held[1]: 1, held[2]: 2}))
