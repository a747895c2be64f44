"""Attention of chunks in the kernel of this CPU: that it runs, a row's bits in any chunk, and what it leaves to XLA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twinmesh.kernels_pallas import xla
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.attention import paged_prefill_attention
from twinmesh.kernels_pallas.cpu import frames, loader
from twinmesh.kernels_pallas.cpu.checks import check_prefill
from twinmesh.kernels_pallas.cpu.levels import LEVELS

pytestmark = pytest.mark.skipif(loader.toolchain() is None, reason="no CPU kernels here")
LENGTH, PAGE, KV_HEADS, DIM = 300, 16, 2, 16


def draw(dtype, heads=6, seed=0):
    rng = np.random.default_rng(seed)
    pages = -(-LENGTH // PAGE)
    k, v = (jnp.asarray(rng.standard_normal((pages, PAGE, KV_HEADS, DIM)), dtype) for _ in range(2))
    q, table = rng.standard_normal((LENGTH, heads, DIM)), rng.permutation(pages)
    return jnp.asarray(q, dtype), k, v, jnp.asarray(table, jnp.int32)


@functools.partial(jax.jit, static_argnames=("window", "softcap"))
def attend(q, k, v, table, end, window=None, softcap=None):
    """Attend from the chunk q, which ends at token `end` of a request."""
    lengths, starts = jnp.asarray(end, jnp.int32)[None], jnp.array([0, q.shape[0]], jnp.int32)
    return paged_prefill_attention(q, k, v, table[None], lengths, starts, scale=0.2, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 1, 40, 200])
@pytest.mark.parametrize("heads", [2, 6, 14])
def test_it_agrees_with_xla(dtype, window, heads):
    q, k, v, table = draw(dtype, heads)
    kv = PagedKV(k, v, table[None], jnp.array([LENGTH], jnp.int32), jnp.zeros(1, jnp.int32))
    want = xla.paged_prefill_attention(q, kv, jnp.array([0, LENGTH], jnp.int32), AttentionOptions(0.2, window))
    found = attend(q, k, v, table, LENGTH, window)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(want, np.float32), atol=3e-6 if dtype == "float32" else 0.02
    )
    assert "twinmesh.prefill" in attend.lower(q, k, v, table, LENGTH, window).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 40])
def test_a_rows_bits_are_its_own_wherever_chunks_are_cut(dtype, window):
    q, k, v, table = draw(dtype)
    want = attend(q, k, v, table, LENGTH, window)
    for cuts in ((0, 1, 2, 10), (0, 63, 64, 65, 66), (0, 127, 129, 300), (33, 160, 299, 300)):
        for begin, end in itertools.pairwise(cuts):
            found = attend(q[begin:end], k, v, table, end, window)
            np.testing.assert_array_equal(found, want[begin:end])


def test_a_token_that_is_not_finite_is_seen_by_later_rows_alone():
    q, k, v, table = draw("float32")
    want = attend(q, k, v, table, LENGTH)
    found = attend(q, k.at[table[9], 5].set(np.nan), v, table, LENGTH)
    np.testing.assert_array_equal(found[:149], want[:149])
    assert np.isnan(found[149:]).all()


def test_what_it_does_not_take_is_xlas():
    q, k, v, table = draw("float32")
    assert "twinmesh.prefill" not in attend.lower(q, k, v, table, LENGTH, softcap=3.0).as_text()
    odd = (x[..., :8] for x in (q, k, v))
    if loader.toolchain().level.lanes > 8:
        assert "twinmesh.prefill" not in attend.lower(*odd, table, LENGTH).as_text()


def test_lesser_cpus_compute_the_same():
    level = next(level for level in LEVELS if level.name == "avx2")
    if loader.toolchain().level.machine != level.machine or loader.toolchain().level.name == level.name:
        pytest.skip("this CPU's own level is tested above")
    (code,) = loader.compile_in_child(level, f"prefill_bfloat16:{DIM}")
    assert check_prefill(functools.partial(frames.call, loader.load_object(code)), level, DIM, "bfloat16", "bfloat16")


@pytest.mark.parametrize(("head_dim", "heads", "takes"), [(256, 32, True), (256, 33, False), (512, 1, False)])
def test_heads_that_a_threads_stack_would_not_hold_are_xlas(head_dim, heads, takes):
    q = jax.ShapeDtypeStruct((40, heads, head_dim), jnp.float32)
    pages = jax.ShapeDtypeStruct((3, PAGE, 1, head_dim), jnp.float32)
    text = attend.lower(q, pages, pages, jax.ShapeDtypeStruct((3,), jnp.int32), 40).as_text()
    assert ("twinmesh.prefill" in text) == takes
