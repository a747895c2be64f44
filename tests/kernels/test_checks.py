"""What does not fit is refused when traced, by a message that names the argument."""

import jax
import jax.numpy as jnp
import pytest
from twinmesh.kernels_pallas.attention import append_kv, paged_decode_attention, paged_prefill_attention


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return array(*shape, dtype=jnp.int32)


FITTING = {
    "q": array(4, 6, 8),
    "k_pages": array(5, 16, 2, 8),
    "v_pages": array(5, 16, 2, 8),
    "page_table": ints(4, 3),
    "kv_len": ints(4),
}


def trace(function, arrays, **options):
    return jax.eval_shape(lambda arrays: function(**arrays, **options), arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": array(4, 5, 8)}, r"q has shape \(4, 5, 8\).*multiple of k_pages' 2 heads"),
        ({"q": array(4, 6, 16)}, r"q has shape .*D = 8"),
        ({"q": array(0, 6, 8)}, "q has shape .*1 or more rows"),
        ({"q": ints(4, 6, 8)}, "q has dtype int32.*floating point"),
        ({"k_pages": array(5, 16, 16)}, r"k_pages has shape \(5, 16, 16\)"),
        ({"k_pages": ints(5, 16, 2, 8)}, "k_pages has dtype int32"),
        ({"v_pages": array(5, 16, 2, 4)}, "v_pages has shape .*as k_pages"),
        ({"page_table": ints(4)}, r"page_table has shape \(4,\)"),
        ({"page_table": array(4, 3)}, r"page_table is float32\[4, 3\].*int32"),
        ({"kv_len": ints(5)}, r"kv_len is int32\[5\].*int32\[4\]"),
        ({"first_page": ints(2)}, r"first_page is int32\[2\].*scalar"),
    ],
)
def test_attention_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        trace(paged_decode_attention, {**FITTING, **change}, scale=1.0)
    with pytest.raises(ValueError, match=message):
        trace(paged_prefill_attention, {**FITTING, "q_start": ints(5), **change}, scale=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "scale=nan"),
        ({"window": 0}, "window=0"),
        ({"window": 2.0}, "window=2.0"),
        ({"window": True}, "window=True"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"first_page": -1}, "first_page=-1"),
        ({"first_page": True}, "first_page=True"),
        ({"first_page": 1.0}, r"first_page=1\.0"),
        ({"sink": jnp.zeros(5)}, r"sink is float32\[5\].*Hq = 6"),
        ({"sink": jnp.zeros(6, jnp.int32)}, "sink is int32"),
    ],
)
def test_attention_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        trace(paged_decode_attention, FITTING, **{"scale": 1.0, **options})


def test_decode_wants_a_row_per_request():
    with pytest.raises(ValueError, match=r"q has shape .*R = 4"):
        trace(paged_decode_attention, {**FITTING, "q": array(3, 6, 8)}, scale=1.0)


def test_prefill_wants_one_start_more_than_requests():
    with pytest.raises(ValueError, match=r"q_start is int32\[4\].*int32\[5\]"):
        trace(paged_prefill_attention, {**FITTING, "q_start": ints(4)}, scale=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": array(7, 3, 8)}, r"k has shape \(7, 3, 8\)"),
        ({"v": array(6, 2, 8)}, r"v has shape \(6, 2, 8\).*slot \(shape \(7,\)\)"),
        ({"v": ints(7, 2, 8)}, "v has dtype int32"),
        ({"slot": array(7)}, "slot is float32"),
        ({"slot": ints(7, 1)}, "slot is "),
        ({"k_pages": array(2**27, 16, 2, 8), "v_pages": array(2**27, 16, 2, 8)}, "k_pages has 2147483648 slots"),
        ({"first_page": ints(1)}, r"first_page is int32\[1\].*scalar"),
        ({"first_page": array()}, r"first_page is float32\[\].*int32\[\]"),
    ],
)
def test_append_refuses(change, message):
    pools = {"k_pages": array(5, 16, 2, 8), "v_pages": array(5, 16, 2, 8)}
    new = {"k": array(7, 2, 8), "v": array(7, 2, 8), "slot": ints(7)}
    with pytest.raises(ValueError, match=message):
        trace(append_kv, {**pools, **new, **change})
