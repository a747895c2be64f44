"""The Hopper kernels in the interpreter: races raise, reads out of bounds raise, memory and outputs begin as NaN.

Tolerance: weights and results are rounded to the inputs' dtype, each by half its epsilon at most, and weights add up to
1; so an element is off by no more than epsilon times the largest value. The norms agree better, as errors average out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from twinmesh.kernels_pallas import decode, prefill
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.tiles import DecodeTiles, PrefillTiles

BF16 = jnp.dtype("bfloat16")
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def on_interpreter(attention, case, tiles, cores=3, first_page=0, **options):
    kv = PagedKV(**case.cache, first_page=np.full(1, first_page, np.int32))
    arrays = (case.q, kv, case.q_start) if attention is prefill.paged_prefill_attention else (case.q, kv)
    run = jax.jit(
        lambda arrays: attention(
            *arrays, AttentionOptions(**options), tiles=tiles, cores=cores, interpret=INTERPRET
        )
    )  # fmt: skip
    return np.asarray(run(arrays), np.float32)


def check(case, got, plain, **options):
    """Against the oracle in float32, on the same rounded inputs."""
    is_prefill = plain is oracle.paged_prefill_attention
    arrays = case.prefill if is_prefill else {"q": case.q, **case.cache}
    wide = {name: jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float32) for name, x in arrays.items()}
    want = np.asarray(jax.jit(lambda arrays: plain(**arrays, **options))(wide))
    epsilon, largest = float(jnp.finfo(case.q.dtype).eps), np.nanmax(np.abs(case.v_pages.astype(np.float32)), initial=0)
    np.testing.assert_allclose(got, want, rtol=0, atol=epsilon * largest)
    assert np.linalg.norm(got - want) <= epsilon * np.linalg.norm(want)
    assert not got[want == 0].any()


def options_for(case, scale=0.2, **options):
    sink = np.linspace(-1, 3, case.q.shape[1]).astype(np.float32) if options.pop("sink", False) else None
    return {"scale": scale, "sink": sink, **options}


# (heads, head_dim, page_size, dtype, options): every page size, head dim, dtype and option, MQA and no grouping; and
# GPT-OSS's eight query heads to one, with its window and sinks.
VARIANTS = [
    ((8, 2), 64, 64, "bfloat16", {}),
    ((16, 1), 128, 16, "float16", {"window": 70, "sink": True}),
    ((4, 2), 256, 128, "bfloat16", {"softcap": 5.0}),
    ((3, 3), 64, 32, "bfloat16", {"window": 1, "softcap": 2.0, "sink": True}),
    ((2, 1), 256, 32, "float16", {"window": 100, "scale": -0.1}),
    ((16, 2), 64, 64, "bfloat16", {"window": 128, "sink": True}),
]
IDS = ["gqa", "mqa", "softcap", "window1", "negative-scale", "gpt-oss"]


@pytest.mark.parametrize(("heads", "head_dim", "page_size", "dtype", "changes"), VARIANTS, ids=IDS)
def test_decode_matches_oracle(make_case, heads, head_dim, page_size, dtype, changes):
    lengths = [page_size - 1, page_size, page_size + 1, 0, 300, 1]
    case = make_case(
        lengths, page_size=page_size, max_pages=-(-300 // page_size) + 1, heads=heads, head_dim=head_dim,
        dtype=jnp.dtype(dtype),
    )  # fmt: skip
    options = options_for(case, **changes)
    tiles = DecodeTiles(split=128, stages=2)
    got = on_interpreter(decode.paged_decode_attention, case.behind(5), tiles, first_page=5, **options)
    check(case, got, oracle.paged_decode_attention, **options)


@pytest.mark.parametrize(("heads", "head_dim", "page_size", "dtype", "changes"), VARIANTS, ids=IDS)
def test_prefill_matches_oracle(make_case, heads, head_dim, page_size, dtype, changes):
    # A piece of work has one query head, so a few tell as much as many.
    heads = {(16, 1): (2, 1), (8, 2): (4, 2), (16, 2): (2, 2), (4, 2): (2, 1)}.get(heads, heads)
    # A chunk with a cached prefix, one without, a single row, none, an empty request and padding.
    case = make_case(
        [200, page_size + 1, page_size, 7, 0], [133, page_size + 1, 1, 0, 5], tokens=300, page_size=page_size,
        max_pages=-(-200 // page_size) + 1, heads=heads, head_dim=head_dim, dtype=jnp.dtype(dtype),
    )  # fmt: skip
    options = options_for(case, **changes)
    tiles = PrefillTiles(tile=64 if head_dim == 256 else 128, stages=2)
    behind = case.behind(5)
    got = on_interpreter(prefill.paged_prefill_attention, behind, tiles, cores=2, first_page=5, **options)
    check(case, got, oracle.paged_prefill_attention, **options)


def test_fewer_query_rows_than_a_tile_are_padded(make_case):
    case = make_case([3, 30], [3, 2], page_size=16, max_pages=3, heads=(2, 2), head_dim=64, dtype=BF16)
    options = options_for(case)
    got = on_interpreter(prefill.paged_prefill_attention, case, PrefillTiles(64, 2), cores=1, **options)
    check(case, got, oracle.paged_prefill_attention, **options)


def spread(case, pages):
    """The case with pools of a fixed size, so that drawn lengths do not compile anew."""
    fill = [(0, pages - len(case.k_pages)), *[(0, 0)] * 3]
    pools = {name: np.pad(getattr(case, name), fill, constant_values=np.nan) for name in ("k_pages", "v_pages")}
    return case.__class__(**{**vars(case), **pools})


@pytest.fixture(scope="module")
def drawn_decode():
    options = {"scale": 0.2, "window": 150}

    def run(q, cache):
        return decode.paged_decode_attention(
            q, PagedKV(**cache), AttentionOptions(**options), tiles=DecodeTiles(128, 2), cores=3, interpret=INTERPRET
        )

    return jax.jit(run), options


@settings(max_examples=4, deadline=None)
@given(lengths=st.lists(st.integers(0, 256), min_size=4, max_size=4), seed=st.integers(0, 99), shared=st.booleans())
def test_decode_matches_oracle_for_drawn_lengths_and_shared_pages(make_case, drawn_decode, lengths, seed, shared):
    case = spread(
        make_case(lengths, page_size=64, max_pages=4, heads=(4, 2), head_dim=64, dtype=BF16, seed=seed),
        pages=19,
    )  # fmt: skip
    if shared and min(lengths[:2]) >= 64:
        case.page_table[1, 0] = case.page_table[0, 0]
    run, options = drawn_decode
    got = np.asarray(run(case.q, case.cache), np.float32)
    check(case, got, oracle.paged_decode_attention, **options)


def test_a_decoded_row_has_the_same_bits_whatever_else_is_in_the_batch(make_case):
    case = make_case([300, 77, 130, 256], page_size=64, max_pages=5, heads=(4, 2), head_dim=64, dtype=BF16)
    options = options_for(case)
    together = on_interpreter(decode.paged_decode_attention, case, DecodeTiles(128, 2), cores=3, **options)
    case.kv_len[[0, 1, 3]] = 0
    alone = on_interpreter(decode.paged_decode_attention, case, DecodeTiles(128, 2), cores=5, **options)
    np.testing.assert_array_equal(together[2], alone[2])
    assert not alone[[0, 1, 3]].any()


def product_row_by_row(a, b, dtype):
    """As `np.matmul`, but the bits of a row do not depend on its place, as OpenBLAS's do on CPUs without AVX-512."""
    return np.einsum("ij,jk->ik", a.astype(dtype), b.astype(dtype))


def test_a_prefilled_row_has_the_same_bits_wherever_its_chunk_lies(make_case, monkeypatch):
    monkeypatch.setattr(np, "matmul", product_row_by_row)  # what the interpreter multiplies with
    case = make_case([50, 140], [50, 21], page_size=16, max_pages=9, heads=(2, 1), head_dim=64, dtype=BF16)
    options = options_for(case)
    first = on_interpreter(prefill.paged_prefill_attention, case, PrefillTiles(64, 2), **options)
    moved = case.__class__(**{
        **vars(case), "q": np.concatenate([case.q[50:], case.q[:50]]), "q_start": np.array([0, 21, 71], np.int32),
        "kv_len": case.kv_len[::-1].copy(), "page_table": case.page_table[::-1].copy(),
    })  # fmt: skip
    second = on_interpreter(prefill.paged_prefill_attention, moved, PrefillTiles(64, 2), cores=1, **options)
    np.testing.assert_array_equal(first, np.concatenate([second[21:], second[:21]]))


def test_decode_agrees_with_float64(make_case):
    case = make_case([200, 64], page_size=64, max_pages=4, heads=(2, 1), head_dim=64, dtype=BF16)
    options = options_for(case, scale=0.125)
    got = on_interpreter(decode.paged_decode_attention, case, DecodeTiles(128, 2), **options)
    for row, (k, v) in enumerate(zip(case.dense_k, case.dense_v, strict=True)):
        scores = case.q[row].astype(np.float64) @ k[:, 0].astype(np.float64).T * 0.125
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        want = weights / weights.sum(axis=1, keepdims=True) @ v[:, 0].astype(np.float64)
        assert np.linalg.norm(got[row] - want) <= 2.0**-8 * np.linalg.norm(want)


@pytest.mark.parametrize("cores", [1, 7])
def test_nobody_there_gets_zeros(make_case, cores):
    """No work at all in decode, only padding in prefill; outputs begin as NaN."""
    case = make_case([0, 0], [0, 0], tokens=9, page_size=64, max_pages=2, heads=(4, 2), head_dim=64, dtype=BF16)
    options = options_for(case, sink=True)
    rows = case.__class__(**{**vars(case), "q": case.q[:2]})
    assert not on_interpreter(decode.paged_decode_attention, rows, DecodeTiles(128, 2), cores, **options).any()
    assert not on_interpreter(prefill.paged_prefill_attention, case, PrefillTiles(64, 2), cores, **options).any()
