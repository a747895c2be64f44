"""What a published model needs of a card, in bytes, and the nearest remedy where it does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.simulation.capacity import DeviceMemory, plan_memory
from twinmesh.engine.sizing.fitting import Fit, Memory, check_fits
from twinmesh.engine.sizing.pools import least_budget, pool_that_fits
from twinmesh.engine.sizing.weight_sizes import kept_on, weight_bytes, weight_parts
from twinmesh.engine.startup.quantization import choose
from twinmesh.engine.topology import MeshSpec, Role, Topology
from twinmesh.models.families.described import described
from twinmesh.models.families.known import known_model
from twinmesh.models.families.raw_config import Settings

CONFIG = json.loads((Path(__file__).parents[2] / "fixtures" / "gpt-oss-120b.json").read_text())
H100 = DeviceMemory("h100", 84_942_979_072)
# `metadata.total_size` of each model's published model.safetensors.index.json.
PUBLISHED = {"gpt-oss-20b": 13_761_264_768, "gpt-oss-120b": 65_248_815_744}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_of_gpt_oss_are_those_of_its_files_but_for_norms_and_sinks_in_float32(name):
    model, formats = known_model(name)
    parts = weight_parts(model, "bfloat16", 1, formats)
    floats = sum(part.bytes for part in parts if part.format == "float32")
    assert sum(part.bytes for part in parts) - floats // 2 == PUBLISHED[name]


def test_the_published_config_is_the_model_that_is_known_by_name():
    assert described(Settings(CONFIG)) == known_model("gpt-oss-120b")


def test_gpt_oss_120b_on_one_80_gb_card_leaves_ten_gigabytes_of_kv():
    model, formats = described(Settings(CONFIG))
    options = EngineOptions("", memory_fraction=0.95, max_num_seqs=128, prefill_buckets=(256, 2048))
    planned = plan_memory(model, options, H100, kept=formats)
    (pool,), (need,) = planned.pools, planned.needs
    by_format = {part.format: 0 for part in need.weights}
    for part in need.weights:
        by_format[part.format] += part.bytes
    assert by_format == {"MXFP4": 60_914_073_600, "bfloat16": 4_334_317_056, "float32": 850_176}
    kv = sum(count * size for count, size in zip(pool.pages, pool.page_bytes, strict=True))
    assert kv == pytest.approx(11.73e9, rel=0.001)  # 10e9 is the least that is asked for
    assert planned.config.max_model_len == 131072


@pytest.mark.parametrize(("name", "half", "whole"), [("gpt-oss-20b", 204e6, 403e6), ("gpt-oss-120b", 307e6, 604e6)])
def test_a_hand_off_of_8k_tokens_moves_the_bytes_that_were_published(name, half, whole):
    model, formats = known_model(name)
    options = EngineOptions("", topology="prefill=1,decode=1", max_model_len=16384, memory_fraction=0.95)
    planned = plan_memory(model, options, replace(H100, bytes=140 << 30), kept=formats)
    config, pool = planned.config, planned.pools[0]
    caps = [config.pages_to_send(window) for window in config.windows]
    assert pool.transfer_bytes(8192 // 64, caps) == pytest.approx(half, rel=0.015)
    assert pool.transfer_bytes(8192 // 64, [8192 // 64] * 2) == pytest.approx(whole, rel=0.001)


@pytest.mark.parametrize("topology", ["both=1", "prefill=1,decode=1"])
@pytest.mark.parametrize("windows", [(None,), (None, 128)])
@pytest.mark.parametrize("part", [2, 16])
def test_the_least_budget_is_just_enough_for_one_request(topology, windows, part):
    config = EngineConfig(Topology.parse(topology), 4096, windows=windows)
    per_page, spec = (1000, 300)[: len(windows)], config.topology.meshes[0]
    least = least_budget(per_page, config, part)
    assert pool_that_fits(least, per_page, config, spec, part).pages[0] >= config.max_pages
    with pytest.raises(ValueError, match="does not fit"):
        pool_that_fits(least - 1, per_page, config, spec, part)


def fit(name="llama-3.1-8b", usable=16e9, topology="both=1", asked_len=8192, **changes):
    model, formats = known_model(name)
    settings = dict(dtype="bfloat16", max_num_seqs=32, decode_buckets=(32,), prefill_buckets=(512,), max_model_len=8192)
    config = EngineConfig(Topology.parse(topology), **settings | changes.pop("config", {}))
    config = replace(config, windows=tuple(dict.fromkeys(spec.window for spec in model.layers)))
    memory = Memory(int(usable), "a card", changes.pop("is_host", False))
    return Fit(name, model, config, config.topology.meshes, memory, 16, asked_len, **{"stored": formats} | changes)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"usable": 20e9, "asked_len": 32768, "config": {"max_model_len": 32768}}, "max_model_len=[0-9]+ fits"),
        (
            {
                "usable": 17.8e9,
                "asked_len": 2048,
                "config": {"max_num_seqs": 256, "decode_buckets": (256,), "max_model_len": 2048},
            },
            "max_num_seqs=32 and",
        ),
        ({"name": "gpt-oss-20b", "usable": 20e9}, "with quantization='keep' its weights stay MXFP4 and it fits"),
        ({"name": "llama-3.1-70b", "usable": 70e9}, "tp 4 fits, as in both=1xtp4"),
        ({"name": "gpt-oss-120b", "usable": 36e9}, "tp 8 fits|tp 2 with quantization='keep' fits"),
        (
            {"name": "gpt-oss-120b", "usable": 12e9, "kept": known_model("gpt-oss-120b").formats},
            "tp 8 fits, as in both=1xtp8ep8",
        ),
        ({"usable": 20e9, "is_host": True, "config": {"dtype": "float32"}}, "dtype='bfloat16' halves"),
        ({"usable": 30e9, "is_host": True, "topology": "prefill=1xtp2,decode=1"}, ".*topology='both=1' has one"),
        ({"usable": 5e9, "is_host": True}, "take a smaller or a quantised model, or free memory"),
        ({"name": "llama-3.1-405b", "usable": 5e9}, "no tp up to 64 leaves each device little enough"),
    ],
)
def test_the_nearest_remedy_is_named_and_true(changes, remedy):
    refused = fit(**changes)
    with pytest.raises(ValueError, match=rf"^{refused.name} does not fit.* need.* = .*there are .*: ({remedy})"):
        check_fits(refused)


def test_what_a_remedy_says_fits():
    small = fit(usable=20e9, asked_len=32768, config={"max_model_len": 32768})
    with pytest.raises(ValueError, match="max_model_len=") as refusal:
        check_fits(small)
    length = int(str(refusal.value).split("max_model_len=")[1].split()[0])
    check_fits(replace(small, config=replace(small.config, max_model_len=length), asked_len=length))
    assert length > 16384


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (4, 1), (8, 1), (16, 1), (4, 4), (8, 4), (16, 4)])
@pytest.mark.parametrize("form", ["MXFP4", "INT4-128-float16"])
def test_weights_that_a_mesh_would_cut_are_those_that_start_up_finds(tp, ep, form):
    model, formats = known_model("gpt-oss-20b")
    formats, spec = dict.fromkeys(formats, form), MeshSpec(Role.BOTH, tp, ep=ep)
    kept = choose("keep", formats, model, "cpu", [spec], "int8").kept
    assert kept_on(model, spec, formats) == kept
    assert weight_bytes(model, "bfloat16", 1, kept) > 0
