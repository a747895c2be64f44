"""The dispatched attentions against the oracle: shapes fixed per test, lengths and contents drawn or chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.kernels_pallas import xla
from twinmesh.kernels_pallas.attention import paged_decode_attention, paged_prefill_attention

SINK = np.linspace(-1, 3, 6).astype(np.float32)
OPTIONS = [{}, {"window": 1}, {"window": 13, "sink": SINK}, {"window": 24, "softcap": 1.5, "sink": SINK}]
IDS = ["plain", "window1", "window+sink", "all"]

# One page_size of 8: lengths at a page boundary -1, 0 and +1, empty slots, and one that fills the table.
BOUNDARY = [7, 8, 9, 0, 96, 95, 1, 15, 16, 17, 0, 88]


def prefill(case, attention=paged_prefill_attention, **options):
    return jax.jit(lambda arrays: attention(**arrays, scale=0.3, **options))(case.prefill)


def decode(case, attention=paged_decode_attention, **options):
    arrays = {"q": case.q[: len(case.kv_len)], **case.cache}
    return jax.jit(lambda arrays: attention(**arrays, scale=0.3, **options))(arrays)


def oracle_prefill(case, **options):
    return prefill(case, oracle.paged_prefill_attention, **options)


def oracle_decode(case, **options):
    return decode(case, oracle.paged_decode_attention, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_decode_matches_oracle_at_page_boundaries(make_case, options):
    case = make_case(BOUNDARY)
    want = oracle_decode(case, **options)
    np.testing.assert_allclose(decode(case, **options), want, atol=3e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_prefill_matches_oracle_for_packed_chunks_with_cached_prefixes(make_case, options):
    case = make_case(BOUNDARY, [7, 3, 9, 0, 96, 20, 1, 0, 16, 1, 0, 41], tokens=205)
    want = oracle_prefill(case, **options)
    got = prefill(case, **options)
    np.testing.assert_allclose(got, want, atol=3e-6)
    assert not got[case.q_start[-1] :].any()


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_a_layer_behind_others_in_its_pool_gives_the_same_bits(make_case, options, as_array):
    case = make_case(BOUNDARY, [7, 3, 9, 0, 96, 20, 1, 0, 16, 1, 0, 41], tokens=205)
    first = jnp.int32(7) if as_array else 7
    for attend in (prefill, decode, oracle_prefill, oracle_decode):
        want = attend(case, **options)
        np.testing.assert_array_equal(attend(case.behind(7), first_page=first, **options), want)


def test_prefill_matches_oracle_over_several_tiles_and_blocks(make_case):
    options = {"window": 200, "sink": SINK}
    case = make_case([300, 310, 129], [300, 131, 128], tokens=600, page_size=64, max_pages=5)
    want = oracle_prefill(case, **options)
    np.testing.assert_allclose(prefill(case, **options), want, atol=3e-6)


def test_decode_matches_oracle_over_several_iterations(make_case):
    options = {"window": 300, "sink": SINK}
    lengths = np.random.default_rng(3).integers(0, 640, 37)
    lengths[::5] = 0
    case = make_case(lengths.tolist(), page_size=64, max_pages=10)
    want = oracle_decode(case, **options)
    np.testing.assert_allclose(decode(case, **options), want, atol=3e-6)


@pytest.mark.parametrize(
    ("page_size", "max_pages", "window"),
    [(4, 80, None), (4, 80, 9), (4, 80, 200), (64, 70, None), (192, 3, None), (256, 40, 300)],
)
def test_decode_matches_oracle_where_requests_may_be_far_longer_than_they_are(
    monkeypatch, make_case, page_size, max_pages, window
):
    """Splits of several blocks, also where a window is much smaller than one, and pages longer than a block."""
    monkeypatch.setattr(xla, "DECODE_SPLITS", 2)
    longest = page_size * max_pages
    lengths = np.array([1, 17, 130, 300, 0, longest // 2, longest - 1, 5, longest])
    case = make_case(np.minimum(lengths, longest).tolist(), page_size=page_size, max_pages=max_pages)
    options = {"window": window, "sink": SINK}
    np.testing.assert_allclose(decode(case, **options), oracle_decode(case, **options), atol=3e-6)


def test_a_request_that_is_not_a_number_stays_alone(make_case):
    case = make_case([40, 300, 20], page_size=8, max_pages=40)
    before = np.asarray(decode(case))
    case.v_pages[case.page_table[1][:38]] = np.nan
    after = np.asarray(decode(case))
    assert np.isnan(after[1]).all()
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_lengths_and_chunks_match_the_oracle(data):
    """Contents drawn at fixed shapes: 5 requests, at most 20 pages of 4 tokens shared at random, 48 packed rows."""
    kv_len = np.array(data.draw(st.lists(st.integers(0, 24), min_size=5, max_size=5)), np.int32)
    chunk = [data.draw(st.integers(0, min(int(n), 9))) for n in kv_len]
    page_table = np.array(data.draw(st.lists(st.integers(0, 19), min_size=30, max_size=30)), np.int32).reshape(5, 6)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    q = rng.standard_normal((48, 4, 8), np.float32)
    k_pages, v_pages = rng.standard_normal((2, 20, 4, 2, 8), np.float32)
    cache = (k_pages, v_pages, page_table, kv_len)
    q_start = np.cumsum([0, *chunk]).astype(np.int32)
    got, want = (f(q, *cache, q_start) for f in PREFILL_PAIR)
    np.testing.assert_allclose(got, want, atol=3e-6)
    got, want = (f(q[:5], *cache) for f in DECODE_PAIR)
    np.testing.assert_allclose(got, want, atol=3e-6)


PREFILL_PAIR, DECODE_PAIR = (
    tuple(jax.jit(lambda *a, f=f: f(*a, scale=0.3, window=10, softcap=4.0)) for f in pair)
    for pair in (
        (paged_prefill_attention, oracle.paged_prefill_attention),
        (paged_decode_attention, oracle.paged_decode_attention),
    )
)


@pytest.mark.parametrize("heads", [(4, 4), (6, 1)], ids=["mha", "mqa"])
def test_every_grouping_of_heads(make_case, heads):
    case = make_case([17, 8, 3], [17, 2, 1], heads=heads)
    want = oracle_prefill(case)
    np.testing.assert_allclose(prefill(case), want, atol=3e-6)
    want = oracle_decode(case)
    np.testing.assert_allclose(decode(case), want, atol=3e-6)


def test_bfloat16_keeps_float32_softmax(make_case):
    case = make_case([70, 8, 33], [70, 2, 5], dtype="bfloat16")
    for got, want in (
        (prefill(case), oracle_prefill(case)),
        (decode(case), oracle_decode(case)),
    ):
        assert got.dtype == jnp.bfloat16
        # One rounding of the same float32 result apart: 2**-8 relative.
        np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2**-7, atol=1e-3)


def test_shared_pages_serve_both_requests(make_case):
    case = make_case([24, 20])
    case.page_table[1, :2] = case.page_table[0, :2]
    want = oracle_decode(case)
    np.testing.assert_allclose(decode(case), want, atol=3e-6)
    assert np.isfinite(want).all()


def test_pages_before_the_window_are_never_needed(make_case):
    """A windowed cache group frees them: their table entries may be padding, or name pages that now hold NaN."""
    case = make_case([60, 61], [4, 30])
    want = [prefill(case, window=9), decode(case, window=9)]
    before = (60 - 4 - 8) // 8, (61 - 30 - 8) // 8
    for r, pages in enumerate(before):
        case.k_pages[case.page_table[r, :pages]] = np.nan
        case.v_pages[case.page_table[r, :pages]] = np.nan
        case.page_table[r, : pages // 2] = case.k_pages.shape[0]
    for got, expected in zip([prefill(case, window=9), decode(case, window=9)], want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_sequence_of_chunks_equals_one_prefill(make_case):
    whole = make_case([40], [40])
    want = prefill(whole)
    run = jax.jit(lambda arrays: paged_prefill_attention(**arrays, scale=0.3))
    for start, stop in ((0, 7), (7, 8), (8, 24), (24, 40)):
        chunk = np.zeros((16, *whole.q.shape[1:]), np.float32)
        chunk[: stop - start] = whole.q[start:stop]
        lengths = {"kv_len": np.array([stop], np.int32), "q_start": np.array([0, stop - start], np.int32)}
        got = run({**whole.prefill, **lengths, "q": chunk})
        np.testing.assert_allclose(got[: stop - start], want[start:stop], atol=3e-6)


def test_decode_is_the_last_row_of_prefill(make_case):
    case = make_case([40, 9, 64], [40, 3, 1])
    last = case.q_start[1:] - 1
    options = {"window": 17, "sink": SINK}
    run = jax.jit(lambda arrays: paged_decode_attention(**arrays, scale=0.3, **options))
    got = run({"q": case.q[last], **case.cache})
    np.testing.assert_allclose(got, prefill(case, **options)[last], atol=3e-6)


def test_a_row_has_the_same_bits_in_any_slot_and_company(make_case):
    case = make_case(np.random.default_rng(0).integers(1, 90, 40).tolist())
    run = jax.jit(lambda q, cache: paged_decode_attention(q, **cache, scale=0.3))
    want = run(case.q, case.cache)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        order = rng.permutation(40)
        absent = rng.random(40) < 0.5
        cache = {**case.cache, "page_table": case.page_table[order]}
        cache["kv_len"] = np.where(absent, 0, case.kv_len[order])
        got = run(case.q[order], cache)
        np.testing.assert_array_equal(got, np.where(absent[:, None, None], 0, want[order]))


def test_a_chunk_has_the_same_bits_in_any_company(make_case):
    case = make_case([30, 50, 20], [30, 10, 20], tokens=64)
    run = jax.jit(lambda arrays: paged_prefill_attention(**arrays, scale=0.3))
    want = run(case.prefill)
    alone = {**case.prefill, "q": np.roll(case.q, -30, axis=0)}
    alone["kv_len"], alone["page_table"] = (x[[1, 0, 2]].copy() for x in (case.kv_len, case.page_table))
    alone["kv_len"][1:] = 0
    alone["q_start"] = np.array([0, 10, 10, 10], np.int32)
    np.testing.assert_array_equal(run(alone)[:10], want[30:40])


@pytest.mark.parametrize("window", [None, 40])
def test_a_token_has_the_same_bits_wherever_its_chunk_began(make_case, window):
    """Blocks of pages lie at absolute positions: a window or a chunk that begins elsewhere sums the same parts."""
    case = make_case([420], [64], page_size=16, max_pages=27)
    run = jax.jit(lambda arrays: paged_prefill_attention(**arrays, scale=0.3, window=window))
    want = run(case.prefill)
    for skipped in (8, 19, 32, 60):
        later = {**case.prefill, "q": np.roll(case.q, -skipped, axis=0)}
        later["q_start"] = np.array([0, 64 - skipped], np.int32)
        np.testing.assert_array_equal(run(later)[: 64 - skipped], want[skipped:])


def test_one_trace_under_strict_promotion(make_case):
    case = make_case([9, 3], [4, 3], dtype="bfloat16")
    options = {"scale": 0.3, "window": 5, "softcap": 2.0, "sink": SINK.astype(jnp.bfloat16)}
    with jax.numpy_dtype_promotion("strict"):
        for module in (paged_prefill_attention, oracle.paged_prefill_attention):
            jax.jit(lambda arrays, f=module: f(**arrays, **options)).trace(case.prefill)
        for module in (paged_decode_attention, oracle.paged_decode_attention):
            jax.jit(lambda arrays, f=module: f(**arrays, **options)).trace({"q": case.q[:2], **case.cache})
