"""How weights are packed, by config.json alone: formats by path, and what is refused in a sentence."""

from collections import Counter
from typing import get_args

import pytest
from twinmesh.engine.config import METHODS, ROUNDINGS
from twinmesh.kernels_pallas.formats.layouts import LAYOUTS
from twinmesh.models.checkpoints.rounded import Rounding
from twinmesh.models.errors import CheckpointError
from twinmesh.models.families.described import described
from twinmesh.models.families.packing import METHODS as read_methods
from twinmesh.models.families.raw_config import Settings

LLAMA = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
GPT_OSS = LLAMA | {"model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 64}


def group(**weights):
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def groups(**each):
    """A `quantization_config` of several groups: name -> targets and weights."""
    made = {name: {"targets": targets, "weights": weights} for name, (targets, weights) in each.items()}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": made}


def formats(packing, base=LLAMA, **settings):
    return described(Settings(base | settings | {"quantization_config": packing})).formats


@pytest.mark.parametrize(
    ("packing", "format_"),
    [
        ({"quant_method": "fp8"}, "FP8-128-float32"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8-128-float32"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "FP8-64-float32"),
        ({"quant_method": "fp8", "weight_block_size": [1, 256]}, "FP8-128-float32"),
        ({"quant_method": "fbgemm_fp8"}, "FP8-128-float32"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "UINT4-128-float16"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "UINT4-64-float16"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False}, "UINT8-128-float16"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 32}, "UINT4-32-float16"),
        (
            group(num_bits=4, type="float", strategy="group", group_size=32) | {"format": "mxfp4-pack-quantized"},
            "MXFP4",
        ),
        (group(num_bits=8, type="float", strategy="channel"), "FP8-128-bfloat16"),
        (group(num_bits=8, type="float", strategy="block", block_structure=[32, 32]), "FP8-32-bfloat16"),
        (group(num_bits=8, type="int", strategy="channel"), "INT8-128-bfloat16"),
        (group(num_bits=8, type="int", strategy="channel", symmetric=False), "UINT8-128-bfloat16"),
        (group(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True), "INT4-128-bfloat16"),
    ],
)
def test_every_projection_is_packed_in_the_format_that_the_method_has(packing, format_):
    heads = {} if packing["quant_method"] != "compressed-tensors" else {"ignore": ["lm_head"]}
    assert Counter(formats(packing | heads).values()) == {format_: 14}
    assert format_ in LAYOUTS


@pytest.mark.parametrize(
    ("key", "names", "packed"),
    [
        ("modules_to_not_convert", ["lm_head"], 14),
        ("modules_to_not_convert", ["model.layers.*.self_attn"], 6),
        ("ignored_layers", ["model.layers.0"], 7),
        ("ignore", ["re:.*down_proj", "model.layers.1.self_attn.q_proj"], 11),
    ],
)
def test_modules_that_stay_floats_are_named_by_name_part_or_pattern(key, names, packed):
    assert len(formats({"quant_method": "fp8", key: names})) == packed


def test_each_group_has_its_modules_and_names_come_before_classes():
    eights, fours = {"num_bits": 8, "type": "float", "strategy": "channel"}, {"num_bits": 4, "group_size": 64}
    found = formats(groups(a=(["Linear"], eights), b=(["re:.*mlp.*"], fours), c=(["lm_head"], eights)))
    assert Counter(found.values()) == {"FP8-128-bfloat16": 9, "INT4-64-bfloat16": 6}
    assert {form for path, form in found.items() if ".mlp." in path} == {"INT4-64-bfloat16"}
    assert len(formats(groups(b=(["re:.*mlp.*"], fours)))) == 6


def test_modules_of_gptq_may_have_settings_of_their_own():
    dynamic = {"+:.*down_proj": {"bits": 8, "group_size": 32}, "-:.*layers.0.self_attn": {}, ".*q_proj": {"bits": 8}}
    found = formats({"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": dynamic, "lm_head": True})
    assert found["layers.1.mlp.down_proj"] == "UINT8-32-float16"
    assert found["layers.1.attention.q_proj"] == "UINT8-64-float16"
    assert found["head.weight"] == "UINT4-64-float16"
    assert not any(path.startswith("layers.0.attention") for path in found)


def test_inputs_out_of_the_order_of_their_groups_do_not_stay_packed():
    assert formats({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}) == {}
    assert len(formats({"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": True})) == 14
    assert formats(group(num_bits=4, group_size=64, actorder="group")) == {}


def test_a_scale_of_a_whole_output_is_repeated_as_an_engine_does():
    """192 inputs are six blocks of 32, which two devices divide as no larger groups do."""
    fp8 = {"quant_method": "fp8"}
    found = formats(fp8, MIXTRAL, hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    assert found["layers.0.mlp.gate_proj"] == "FP8-32-float32"
    assert found["layers.0.mlp.down_proj"] == "FP8-128-float32"
    assert formats(fp8, hidden_size=200, num_attention_heads=5, num_key_value_heads=5).keys() == {
        "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"
    }  # fmt: skip


def test_mxfp4_is_of_gpt_oss_experts_alone_and_routers_stay_floats():
    assert {path.rpartition(".")[2] for path in formats({"quant_method": "mxfp4"}, GPT_OSS)} == {
        "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="quantization_config"):
        formats({"quant_method": "mxfp4"}, MIXTRAL)
    assert not any("router" in path for path in formats({"quant_method": "fp8"}, MIXTRAL))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quant_method = 'bitsandbytes'",
        ),
        ({"quantization_config": {}}, "quant_method = None is not implemented: awq, compressed-tensors"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 3, "group_size": 128}},
            "bits = 3 is not implemented: 4 is",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, "version = 'gemv'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 48}}, "group_size = 48"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [48, 64]}}, "two powers of two"),
        ({"quantization_config": {"quant_method": "fp8", "ignored_layers": "all"}}, "a list of names is expected"),
        (
            {"quantization_config": {"quant_method": "fp8", "ignored_layers": ["re:["]}},
            r"ignored_layers = \['re:\['\].*regular",
        ),
        ({"quantization_config": group(num_bits=4, type="float", strategy="group", group_size=16)}, "num_bits = 4"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "config_groups = None"),
        ({"quantization_config": group(num_bits=4, group_size=32, strategy="attn_head")}, "strategy = 'attn_head'"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {}}}},
            r"quantization_config.dynamic.\+:\( = \{\} is not implemented: its name",
        ),
        (
            {"vision_config": {"depth": 2}},
            "^vision_config says that the model has a vision tower and .* language model alone",
        ),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama"),
        ({"hidden_size": None}, "The settings have no 'hidden_size', which the architecture needs"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4}, "4 experts per token of 2"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words) as refusal:
        described(Settings(LLAMA | settings))
    assert isinstance(refusal.value, CheckpointError) or "experts" in words
    assert "\n" not in str(refusal.value)


def test_every_method_that_is_read_may_be_named_as_quantization():
    assert {*read_methods, "gguf", "int8"} == set(METHODS)  # GGUF's files, and what `convert --quantize int8` writes
    assert set(ROUNDINGS) == set(get_args(Rounding.__value__))
