"""Hashes of full pages: equal exactly where everything up to the page's end is equal."""

from hashlib import blake2b

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.paging.block_hash import block_hashes, next_block

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=20, max_size=20)


def test_a_hash_is_blake2b_over_the_parent_and_little_endian_tokens():
    first = blake2b(b"\x01\0\0\0\xff\xff\0\0", digest_size=16).digest()
    second = blake2b(first + b"\x02\0\0\0\x03\0\0\0", digest_size=16).digest()
    assert block_hashes([1, 65535, 2, 3, 9], 2) == (first, second)


def test_only_full_pages_have_a_hash():
    assert [len(block_hashes(range(n), 4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


@given(TOKENS, st.integers(0, 19))
def test_a_token_changes_its_own_page_and_all_after_it(tokens, at):
    changed = tokens.copy()
    changed[at] ^= 1
    same = [a == b for a, b in zip(block_hashes(tokens, 5), block_hashes(changed, 5), strict=True)]
    assert same == [page < at // 5 for page in range(4)]


@given(TOKENS)
def test_a_chain_may_be_continued_page_by_page(tokens):
    whole = block_hashes(tokens, 5)
    parent = b""
    for page in range(4):
        parent = next_block(parent, tokens[5 * page : 5 * page + 5])
        assert parent == whole[page]


def test_arrays_of_any_integer_type_do():
    expected = block_hashes(list(range(8)), 4)
    for dtype in (np.int32, np.int64, np.uint16):
        assert block_hashes(np.arange(8, dtype=dtype), 4) == expected
