"""Pages of 8 bits: every attention against the oracle, the oracle against plain numbers, and what is written."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle
from jax.experimental.pallas import mosaic_gpu as plgpu
from twinmesh.kernels_pallas import decode, prefill, reference, xla
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.attention import QuantizedPages, append_kv, paged_decode_attention, paged_prefill_attention
from twinmesh.kernels_pallas.cpu import loader
from twinmesh.kernels_pallas.pages import dequantize, quantize
from twinmesh.kernels_pallas.tiles import DecodeTiles, PrefillTiles

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
INT8, FP8 = jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)
KINDS = {"int8": (INT8, INT8), "int8/fp8": (INT8, FP8), "fp8": (FP8, FP8)}


def stored(pages, dtype, seed):
    """The pages in 8 bits; where no token is, scales are NaN."""
    channels = np.exp(np.random.default_rng(seed).standard_normal(pages.shape[2:])).astype(np.float32)
    values, tokens = quantize(jnp.asarray(pages), jnp.asarray(channels), dtype)
    return QuantizedPages(values, jnp.swapaxes(tokens, 1, 2), jnp.asarray(channels))


def in_8_bits(case, kind):
    k, v = (stored(x, dtype, i) for i, (x, dtype) in enumerate(zip((case.k_pages, case.v_pages), kind, strict=True)))
    return replace(case, k_pages=k, v_pages=v)


def as_float32(case):
    """What the pages stand for, in float32."""
    pages = {
        name: dequantize(x.values, jnp.swapaxes(x.tokens, 1, 2), x.channels)
        for name, x in (("k_pages", case.k_pages), ("v_pages", case.v_pages))
    }
    return replace(case, q=case.q.astype(np.float32), **pages)


def arguments(case, is_prefill):
    return case.prefill if is_prefill else {"q": case.q[: len(case.kv_len)], **case.cache}


def run(attention, case, is_prefill, **options):
    return np.asarray(jax.jit(lambda arrays: attention(**arrays, **options))(arguments(case, is_prefill)), np.float32)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("is_prefill", [False, True])
def test_the_oracle_sees_what_the_numbers_stand_for(make_case, kind, is_prefill):
    case = in_8_bits(make_case([9, 30, 0, 17], [9, 4, 0, 1] if is_prefill else None, heads=(6, 2)), kind)
    attention = oracle.paged_prefill_attention if is_prefill else oracle.paged_decode_attention
    options = {"scale": 0.3, "window": 12, "sink": np.linspace(-1, 2, 6, dtype=np.float32)}
    want = run(attention, as_float32(case), is_prefill, **options)
    np.testing.assert_allclose(run(attention, case, is_prefill, **options), want, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("is_prefill", [False, True])
def test_plain_xla_and_the_kernels_of_this_cpu_agree_with_the_oracle(make_case, kind, is_prefill):
    """With windows and GPT-OSS's sinks; and without, over several pages that are not full."""
    chunk = [40, 4, 0, 1] if is_prefill else None
    case = in_8_bits(make_case([40, 90, 0, 17], chunk, heads=(8, 2)), kind)
    plain, dispatched, want_of = (
        (oracle.spelled_out(xla.paged_prefill_attention), paged_prefill_attention, oracle.paged_prefill_attention)
        if is_prefill
        else (oracle.spelled_out(xla.paged_decode_attention), paged_decode_attention, oracle.paged_decode_attention)
    )
    for changes in ({}, {"window": 33, "sink": np.linspace(-1, 2, 8, dtype=np.float32)}):
        options = {"scale": 0.3, **changes}
        want = run(want_of, case, is_prefill, **options)
        np.testing.assert_allclose(run(plain, case, is_prefill, **options), want, atol=1e-5)
        np.testing.assert_allclose(run(dispatched, case, is_prefill, **options), want, atol=1e-5)


@pytest.mark.skipif(loader.toolchain() is None, reason="no CPU kernels here")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_kernels_of_this_cpu_run(make_case, kind):
    case = in_8_bits(make_case([9, 3]), kind)
    lowered = jax.jit(functools.partial(paged_decode_attention, scale=0.3)).lower(**arguments(case, False))
    assert "twinmesh.decode_" in lowered.as_text()


# (heads, head_dim, page_size, kind, options): each head_dim, page size and kind of pages, a window, sinks, a softcap.
VARIANTS = [
    ((8, 2), 64, 64, "int8", {"window": 128, "sink": True}),
    ((4, 1), 128, 32, "fp8", {}),
    ((4, 2), 256, 128, "int8/fp8", {"softcap": 5.0, "window": 70}),
]


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "kind", "changes", "is_prefill"),
    [
        (*variant, is_prefill)
        for variant in VARIANTS
        for is_prefill in (False, True)
        if variant[1] < 256 or not is_prefill
    ],
)
def test_the_hopper_kernels_agree_with_the_oracle(make_case, heads, head_dim, page_size, kind, changes, is_prefill):
    # Two blocks of tokens, one and a little more than a page, and none; a piece of a chunk has one query head.
    lengths, chunk = ([140, page_size + 1, 7, 0], [70, page_size + 1, 1, 0])
    heads = (2, heads[1]) if is_prefill else heads
    case = make_case(
        lengths, chunk if is_prefill else None, page_size=page_size, max_pages=-(-140 // page_size) + 1, heads=heads,
        head_dim=head_dim, dtype=jnp.dtype("bfloat16"),
    )  # fmt: skip
    case = in_8_bits(case, KINDS[kind])
    sink = np.linspace(-1, 3, heads[0]).astype(np.float32) if changes.get("sink") else None
    options = {"scale": 0.1, **changes, "sink": sink}
    kv = PagedKV(**case.cache)
    if is_prefill:
        tiles = PrefillTiles(tile=128, stages=2)
        kernel = functools.partial(prefill.paged_prefill_attention, tiles=tiles, cores=2, interpret=INTERPRET)
        got = jax.jit(lambda q, kv, start: kernel(q, kv, start, AttentionOptions(**options)))(case.q, kv, case.q_start)
        want = run(oracle.paged_prefill_attention, replace(case, q=case.q.astype(np.float32)), True, **options)
    else:
        kernel = functools.partial(
            decode.paged_decode_attention, tiles=DecodeTiles(128, 2), cores=3, interpret=INTERPRET
        )
        got = jax.jit(lambda q, kv: kernel(q, kv, AttentionOptions(**options)))(case.q, kv)
        want = run(oracle.paged_decode_attention, replace(case, q=case.q.astype(np.float32)), False, **options)
    got, epsilon = np.asarray(got, np.float32), 2.0**-7
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= 2 * epsilon * np.linalg.norm(want)  # keys and values are rounded as well
    assert not got[want == 0].any()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_appended_is_what_the_oracle_appends(kind):
    rng, slot = np.random.default_rng(0), np.array([23, 24, 0, 25, 5, 2**31 - 1], np.int32)
    pages = [stored(rng.standard_normal((6, 4, 2, 8)).astype(np.float32), dtype, 1) for dtype in kind]
    k, v = rng.standard_normal((2, 6, 2, 8)).astype(np.float32) * 30
    k[2] = 0
    want = jax.jit(reference.append_kv)(*pages, k, v, slot)
    got = jax.jit(append_kv)(*pages, k, v, slot)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for side, new in zip(got, (k, v), strict=True):
        exact = 2.0**-4 if side.dtype == FP8 else 1 / 254
        back = dequantize(side.values, jnp.swapaxes(side.tokens, 1, 2), side.channels)[0, 0]
        bound = exact * np.abs(new[2] / side.channels).max(-1, keepdims=True) * side.channels
        assert (np.abs(back - new[2]) <= bound + 1e-30).all()
    for side, before in zip(got, pages, strict=True):
        np.testing.assert_array_equal(side.tokens[2, :, 1], before.tokens[2, :, 1])  # nobody wrote there


def test_a_number_that_is_no_number_is_seen_by_who_attends_to_it():
    values, tokens = quantize(jnp.array([[[1.0, jnp.nan, 2.0]], [[1.0, 2.0, 3.0]]]), jnp.ones((1, 3)), INT8)
    found = np.asarray(dequantize(values, tokens, jnp.ones((1, 3))))
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1, 0], [1, 2, 3], rtol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": jnp.zeros((5, 16, 2))}, r"k_pages.tokens is float32\[5, 16, 2\].*float32\[5, 2, 16\]"),
        ({"channels": jnp.zeros((2, 4))}, r"k_pages.channels is float32\[2, 4\].*float32\[2, 8\]"),
        ({"values": jnp.zeros((5, 16, 2, 8), jnp.int16)}, "k_pages has dtype int16: 8-bit numbers are int8"),
    ],
)
def test_pages_that_do_not_fit_are_refused_by_name(change, message):
    plain = jnp.zeros((5, 16, 2, 8))
    pages = stored(plain, INT8, 0)._replace(**change)
    new, slot = jnp.zeros((3, 2, 8)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=message):
        append_kv(pages, plain, new, new, slot)
    with pytest.raises(ValueError, match=r"v_pages has dtype int8: .*QuantizedPages"):
        append_kv(plain, plain.astype(jnp.int8), new, new, slot)
