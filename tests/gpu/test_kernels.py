"""The attentions as a user calls them, on a GPU: against plain XLA in float32. `gpu_suite.py` runs these, and more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracle import spelled_out
from twinmesh.kernels_pallas import xla
from twinmesh.kernels_pallas.arguments import NewTokens, Pools
from twinmesh.kernels_pallas.attention import Rotation, paged_decode_attention, paged_prefill_attention, prepare_heads
from twinmesh.scripts.gpu.checks import LIMITS, distance
from twinmesh.scripts.gpu.timing import Heads, cached, queries

LENGTHS, CHUNKS = [1, 63, 64, 65, 700], [1, 63, 5, 1, 300]


@pytest.fixture(autouse=True)
def on_a_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX's first device is {jax.devices()[0].device_kind!r}, not an NVIDIA GPU")


def error(kernel, plain, *arrays, **options):
    wide = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]
    with jax.default_matmul_precision("highest"):
        want = spelled_out(plain)(*wide, **options)
    return distance(np.asarray(kernel(*arrays, **options), np.float64), np.asarray(want, np.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(64, 8, 64), Heads(8, 4, 256, 32)], ids=str)
@pytest.mark.parametrize("window", [None, 50])
def test_attention_on_the_gpu_is_that_of_plain_xla(heads, window):
    cache = cached(heads, LENGTHS, most_bytes=1)
    options = {"scale": heads.dim**-0.5, "window": window, "softcap": None, "sink": None}
    q = queries(heads, len(LENGTHS))
    assert error(paged_decode_attention, xla.paged_decode_attention, q, *cache.layer(0), **options) < LIMITS["bfloat16"]
    arrays = queries(heads, sum(CHUNKS)), *cache.layer(0), jnp.asarray(np.cumsum([0, *CHUNKS]), jnp.int32)
    assert error(paged_prefill_attention, xla.paged_prefill_attention, *arrays, **options) < LIMITS["bfloat16"]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(64, 8, 64), Heads(8, 4, 256, 32)], ids=str)
@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_on_the_gpu_are_prepared_as_by_plain_xla(heads, has_norms):
    """Two calls, so that memory that the second does not write shows; padding and another layer's pages stay."""
    rng = np.random.default_rng(0)
    count, slots = 77, 4 * heads.page_size
    q, k, v = (
        jnp.asarray(rng.standard_normal((count, h, heads.dim)), jnp.bfloat16) for h in (heads.query, heads.kv, heads.kv)
    )
    angle = rng.standard_normal((count, heads.dim // 2)).astype(np.float32)
    norms = jnp.asarray(rng.standard_normal((2, heads.dim)), jnp.float32) if has_norms else (None, None)
    rotation = Rotation(jnp.cos(angle), jnp.sin(angle), *norms, eps=1e-6)
    slot = rng.permutation(2 * slots)[:count].astype(np.int32)
    pool = jnp.full((6, heads.page_size, heads.kv, heads.dim), jnp.nan, jnp.bfloat16)
    arrays, first = (q, k, v, rotation, pool, pool, jnp.asarray(slot)), 2
    run = jax.jit(lambda *arrays: prepare_heads(*arrays, first_page=first))
    run(*arrays)
    new, pools = NewTokens(q, k, v, rotation, arrays[-1]), Pools(pool, pool, jnp.full(1, first, jnp.int32))
    got, want = run(*arrays), jax.jit(xla.prepare_heads)(new, pools)
    for mine, plain in zip(got, want, strict=True):
        mine, plain = (np.asarray(x, np.float32) for x in (mine, plain))
        np.testing.assert_array_equal(np.isnan(mine), np.isnan(plain))
        np.testing.assert_allclose(mine, plain, rtol=2**-6, atol=2**-6)
