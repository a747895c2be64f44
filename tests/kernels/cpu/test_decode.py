"""Decode attention by the kernel of this CPU: that it is what runs, and what the dispatched tests leave out."""

import jax
import numpy as np
import pytest
from helpers import oracle
from twinmesh.kernels_pallas.attention import paged_decode_attention
from twinmesh.kernels_pallas.cpu import loader

pytestmark = pytest.mark.skipif(loader.toolchain() is None, reason="no CPU kernels here")


def decode(case, attention=paged_decode_attention, **options):
    arrays = {"q": case.q[: len(case.kv_len)], **case.cache}
    return jax.jit(lambda arrays: attention(**arrays, scale=0.3, **options)), arrays


def is_by_kernel(case, **options):
    program, arrays = decode(case, **options)
    return "twinmesh.decode_" in program.lower(arrays).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_runs_and_leaves_to_xla_what_it_does_not_take(make_case, dtype):
    case = make_case([9, 3], dtype=dtype)
    assert is_by_kernel(case)
    assert is_by_kernel(case, window=5)
    assert not is_by_kernel(case, softcap=2.0)
    assert not is_by_kernel(make_case([9, 3], dtype="float16"))
    assert not is_by_kernel(make_case([9, 3], head_dim=10, dtype=dtype))


@pytest.mark.parametrize("options", [{}, {"window": 700, "sink": np.linspace(-1, 3, 10, dtype=np.float32)}])
def test_splits_of_several_blocks_are_put_together(make_case, options):
    """Of 5,120 tokens that a request may hold, a split has 256: two blocks, which are folded."""
    case = make_case([4500, 300, 0, 129, 256, 5120], page_size=64, max_pages=80, heads=(10, 2))
    assert is_by_kernel(case, **options)
    (found, arrays), (want, _) = decode(case, **options), decode(case, oracle.paged_decode_attention, **options)
    np.testing.assert_allclose(found(arrays), want(arrays), atol=1e-5)


def test_numbers_of_64_bits_change_nothing(make_case):
    case = make_case([9, 3])
    program, arrays = decode(case)
    want = np.asarray(program(arrays))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(decode(case)[0](arrays), want)
