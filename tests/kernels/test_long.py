"""Lengths near 131,072: positions, ids and sizes, and kernels that see only a window of so much."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from jax.experimental.pallas import mosaic_gpu as plgpu
from twinmesh.kernels_pallas import decode, prefill
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.attention import append_kv
from twinmesh.kernels_pallas.tiles import DecodeTiles, PrefillTiles, decode_tiles
from twinmesh.kernels_pallas.work import Piece, chunk_work, split_work

LONGEST = 131072
REQUESTS = 128
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


@pytest.mark.parametrize("window", [None, 128, 4096])
def test_128_of_the_longest_requests_are_cut_where_they_should(window):
    split = decode_tiles(128, 4, 64, LONGEST if window is None else window).split
    lengths = np.array([LONGEST, LONGEST - 1, LONGEST - split, 0, 1] * 26, np.int32)[:REQUESTS]
    work = jax.jit(split_work, static_argnums=(1, 2, 3))(lengths, window, split, LONGEST)
    start, items = np.asarray(work.start), np.asarray(work.items)
    assert start[-1] <= len(items)
    assert len(items) <= REQUESTS * (LONGEST // split if window is None else window // split + 2)
    for request, length in enumerate(lengths.tolist()):
        own = items[start[request] : start[request + 1]]
        assert (own[:, 0] == request).all()
        begin, end = own[:, 1].tolist(), own[:, 2].tolist()
        if length:
            assert begin[0] == (0 if window is None else max(0, length - window))
            assert end[-1] == length
        assert begin[1:] == end[:-1]
        assert all(cut % split == 0 for cut in begin[1:])


@pytest.mark.parametrize("window", [None, 128])
def test_a_chunk_at_the_end_of_the_longest_request_is_cut_where_it_should(window):
    rows, tokens = 128, 2048
    lengths, q_start = np.array([LONGEST, LONGEST], np.int32), np.array([0, 1024, 2048], np.int32)
    pieces, count = jax.jit(chunk_work, static_argnums=(2, 3, 4))(lengths, q_start, window, tokens, rows)
    assert count[0] == tokens // rows
    piece = Piece(*np.asarray(pieces)[: count[0]].T)
    first = LONGEST - 1024 + piece.row % 1024
    np.testing.assert_array_equal(piece.position, first)
    np.testing.assert_array_equal(piece.high, first + rows)
    np.testing.assert_array_equal(piece.low, 0 if window is None else first - window + 1)


def test_partial_sums_of_128_of_the_longest_requests_stay_below_300_mb():
    """Of Qwen3-8B's or Llama-3.1-8B's heads; they are the only buffer that grows with what requests could hold."""

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    pages = array(10, 64, 8, 128, dtype=jnp.bfloat16)
    kv = PagedKV(pages, pages, array(REQUESTS, LONGEST // 64), array(REQUESTS))
    q = array(REQUESTS, 32, 128, dtype=jnp.bfloat16)
    tiles = decode_tiles(128, 4, 64, LONGEST)
    traced = decode.paged_decode_attention.trace(q, kv, AttentionOptions(0.1), tiles=tiles, cores=132)
    largest = max(x.aval.size * x.aval.dtype.itemsize for eqn in traced.jaxpr.eqns for x in eqn.outvars)
    assert 250e6 < largest < 300e6
    assert all(x.aval.size < 2**31 for eqn in traced.jaxpr.eqns for x in eqn.outvars)


@pytest.fixture(scope="module")
def long_case(make_case):
    """Two requests of 131,072 and 131,001 tokens with tables of 2,048 pages; what is seen of them lies in the last few.

    `oracle` is the same with everything moved to the front, by whole pages.
    """
    hidden = LONGEST // 64 - 6
    case = make_case(
        [384, 313], [5, 3], page_size=64, max_pages=6, heads=(2, 1), head_dim=64, dtype=jnp.dtype("bfloat16")
    )  # fmt: skip
    padding = np.full((2, hidden), 2**31 - 1, np.int32)
    moved = dataclasses.replace(
        case, kv_len=case.kv_len + np.int32(hidden * 64), page_table=np.concatenate([padding, case.page_table], axis=1)
    )  # fmt: skip
    return moved, case


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_a_window_at_the_end_of_131072_tokens_is_what_it_is_at_the_front(long_case, kernel):
    far, near = long_case
    options = {"scale": 0.2, "window": 100}
    if kernel == "decode":
        attention, plain, tiles = decode.paged_decode_attention, oracle.paged_decode_attention, DecodeTiles(128, 2)
        own, arrays = {"q": near.q[:2]}, (far.q[:2], PagedKV(**far.cache))
    else:
        attention, plain = prefill.paged_prefill_attention, oracle.paged_prefill_attention
        own, tiles = {"q": near.q, "q_start": near.q_start}, PrefillTiles(128, 2)
        arrays = (far.q, PagedKV(**far.cache), far.q_start)
    run = jax.jit(lambda x: attention(*x, AttentionOptions(**options), tiles=tiles, cores=2, interpret=INTERPRET))
    got = np.asarray(run(arrays), np.float32)
    want = np.asarray(jax.jit(lambda x: plain(**x, **options))({**own, **near.cache}), np.float32)
    assert np.linalg.norm(got - want) <= 2.0**-7 * np.linalg.norm(want)


def test_slots_of_the_largest_flat_pool_are_int32():
    """40 GB of bfloat16 KV with one head of 128 on each device: 78 million tokens, 10 ** 10 elements of keys."""
    pages = int(40e9) // (2 * 128 * 2 * 64)
    pool = jax.ShapeDtypeStruct((pages, 64, 1, 128), jnp.bfloat16)
    new, slots = jax.ShapeDtypeStruct((4, 1, 128), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
    k_pages, _ = jax.eval_shape(append_kv, pool, pool, new, new, slots)
    assert k_pages.shape == pool.shape
