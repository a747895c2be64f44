"""The memory plan of devices that are not there is that of start-up, and what does not fit is refused with numbers."""

from dataclasses import replace

import jax
import pytest
from helpers.core_engine import OPTIONS, model_with_windows
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.sampling.logits_processors import empty_dense
from twinmesh.engine.sharding.mesh import build_meshes, param_on
from twinmesh.engine.simulation.capacity import DeviceMemory, capacity
from twinmesh.engine.sizing.heads import model_on
from twinmesh.engine.sizing.memory_needs import request_bytes, state_bytes
from twinmesh.engine.sizing.weight_sizes import weight_bytes
from twinmesh.engine.startup import build
from twinmesh.engine.startup.quantization import choose
from twinmesh.engine.topology import MeshSpec, Role
from twinmesh.engine.worker.kv_cache import abstract_scalars, groups
from twinmesh.kernels_pallas.block_tiles import LAYOUTS
from twinmesh.models.config import Experts
from twinmesh.models.decoder import abstract_params
from twinmesh.models.quantized import nbytes
from twinmesh.scripts.gpu.steps import LLAMA_3_1_8B

H100 = DeviceMemory("h100", 80 * 10**9)
CPU = DeviceMemory("cpu", None, "cpu")


class Stop(Exception):
    """What start-up is stopped with once it has sized its pools."""


@pytest.mark.parametrize("topology", ["both=1", "prefill=1,decode=1xtp2", "pool=3", "both(mode=fused)=2xtp4"])
@pytest.mark.parametrize("windows", [(None, None), (None, 6)])
@pytest.mark.parametrize("length", [None, 64])
def test_pages_are_those_of_a_real_start(monkeypatch, topology, windows, length):
    def stop(*parts):
        raise Stop(parts[1], parts[4])

    model = model_with_windows(*windows)
    options = EngineOptions(
        "", topology=topology, kv_cache_bytes=90_000, **(OPTIONS | {"max_model_len": length, "dtype": "float32"})
    )
    monkeypatch.setattr(build, "mesh_plans", stop)
    with pytest.raises(Stop) as real:
        build.start_core(model, "float32", lambda *_: [], options)
    config, pools = capacity(model, options, CPU, "float32")
    assert (config, list(pools)) == real.value.args


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "qk_norm": True},
        {"sandwich_norms": True},
        {"output_bias": True, "has_sinks": True, "experts": Experts(5, 2, has_bias=True)},
    ],
)
def test_bytes_counted_without_arrays_are_those_of_the_arrays(tp, changes):
    model = model_on(replace(model_with_windows(None, 6), tie_embeddings=tp == 2, **changes), tp)
    assert weight_bytes(model, "bfloat16", tp) == bytes_of_arrays(model, tp, {})


@pytest.mark.parametrize("ep", [2, 4])
def test_so_are_those_of_experts_divided_over_groups_of_devices(ep):
    experts = Experts(4, 2, has_bias=True)
    model = model_on(replace(model_with_windows(None, 6), hidden_size=128, intermediate_size=256, experts=experts), 4)
    kept = dict.fromkeys((f"layers.{layer}.mlp.down_proj" for layer in range(model.num_layers)), "MXFP4")
    assert weight_bytes(model, "bfloat16", 4, kept) == bytes_of_arrays(model, f"4ep{ep}", kept)


def bytes_of_arrays(model, tp, formats):
    """Bytes of the arrays that a device of a mesh has."""
    (mesh,) = build_meshes(EngineOptions("", topology=f"both=1xtp{tp}").parsed_topology)
    specs = abstract_params(model, "bfloat16", formats).specs.values()

    def on_device(array):
        return jax.ShapeDtypeStruct(array.sharding.shard_shape(array.shape), array.dtype)

    return sum(nbytes(jax.tree.map(on_device, param_on(mesh, spec))) for spec in specs)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab", [512, 500, 507])
@pytest.mark.parametrize(
    "kind", [*(name for name in LAYOUTS if "-" not in name), "FP8-32-float32", "INT4-64-float16", "UINT8-64-bfloat16"]
)
def test_so_are_those_of_quantised_weights(kind, vocab, tp):
    model = replace(
        model_with_windows(None), hidden_size=256, intermediate_size=512, num_heads=8, num_kv_heads=2, head_dim=32,
        vocab_size=vocab, tie_embeddings=False,
    )  # fmt: skip
    paths = [path for path, spec in abstract_params(model, "bfloat16").specs.items() if len(spec.axes) > 1]
    kept = choose("keep", dict.fromkeys(paths, kind), model, "cpu", [MeshSpec(Role.BOTH, tp)], "int8").kept
    assert len(kept) == len(paths)
    on_mesh = model_on(model, tp)
    assert weight_bytes(on_mesh, "bfloat16", tp, kept) == bytes_of_arrays(on_mesh, tp, kept)


def test_the_state_of_requests_is_that_of_their_arrays():
    config, _ = capacity(LLAMA_3_1_8B, EngineOptions(""), H100)
    arrays = (abstract_scalars(config.max_num_seqs), empty_dense(config.max_num_seqs, LLAMA_3_1_8B.vocab_size))
    tables = len(groups(LLAMA_3_1_8B)) * config.max_num_seqs * config.max_pages * 4
    assert request_bytes(LLAMA_3_1_8B, config) == nbytes(arrays) + tables
    assert state_bytes() == nbytes(abstract_scalars(1))


def test_an_8b_model_has_fifty_gigabytes_of_kv_on_an_80_gb_card():
    config, (pool,) = capacity(LLAMA_3_1_8B, EngineOptions(""), H100)
    assert config.decode_buckets == (8, 32, 64, 128, 256)
    assert 45e9 < pool.pages[0] * pool.page_bytes[0] < 55e9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"memory_fraction": 0.2},
            r"^llama-3.1-8b does not fit at tp 1: .*GiB of weights .* there are 14.60 GiB \(0.2 of h100.*: tp 2 fits",
        ),
        ({"kv_cache_bytes": 10**6}, r"KV cache of the both mesh does not fit: .* needs .* pages of"),
        ({"topology": "both=1xtp3"}, r"32 query heads do not divide by 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_arithmetic(options, words):
    with pytest.raises(ValueError, match=words):
        capacity(LLAMA_3_1_8B, EngineOptions("", max_model_len=8192, **options), H100, name="llama-3.1-8b")


def test_a_device_of_unknown_memory_needs_to_be_told():
    with pytest.raises(ValueError, match=r"^nobody says how much memory cpu has: give kv_cache_bytes\.$"):
        capacity(LLAMA_3_1_8B, EngineOptions(""), CPU)
