"""Which implementation a trace gets, by the GPU it is for; and what the Hopper kernels refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from twinmesh.kernels_pallas import decode, dispatch, prefill, xla
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.attention import paged_decode_attention, paged_prefill_attention
from twinmesh.kernels_pallas.grouped import grouped_matmul
from twinmesh.kernels_pallas.pages import QuantizedPages
from twinmesh.kernels_pallas.quantized import abstract
from twinmesh.kernels_pallas.tiles import DecodeTiles, PrefillTiles, decode_tiles, length_class, prefill_tiles

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def arrays(dtype=jnp.bfloat16, head_dim=128, page_size=64, heads=(8, 2), chunks=False):
    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    pages = array(10, page_size, heads[1], head_dim, dtype=dtype)
    own = [array(4, heads[0], head_dim, dtype=dtype), pages, pages, array(4, 3), array(4)]
    return [*own, array(5)] if chunks else own


def traced(attention, kind, platform="gpu", **options):
    """What is traced for a device of this kind."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    chunks = attention is paged_prefill_attention
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(lambda *x: attention(*x, scale=0.1))(*arrays(chunks=chunks, **options)))


def uses_kernel(text):
    return "mpmd_map" in text or "core_map" in text


@pytest.mark.parametrize("attention", [paged_decode_attention, paged_prefill_attention])
def test_hopper_gets_the_kernels_and_nothing_else_does(attention):
    for kind in (H100, "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"):
        assert uses_kernel(traced(attention, kind))
    for kind in (A100, "NVIDIA L40S", "NVIDIA GeForce RTX 4090", "NVIDIA B200"):
        assert not uses_kernel(traced(attention, kind))
    assert not uses_kernel(traced(attention, "cpu", platform="cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "q has dtype float32.*bfloat16 and float16"),
        ({"head_dim": 96}, "k_pages has head_dim 96.*64, 128 and 256"),
        ({"page_size": 8}, "k_pages has page_size 8.*16, 32, 64 and 128"),
        ({"heads": (130, 2)}, "q has 65 heads for each of k_pages' 2.*64"),
    ],
)
def test_what_the_kernels_do_not_take_is_named_and_runs_elsewhere(change, message, caplog):
    q, *cache, q_start = arrays(chunks=True, **change)
    kv, options = PagedKV(*cache), AttentionOptions(0.1)
    with pytest.raises(ValueError, match=message):
        decode.paged_decode_attention.eval_shape(q, kv, options, tiles=DecodeTiles(512, 2), cores=132)
    with pytest.raises(ValueError, match=message):
        prefill.paged_prefill_attention.eval_shape(q, kv, q_start, options, tiles=PrefillTiles(128, 2), cores=132)
    dispatch.warn_once.cache_clear()
    for _ in range(2):
        assert not uses_kernel(traced(paged_decode_attention, H100, **change))
    assert len(caplog.records) == 1
    assert caplog.records[0].message.endswith("Paged attention runs in plain XLA.")


def test_prompts_over_8_bit_pages_of_wide_heads_run_in_xla_because_the_kernel_would_spill(caplog):
    q, k_pages, *cache, q_start = arrays(head_dim=256, chunks=True)
    values = jax.ShapeDtypeStruct(k_pages.shape, jnp.int8)
    tokens, channels = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((10, 2, 64), (2, 256)))
    pages = QuantizedPages(values, tokens, channels)
    device = AbstractDevice(device_kind=H100, num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    attend = functools.partial(paged_prefill_attention, scale=0.1)
    dispatch.warn_once.cache_clear()
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(attend)(q, pages, pages, *cache[1:], q_start))
    assert not uses_kernel(text)
    (record,) = caplog.records
    assert "k_pages of 8 bits have head_dim 256: the Hopper prefill kernel takes up to 128." in record.message


def test_a_program_for_the_cpu_of_a_machine_with_a_gpu_runs_in_xla(monkeypatch, make_case):
    monkeypatch.setattr(dispatch, "gpu_to_trace_for", lambda: (H100, 132, False))
    case = make_case([70, 5], page_size=64, max_pages=2, heads=(4, 2), head_dim=64, dtype=jnp.dtype("bfloat16"))
    got = jax.jit(lambda q, cache: paged_decode_attention(q, **cache, scale=0.1))(case.q, case.cache)
    want = xla.paged_decode_attention(
        jnp.asarray(case.q), PagedKV(*map(jnp.asarray, case.cache.values())), AttentionOptions(0.1)
    )
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_tiles_depend_on_how_long_requests_can_get_and_not_on_how_many_there_are():
    assert [length_class(n) for n in (1, 2048, 2049, 131072, 10**6)] == [2048, 2048, 8192, 131072, 131072]
    for head_dim in (64, 128, 256):
        splits = [decode_tiles(head_dim, 4, 64, n).split for n in (1000, 8192, 32768, 131072)]
        assert splits == sorted(splits)
        assert all(split % 64 == 0 for split in splits)
        assert prefill_tiles(head_dim, 4, 64, 8192).tile % 64 == 0


@pytest.mark.parametrize(("kind", "is_kernel"), [(H100, True), (A100, False)])
def test_experts_get_the_kernel_on_hopper_and_the_loop_elsewhere(kind, is_kernel):
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    x, sizes = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(grouped_matmul)(x, abstract("MXFP4", (4, 64, 64), 1, 1), sizes))
    assert uses_kernel(text) == is_kernel
    assert is_kernel or "while" in text
