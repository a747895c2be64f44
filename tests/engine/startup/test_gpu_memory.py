"""How much of a GPU an engine takes: the variables of JAX's allocator, and KV on cards that are not there."""

import subprocess
import sys

import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.kv_dtypes import KVDtype
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.sizing.defaults import defaults_for, engine_config
from twinmesh.engine.sizing.device_memory import FRACTION, Reported, Share, free_bytes
from twinmesh.engine.sizing.memory_needs import page_bytes, request_bytes
from twinmesh.engine.sizing.pools import pool_that_fits
from twinmesh.engine.sizing.temporaries import temporary_bytes
from twinmesh.engine.startup.gpu_memory import check_share, request_share
from twinmesh.engine.topology import Topology
from twinmesh.models.decoder import abstract_params
from twinmesh.models.families.known import known_model
from twinmesh.models.quantized import nbytes
from twinmesh.scripts.gpu.steps import LLAMA_3_1_8B, QWEN3_8B

CARDS = {"NVIDIA H100 80GB HBM3": 84_942_979_072, "NVIDIA H200": 150_121_545_728}
BF16 = "bfloat16"


def weights(model):
    return sum(nbytes(spec.value) for spec in abstract_params(model, BF16).specs.values())


def kv_bytes(model, kind, environment, *, has_started=False, in_use=0, pool=1.0, **options):
    """KV bytes at tp 1 on a card, as start-up computes them, once the weights are loaded."""
    share = request_share(options.get("memory_fraction"), environment, has_started=has_started)
    check_share(share, "gpu")
    settings = EngineOptions("", **options)
    config = engine_config(settings, model, defaults_for("gpu", kind), BF16)
    limit = int(share.held * CARDS[kind])
    free = free_bytes(Reported(limit, weights(model) + in_use, int(pool * limit)), share)
    return max(0, free - request_bytes(model, config) - temporary_bytes(model, config, 1)), config


def test_qwen3_8b_on_an_80_gb_card_gets_fifty_gigabytes_of_kv():
    budget, config = kv_bytes(QWEN3_8B, "NVIDIA H100 80GB HBM3", {})
    assert 50e9 <= budget <= 58e9
    size = pool_that_fits(
        budget, page_bytes(QWEN3_8B, config.page_size, KVDtype(BF16, BF16)), config, config.topology.meshes[0], 16
    )
    assert size.pages[0] * size.page_bytes[0] > 0.99 * budget


@pytest.mark.parametrize(
    ("model", "kind", "case", "least", "most"),
    [
        (LLAMA_3_1_8B, "NVIDIA H100 80GB HBM3", {}, 50e9, 58e9),
        (QWEN3_8B, "NVIDIA H200", {}, 105e9, 114e9),
        (QWEN3_8B, "NVIDIA H100 80GB HBM3", {"in_use": 40 << 30}, 8e9, 14e9),  # of this process
        (QWEN3_8B, "NVIDIA H100 80GB HBM3", {"pool": 0.5}, 13e9, 19e9),  # of another process
        (QWEN3_8B, "NVIDIA H100 80GB HBM3", {"memory_fraction": 0.5}, 17e9, 23e9),
        (QWEN3_8B, "NVIDIA H100 80GB HBM3", {"memory_fraction": 0.95}, 54e9, 62e9),
        (QWEN3_8B, "NVIDIA H100 80GB HBM3", {"memory_fraction": 0.2}, 0, 0),
        (QWEN3_8B, "NVIDIA H100 80GB HBM3", {"max_num_seqs": 8, "prefill_buckets": (512,)}, 54e9, 60e9),
    ],
)
def test_kv_on_other_cards_and_with_other_options(model, kind, case, least, most):
    assert least <= kv_bytes(model, kind, {}, **case)[0] <= most


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_variable_that_the_user_has_set_decides(name):
    environment = {name: "0.75"}
    lowered, _ = kv_bytes(QWEN3_8B, "NVIDIA H100 80GB HBM3", environment)
    assert environment == {name: "0.75"}
    assert 37e9 <= lowered <= 44e9
    with pytest.raises(
        ValueError, match=r"^memory_fraction=0.9 cannot be had, .* holds 0.75 of each GPU: lower it, or"
    ):
        kv_bytes(QWEN3_8B, "NVIDIA H100 80GB HBM3", environment, memory_fraction=0.9)
    # A part of the card, not of what the allocator holds.
    part, _ = kv_bytes(QWEN3_8B, "NVIDIA H100 80GB HBM3", environment, memory_fraction=0.5)
    whole, _ = kv_bytes(QWEN3_8B, "NVIDIA H100 80GB HBM3", {}, memory_fraction=0.5)
    assert abs(part - whole) < 1e9


@pytest.mark.parametrize("text", ["a half", "0", "-1", "nan"])
def test_a_variable_that_is_no_number_is_refused_by_name(text):
    with pytest.raises(
        ValueError, match=rf"^XLA_CLIENT_MEM_FRACTION={text} in the environment is not a number above 0"
    ):
        request_share(None, {"XLA_CLIENT_MEM_FRACTION": text}, has_started=False)


def test_jax_is_asked_for_nine_tenths_before_it_starts_and_keeps_what_it_has_after():
    environment = {}
    assert request_share(None, environment, has_started=False).held == FRACTION
    assert environment == {"XLA_CLIENT_MEM_FRACTION": "0.9"}
    assert request_share(None, environment, has_started=True) == Share(0.9)  # a second engine
    assert request_share(0.4, other := {}, has_started=False) == Share(0.4, 0.4)
    assert other == {"XLA_CLIENT_MEM_FRACTION": "0.4"}
    assert request_share(None, late := {}, has_started=True) == Share(0.75, came_late=True)
    assert late == {}


def test_an_engine_that_comes_late_warns_or_refuses():
    with pytest.warns(
        UserWarning, match=r"^JAX was in use before the engine started, .* holds 0.75 of each GPU: .*=0.9 "
    ):
        check_share(request_share(None, {}, has_started=True), "gpu")
    with pytest.raises(ValueError, match=r"holds 0.75 of each GPU: lower it, or set XLA_CLIENT_MEM_FRACTION=0.8 "):
        check_share(request_share(0.8, {}, has_started=True), "gpu")
    check_share(request_share(0.7, {}, has_started=True), "gpu")
    check_share(request_share(None, {}, has_started=True), "cpu")


@pytest.mark.parametrize("asked", [0.1, 0.9, 1.0])
def test_a_cpu_refuses_memory_fraction_by_name(asked):
    with pytest.raises(ValueError, match=rf"^memory_fraction={asked} .* runs on a CPU: use kv_cache_bytes\.$"):
        check_share(request_share(asked, {}, has_started=True), "cpu")


@pytest.mark.parametrize("value", [0, -0.5, 1.1, True, "0.9", float("nan"), float("inf")])
def test_memory_fraction_is_a_part_of_a_whole(value):
    with pytest.raises(ValueError, match=r"^memory_fraction=.* is not usable: it must be a number above 0"):
        EngineOptions("", memory_fraction=value)


@pytest.mark.parametrize("setting", ["false", "0", "False"])
def test_without_preallocation_the_pool_so_far_is_not_the_limit(setting):
    share = request_share(None, {"XLA_PYTHON_CLIENT_PREALLOCATE": setting}, has_started=False)
    assert free_bytes(Reported(1000, 100, 200), share) == 880
    taken = request_share(None, {"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, has_started=False)
    assert free_bytes(Reported(1000, 100, 200), taken) == 96
    assert free_bytes(Reported(1000, 1500, 0), taken) == 0


def test_whether_jax_has_started_is_told_without_starting_it(tmp_path):
    code = (
        "import jax, os; from twinmesh.engine.startup.gpu_memory import backend_has_started as began;"
        "before = began(); again = began(); jax.config.update('jax_num_cpu_devices', 3); count = len(jax.devices());"
        "print(before, again, count, began(), len(jax.devices()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False", "3", "True", "3"], done.stderr


def test_temporaries_grow_with_chunk_and_rows_and_shrink_with_the_mesh():
    def temporaries(model=QWEN3_8B, tp=1, **changes):
        settings = dict(max_num_seqs=32, decode_buckets=(32,), prefill_buckets=(2048,), dtype="bfloat16") | changes
        return temporary_bytes(model, EngineConfig(EngineOptions("").parsed_topology, 8192, **settings), tp)

    assert temporaries() < temporaries(prefill_buckets=(8192,)) < 2e9 + temporaries()
    assert temporaries() < temporaries(max_num_seqs=256, decode_buckets=(256,))
    assert temporaries(tp=4) < temporaries(tp=2) < temporaries()


def test_a_fused_step_has_the_rows_of_both_phases():
    def temporaries(topology, **changes):
        settings = dict(prefill_buckets=(2048,), dtype="bfloat16", max_num_seqs=32, decode_buckets=(32,)) | changes
        config = EngineConfig(Topology.parse(topology), 8192, prefill_rows=16, **settings)
        return temporary_bytes(QWEN3_8B, config, 1)

    logits = 3 * 4 * QWEN3_8B.vocab_size  # of a row, of three steps
    apart, fused = temporaries("both=1"), temporaries("both(mode=fused)=1")
    assert fused - apart > 16 * logits
    padded = temporaries("both=1", decode_buckets=(32, 64))
    assert padded - apart >= 32 * logits  # a step is as large as its bucket, whatever the requests


def test_the_largest_parameter_exists_twice_while_it_is_replaced():
    model, formats = known_model("gpt-oss-120b")
    config = EngineConfig(Topology.parse("both=1"), 8192, dtype="bfloat16")
    kept, floats = (temporary_bytes(model, config, 1, some) for some in (formats, {}))
    assert floats - kept == 128 * 2880**2 * 2 - 201088 * 2880 * 2  # a layer's experts, or the embedding
