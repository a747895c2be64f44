"""The attentions as a user calls them, on a GPU: against plain XLA in float32. `gpu_suite.py` runs these, and more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.oracle import spelled_out
from twinmesh.kernels_pallas import paged_decode_attention, paged_prefill_attention, xla
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
