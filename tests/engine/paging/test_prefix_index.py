"""The index of cached blocks says of every mesh what a walk over its cache would find."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.paging.allocator import PageAllocator
from twinmesh.engine.paging.prefix_index import PrefixIndex, members

MESHES = 3
TEXTS = st.text("ab", min_size=1, max_size=6)


def chain(text):
    """A hash for each block of a text of one letter a block, which stands for all up to there."""
    return [text[: i + 1].encode() for i in range(len(text))]


@given(st.lists(st.tuples(st.integers(0, MESHES - 1), st.sampled_from("aaaf"), TEXTS), max_size=40))
def test_a_block_is_listed_for_the_meshes_that_have_it(steps):
    index = PrefixIndex()
    meshes = [PageAllocator(8, index.listing(mesh)) for mesh in range(MESHES)]
    for mesh, what, text in steps:
        pages = meshes[mesh]
        if what == "f":
            pages.flush()
        else:  # a prompt is computed and its pages are released, so that more of them evict others
            held = pages.allocate(len(text))
            pages.cached.add(held, chain(text))
            pages.release(reversed(held))
        for number, other in enumerate(meshes):
            index.check(number, other.cached.blocks)
        everything = (1 << MESHES) - 1
        has = [block in {b for other in meshes for b in other.cached.blocks} for block in chain(text)]
        if has == sorted(has, reverse=True):
            assert index.depth(chain(text), len(text), everything) == sum(has)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 31, 64, 100])
def test_how_much_of_a_prompt_is_cached_is_found_in_few_steps(length):
    index, looked_up = PrefixIndex(), []
    index.listing(5).enter(chain("a" * length))

    class Counted(bytes):
        def __hash__(self):
            looked_up.append(self)
            return bytes.__hash__(self)

        __eq__ = bytes.__eq__

    prompt = [Counted(block) for block in [*chain("a" * length), *chain("a" * length + "b" * 2000)[length:]]]
    assert index.depth(prompt, len(prompt), 1 << 5) == length
    assert len(looked_up) <= 2 * length.bit_length() + 1
    assert index.depth(prompt, len(prompt), 1 << 4) == 0
    assert index.depth(prompt, 2, 1 << 5) == min(2, length)


def test_a_set_of_meshes_is_listed_in_order():
    assert list(members(0)) == []
    assert list(members(1 << 200 | 1 << 3 | 1)) == [0, 3, 200]


def test_a_block_that_is_listed_and_not_cached_is_found():
    index = PrefixIndex()
    index.listing(1).enter([b"a"])
    index.check(1, [b"a"])
    index.check(0, [])
    with pytest.raises(RuntimeError, match="mesh 1: 1 blocks are listed and not cached, or reverse"):
        index.check(1, [])
