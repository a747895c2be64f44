"""The plan of memory is what an engine then has: weights, pools; and what does not fit is refused before it is read."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.quantized import write_quantized
from helpers.tiny_files import write_packed_directory, write_tiny_directory
from twinmesh.engine.api.plan_memory import plan_memory
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.sharding.weights import load_weights
from twinmesh.engine.simulation.planning.memory_plan import as_text, meshes_of
from twinmesh.engine.sizing.defaults import defaults_for, engine_config
from twinmesh.engine.sizing.device_memory import Share
from twinmesh.engine.startup import build, step_temporaries
from twinmesh.engine.startup.memory import check_room
from twinmesh.engine.startup.quantization import Quantized
from twinmesh.engine.topology import Topology
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.families.known import known_config
from twinmesh.models.quantized import nbytes

OPTIONS = dict(
    max_model_len=64, page_size=16, max_num_seqs=2, prefill_buckets=(16,), decode_buckets=(2,), dtype="bfloat16",
    kv_cache_bytes=1 << 20, quantization="keep",
)  # fmt: skip
WRITTEN = {
    "dense": lambda path: write_tiny_directory(path, "llama3"),
    "experts": lambda path: write_tiny_directory(path, "mixtral"),
    "windows": lambda path: write_tiny_directory(path, "gemma3"),
    "Q4_1": lambda path: write_quantized(path.with_suffix(".gguf"), formats=dict.fromkeys(
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd", "output"), "Q4_1"
    )),
    "MXFP4": write_packed_directory,
}  # fmt: skip


@pytest.fixture(scope="module", params=WRITTEN)
def model(request, tmp_path_factory):
    return WRITTEN[request.param](tmp_path_factory.mktemp("models") / request.param)


class Stop(Exception):
    """What start-up is stopped with once it has planned its meshes, and before it compiles."""


def bytes_of_shards(arrays):
    return sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)


@pytest.mark.parametrize("topology", ["both=1", "prefill=1xtp2,decode=1"])
def test_planned_weights_and_pools_are_those_on_the_devices(model, topology, monkeypatch):
    options = EngineOptions(model, topology=topology, **OPTIONS)
    planned = meshes_of(plan_memory(options, device="cpu", compiles=False))
    made = build.mesh_plans

    def stop(*parts, **more):
        raise Stop(made(*parts, **more))

    monkeypatch.setattr(build, "mesh_plans", stop)
    with pytest.raises(Stop) as stopped:
        build.start_engine(options)
    (plans,) = stopped.value.args
    checkpoint = open_checkpoint(model)
    for plan, mesh in zip(plans, planned, strict=True):
        (params,) = load_weights(checkpoint, jnp.dtype("bfloat16"), [plan.mesh], plan.params.formats, progress=False)
        assert mesh.need.weight_bytes == bytes_of_shards(jax.tree.leaves(params))
        assert mesh.kv == sum(nbytes(pool) for pool in plan.state.kv)
        formats = {part.format for part in mesh.need.weights if part.kind in ("attention", "MLP", "experts")}
        assert set(plan.params.formats.values()) <= formats


def unreadable(*_):
    pytest.fail("a weight was read")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return WRITTEN["dense"](tmp_path_factory.mktemp("models") / "dense")


def test_a_host_without_room_refuses_before_a_weight_is_read(dense, monkeypatch):
    monkeypatch.setattr(build, "load_weights", unreadable)
    monkeypatch.setattr("twinmesh.engine.startup.memory.available_memory", lambda: 200_000)
    words = (
        r"^dense does not fit: the both mesh needs .* of weights \(.*float32\) \+ .* = .*what the host has available"
    )
    with pytest.raises(ValueError, match=words + r".*: dtype='bfloat16' halves them and fits\.$"):
        build.start_engine(EngineOptions(dense, **OPTIONS | {"dtype": "float32"}))


@dataclass(frozen=True)
class Device:
    """A GPU with so many bytes that its allocator may still hand out."""

    bytes: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"

    def memory_stats(self):
        return {"bytes_limit": self.bytes, "bytes_in_use": 0}


@pytest.mark.parametrize(("size", "fits"), [(80 * 10**9, True), (19 * 10**9, False)])
def test_a_gpu_without_room_refuses_too_and_counts_the_meshes_that_share_it(size, fits):
    options = EngineOptions("llama-3.1-8b", max_model_len=8192)
    model = known_config("llama-3.1-8b")
    config = engine_config(options, model, defaults_for("gpu", "H100"), "bfloat16")
    none = Quantized({}, {}, "gpu", "int16")

    def check(topology, device):
        meshes = [SimpleNamespace(devices=np.array([device]), local_devices=[device]) for _ in topology.meshes]
        check_room("llama", model, replace(config, topology=topology), meshes, Share(1.0), 16, 8192, none)

    with (
        nullcontext() if fits else pytest.raises(ValueError, match=r"^llama does not fit at tp 1: .*: max_num_seqs=32 ")
    ):
        check(Topology.parse("both=1"), Device(size))
    if fits:
        check(Topology.parse("prefill=1,decode=1"), Device(size))
        with pytest.raises(ValueError, match=r"prefill mesh and decode mesh need .*: give each mesh|one mesh alone"):
            check(Topology.parse("prefill=1,decode=1"), Device(34 * 10**9))


def test_what_steps_take_is_said_of_the_largest_of_each(dense, monkeypatch):
    compiled = []

    def compile_program(plan, kind, *size):
        compiled.append((kind, *size))
        memory = SimpleNamespace(temp_size_in_bytes=5 << 30, output_size_in_bytes=7, alias_size_in_bytes=4)
        return SimpleNamespace(memory_analysis=lambda: memory)

    monkeypatch.setattr(step_temporaries, "compile_program", compile_program)
    plan = plan_memory(EngineOptions(dense, topology="prefill=1,decode=1", **OPTIONS), device="cpu")
    assert [job for job in compiled if job[0] != "sample"] == [("prefill", 16), ("score", 16), ("decode", 2)]
    assert {step.bytes for steps in plan.analysed.steps.values() for step in steps} == {(5 << 30) + 3}
    assert "5.00 GiB of the temporaries at most, compiled for this cpu" in " ".join(as_text(plan).split())


def test_steps_are_compiled_with_two_layers_of_each_kind():
    assert [spec.window for spec in step_temporaries.cut(known_config("gpt-oss-120b")).layers] == [128, None] * 2


@pytest.mark.parametrize(("changes", "words"), [({"topology": "auto"}, "name the meshes"), ({}, "nearest is 'h100'")])
def test_what_cannot_be_planned_is_refused(dense, changes, words):
    with pytest.raises(ValueError, match=words):
        plan_memory(EngineOptions(dense, **changes), device="h10")
