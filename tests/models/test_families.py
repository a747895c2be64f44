"""Every family against transformers, from a directory and from a GGUF file; and what is refused, by name.

The tiny models are those of `helpers/tiny_families.py`; tests/make_family_fixtures.py asked transformers.
"""

import numpy as np
import pytest
from helpers.tiny_families import TINY
from helpers.tiny_files import expected, tiny_config, write_tiny_directory, write_tiny_gguf_of
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.config import Rope
from twinmesh.models.errors import CheckpointError
from twinmesh.models.families import HUGGING_FACE, format_named
from twinmesh.models.families.raw_config import Settings

IN_GGUF = [name for name, model in TINY.items() if model.gguf]
FROM_HUB = [name for name, model in TINY.items() if model.on_hub is not None]
# Largest difference seen: 3.3e-5, of logits whose standard deviation is 4.
TOLERANCE = 1e-4
# The weights of GPT-OSS' experts are large, so that gates reach their limit: 1.3e-4.
TOLERANCES = {"gpt_oss": 3e-4}


def config_of(name, *, from_hub=False, **changes):
    """What the family makes of the tiny model's config.json."""
    settings = tiny_config(name, from_hub=from_hub) | changes
    return format_named(HUGGING_FACE, settings["model_type"], "model_type").config(Settings(settings))


def check_against_transformers(forward, name):
    """One program, of the longer length, for both prompts; what comes behind a token does not change its logits."""
    case = expected(name)
    greedy = [*case["prompt_ids"], *case["greedy_ids"]]
    found = forward(np.pad(case["ids"], (0, len(greedy) - len(case["ids"]))))
    np.testing.assert_allclose(found[: len(case["ids"])], case["logits"], atol=TOLERANCES.get(name, TOLERANCE), rtol=0)
    likeliest = forward(greedy).argmax(-1)
    np.testing.assert_array_equal(likeliest[len(case["prompt_ids"]) - 1 : -1], case["greedy_ids"])


@pytest.mark.parametrize("name", TINY)
def test_a_directory_gives_the_logits_of_transformers(tmp_path, dense_forward, name):
    shards = 3 if name in ("llama3", "phi3") else 1
    checkpoint = open_checkpoint(write_tiny_directory(tmp_path / name, name, shards=shards))
    check_against_transformers(dense_forward(checkpoint), name)


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_file_gives_the_logits_of_transformers(tmp_path, dense_forward, name):
    checkpoint = open_checkpoint(write_tiny_gguf_of(tmp_path / "tiny.gguf", name))
    check_against_transformers(dense_forward(checkpoint), name)


@pytest.mark.parametrize("name", FROM_HUB)
def test_configurations_before_and_after_transformers_5_are_the_same_model(name):
    assert config_of(name, from_hub=True) == config_of(name)


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_metadata_and_config_json_are_the_same_model(tmp_path, name):
    one = open_checkpoint(write_tiny_gguf_of(tmp_path / "tiny.gguf", name)).config
    other = config_of(name)
    changed = dict.fromkeys(("family", "rms_norm_eps", "layers"))
    assert vars(one) | changed == vars(other) | changed
    assert one.rms_norm_eps == pytest.approx(other.rms_norm_eps)  # float32 in GGUF
    for found, wanted in zip(one.layers, other.layers, strict=True):
        assert (found.window, found.softcap) == (wanted.window, wanted.softcap)
        assert found.rope.theta == pytest.approx(wanted.rope.theta)
        assert found.rope.magnitude == pytest.approx(wanted.rope.magnitude)
        factors = [rope.factors or (1.0,) * (one.head_dim // 2) for rope in (found.rope, wanted.rope)]
        assert factors[0] == pytest.approx(factors[1])


def test_windows_are_where_transformers_has_them():
    windows = {name: [layer.window for layer in config_of(name).layers] for name in TINY}
    assert windows["qwen2"] == [None, None]  # named in its older configuration, and switched off
    assert windows["qwen2_window"] == [None, None, 12, 12]
    assert windows["mistral"] == [10, 10, 10]
    assert windows["gemma3"] == [9, 9, None, 9, 9, None, 9]
    assert windows["gemma3_linear"] == [11, 11, 11, 11, 11, None, 11, 11]
    assert windows["phi3"] == [13, 13]
    assert windows["mixtral"] == [None, None]
    assert windows["gpt_oss"] == [9, None, 9]


def test_where_rope_settings_may_stand():
    def ropes(name, **changes):
        return {layer.rope for layer in config_of(name, **changes).layers}

    assert ropes("llama2", rope_parameters={"rope_type": "default"}, rope_theta=5e5) == {Rope(5e5)}
    both = {name: dict(factor=4.0, rope_type="linear") for name in ("rope_parameters", "rope_scaling")}
    assert ropes("llama2", rope_theta=5e5, **both) == {Rope(5e5, (4.0,) * 6)}
    by_kind = {"full_attention": {}, "sliding_attention": {}}
    bases = dict(rope_theta=3e5, rope_local_base_freq=200.0)
    assert ropes("gemma3", rope_parameters=by_kind, **bases) == {Rope(3e5), Rope(200.0)}
    # Flat in a family whose sliding layers have a base of their own: that is never scaled.
    flat = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    size = config_of("gemma3").head_dim // 2
    assert ropes("gemma3", rope_parameters=flat) == {Rope(1e6, (8.0,) * size), Rope(1e4)}


LINEAR = {"rope_type": "linear", "rope_theta": 1e4}


# By vLLM 0.32: max_position_embeddings x factor for linear scaling; Llama 3's and Gemma 3's files count it already.
@pytest.mark.parametrize(
    ("name", "changes", "context"),
    [
        ("llama2", {"rope_parameters": LINEAR | {"factor": 4.0}}, 512),
        ("llama2", {"rope_parameters": LINEAR | {"factor": 2.5}, "max_position_embeddings": 100}, 250),
        ("llama2", {"rope_parameters": LINEAR | {"factor": 1.0}}, 128),
        ("llama2", {"rope_parameters": LINEAR | {"factor": 3, "type": "linear"}, "rope_scaling": None}, 384),
        ("qwen2", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 8.0}}, 1024),
        ("mistral", {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 256),
        ("llama_linear", {}, 512),
        ("llama3", {}, 128),
        ("gemma3_linear", {}, 128),
        ("qwen3", {}, 128),
    ],
)
def test_linear_scaling_lengthens_the_context(name, changes, context):
    assert config_of(name, **changes).max_position == context


def test_a_gguf_file_s_context_is_lengthened_unless_it_counts_the_scaling(tmp_path):
    def context(name, **changes):
        keys = {f"{TINY[name].gguf}.{key.replace('__', '.')}": value for key, value in changes.items()}
        return open_checkpoint(write_tiny_gguf_of(tmp_path / "tiny.gguf", name, metadata=keys)).config.max_position

    assert context("llama_linear") == 512
    assert context("llama_linear", rope__scaling__original_context_length=128) == 512
    assert context("llama_linear", rope__scaling__original_context_length=32) == 128
    assert context("llama_linear", rope__scaling__factor=0.0) == 128
    assert context("llama_linear", rope__scaling__type="none") == 128
    assert (context("llama3"), context("gemma3_linear")) == (128, 128)
    assert context("llama3", rope__scaling__factor=2.0) == 256


def test_mistrals_window_is_4096_unless_its_configuration_says_otherwise():
    settings = tiny_config("mistral")
    del settings["sliding_window"]
    for changes, window in (({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 8}, 8)):
        config = HUGGING_FACE["mistral"].config(Settings(settings | changes))
        assert {layer.window for layer in config.layers} == {window}


def test_gguf_rope_settings_are_read_as_llama_cpp_reads_them(tmp_path):
    def layers(name, *without, **changes):
        keys = {f"{TINY[name].gguf}.{key.replace('__', '.')}": value for key, value in changes.items()}
        path = write_tiny_gguf_of(tmp_path / "tiny.gguf", name, metadata=keys | dict.fromkeys(without))
        return open_checkpoint(path).config.layers

    linear = Rope(1e4, (4.0,) * 5)
    assert layers("llama_linear", "llama.rope.scaling.type")[0].rope == linear
    keys = ("llama.rope.scaling.type", "llama.rope.scaling.factor")
    assert layers("llama_linear", *keys, rope__scale_linear=4.0)[0].rope == linear
    assert layers("llama_linear", rope__scaling__type="none")[0].rope == Rope(1e4)
    halved = [factor / 2 for factor in layers("llama3", rope__scaling__factor=2.0)[0].rope.factors]
    assert tuple(halved) == layers("llama3")[0].rope.factors
    changed = layers("gemma3_linear", rope__freq_base_swa=500.0, attention__sliding_window_pattern=3)
    assert [layer.window for layer in changed] == [11, 11, None, 11, 11, None, 11, 11]
    assert changed[0].rope == Rope(500.0)


REFUSED = {
    "yarn of no context": (
        "llama3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        "rope_parameters.original_max_position_embeddings",
    ),
    "yarn of DeepSeek": ("gpt_oss", {"rope_parameters": {"rope_type": "yarn", "mscale": 1.0}}, "mscale"),
    "dynamic, added to a newer file": ("qwen3", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    "two scalings": ("qwen3", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters says otherwise"),
    "dynamic, older": ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "longrope": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4}},
        "longrope",
    ),
    "unknown rope of sliding layers": (
        "gemma3",
        {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "longrope"}}},
        "longrope",
    ),
    "partial rotary": ("phi4", {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
    "partial rotary, newer": (
        "phi4",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
        "partial_rotary_factor",
    ),
    "activation": ("llama2", {"hidden_act": "relu2"}, "relu2"),
    "activation of gemma": ("gemma3", {"hidden_activation": "gelu"}, "gelu"),
    "quantised": ("qwen3", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    "vision": ("gemma3", {"vision_config": {"hidden_size": 8}}, "vision_config"),
    "vision tower's model type": ("gemma3", {"model_type": "gemma3", "vision_config": {}}, "vision_config"),
    "experts": ("mistral", {"num_local_experts": 8}, "num_local_experts"),
    "experts of qwen": ("qwen3", {"num_experts": 128}, "num_experts"),
    "layers without experts": ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "experts in every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    "more experts than there are": ("mixtral", {"num_experts_per_tok": 9}, "9 experts per token of 8"),
    "no experts": ("gpt_oss", {"num_local_experts": None}, "num_experts"),
    "another packing": ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quant_method"),
    "packed weights of another family": ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization"),
    "attention bias": ("llama2", {"attention_bias": True}, "attention_bias"),
    "mlp bias": ("llama2", {"mlp_bias": True}, "mlp_bias"),
    "capped logits": ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "capped scores": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "both directions": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "chunked attention": ("llama3", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    "model type": ("llama2", {"model_type": "mamba"}, "mamba"),
    "no model type": ("llama2", {"model_type": None}, "model_type"),
    "odd heads": ("llama2", {"num_key_value_heads": 3}, "4 query heads over 3 KV heads"),
    "layers of no kind": ("llama3", {"layer_types": [["full_attention"]] * 2}, "layer_types"),
    "a number beyond all": ("llama2", {"hidden_size": 10**400}, "hidden_size = 10000"),
    "text for a number": ("llama2", {"hidden_size": "48"}, "hidden_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, case):
    name, changes, named = REFUSED[case]
    config = tiny_config(name) | changes
    if case.endswith("older"):
        del config["rope_parameters"]
    path = write_tiny_directory(tmp_path / name, name, config=config)
    with pytest.raises(CheckpointError, match=named) as refusal:
        open_checkpoint(path)
    assert str(path) in str(refusal.value)
    assert str(refusal.value).count("\n") == 0


def test_gpt_oss_without_a_word_on_rotation_has_the_yarn_of_its_reference():
    said = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    said |= {"original_max_position_embeddings": 4096, "rope_theta": 150_000.0}
    silent = config_of("gpt_oss", rope_parameters=None, rope_scaling=None, rope_theta=None)
    assert silent.layers == config_of("gpt_oss", rope_parameters=said).layers
