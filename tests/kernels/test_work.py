"""Lists of work: everything once, nothing that nobody sees."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.kernels_pallas.work import Piece, chunk_work, split_work

CAPACITY, REQUESTS, TOKENS, ROWS = 640, 4, 512, 128
lengths = st.lists(st.integers(0, CAPACITY), min_size=REQUESTS, max_size=REQUESTS)
split = jax.jit(split_work, static_argnums=(1, 2, 3))
cut = jax.jit(chunk_work, static_argnums=(2, 3, 4))


@pytest.mark.parametrize("window", [None, 1, 129, 2000])
@settings(max_examples=20, deadline=None)
@given(kv_len=lengths)
def test_splits_hold_each_visible_token_once_cut_at_absolute_multiples(window, kv_len):
    work = split(np.array(kv_len, np.int32), window, 128, CAPACITY)
    start, items = np.asarray(work.start), np.asarray(work.items)
    assert start[-1] <= len(items)
    for request, length in enumerate(kv_len):
        own = items[start[request] : start[request + 1]]
        assert (own[:, 0] == request).all()
        tokens = np.concatenate([np.arange(begin, end) for _, begin, end in own] or [np.arange(0)])
        np.testing.assert_array_equal(tokens, np.arange(max(0, length - (window or length)), length))
        assert all(begin // 128 == (end - 1) // 128 for _, begin, end in own)


@pytest.mark.parametrize("window", [None, 1, 100])
@settings(max_examples=30, deadline=None)
@given(chunks=st.lists(st.integers(0, 128), min_size=REQUESTS, max_size=REQUESTS), cached=lengths)
def test_pieces_hold_each_row_once_with_what_it_sees(window, chunks, cached):
    q_start = np.cumsum([0, *chunks]).astype(np.int32)
    kv_len = np.array([c + n if n else 0 for c, n in zip(chunks, cached, strict=True)], np.int32)
    pieces, count = cut(kv_len, q_start, window, TOKENS, ROWS)
    pieces = [Piece(*piece) for piece in np.asarray(pieces)[: count[0]]]
    assert count[0] == len(pieces)
    rows = []
    for piece in pieces:
        own = range(piece.skip, piece.skip + piece.own)
        assert piece.row % 8 == 0
        assert 0 <= piece.row <= TOKENS - ROWS
        assert own.stop <= ROWS
        rows += [piece.row + i for i in own]
        request, length = piece.request, piece.length
        if not length:
            assert piece.high == 0
            continue
        assert length == kv_len[request]
        positions = [piece.position + i for i in own]
        assert positions == [length - (q_start[request + 1] - piece.row - i) for i in own]
        assert piece.high == positions[-1] + 1
        assert piece.low == (0 if window is None else max(0, positions[0] - window + 1))
    assert sorted(rows) == list(range(TOKENS))
    seen = [piece.high - piece.low for piece in pieces]
    assert seen == sorted(seen, reverse=True)
