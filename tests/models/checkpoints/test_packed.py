"""Hugging Face's quantised checkpoints: the model in floats bit for bit, transformers' logits, and what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.packed import FORMATS, PACKED, PACKED_EXPERTS, is_packed, packed, words
from helpers.tiny_files import expected, tiny_config, write_packed, write_tiny_directory
from twinmesh.kernels_pallas.quantized import QuantizedArray, parameter
from twinmesh.models.checkpoints.known_models import named_model
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.errors import CheckpointError

MATRICES = 2 * 7


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    checkpoint = open_checkpoint(write_tiny_directory(tmp_path_factory.mktemp("floats") / "packed", "packed"))
    return load_on_one_device(checkpoint, jnp.float32)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Format -> its directory, written once."""
    folder, found = tmp_path_factory.mktemp("packed"), {}

    def get(name):
        if name not in found:
            found[name] = write_packed(folder / name.replace(" ", "-"), name)
        return found[name]

    return get


def same(found, floats):
    for path, array in floats.items():
        value = found[path]
        ours = parameter(jax.tree.map(np.asarray, value)) if isinstance(value, QuantizedArray) else value
        np.testing.assert_array_equal(ours, array, err_msg=path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_directory_is_the_model_in_floats_bit_for_bit(directories, floats, name):
    checkpoint = open_checkpoint(directories(name))
    assert checkpoint.method == FORMATS[name][1]["quant_method"]
    read = []
    same(load_on_one_device(checkpoint, jnp.float32, report=read.append), floats)
    assert sum(read) == checkpoint.stored_bytes


@pytest.mark.parametrize("name", FORMATS)
def test_what_stays_packed_is_the_same_and_takes_about_the_bytes_of_the_file(directories, floats, name):
    checkpoint, pattern = open_checkpoint(directories(name)), FORMATS[name][2]
    assert len(checkpoint.formats) == (MATRICES if pattern else 0)
    assert all(re.fullmatch(pattern, layout) for layout in checkpoint.formats.values())
    assert len(checkpoint.dequantized) == MATRICES - len(checkpoint.formats)
    read = []
    kept = load_on_one_device(checkpoint, jnp.float32, formats=checkpoint.formats, report=read.append)
    same(kept, floats)
    assert sum(read) == checkpoint.stored_bytes
    on_device = sum(kept[path].nbytes for path in checkpoint.formats)
    in_file = checkpoint.stored_bytes - sum(x.nbytes for path, x in floats.items() if path not in checkpoint.formats)
    if pattern:
        assert on_device <= 1.15 * in_file


@pytest.mark.parametrize("name", FORMATS)
def test_a_plan_by_config_json_alone_keeps_what_the_files_do(directories, tmp_path, name):
    """Scales of compressed-tensors are taken for the model's dtype, which here is theirs."""
    found, alone = open_checkpoint(directories(name)).formats, tmp_path / "config.json"
    settings = json.loads((directories(name) / "config.json").read_text())
    scales = {form.rpartition("-")[2] for form in found.values()} or {"float16"}
    alone.write_text(json.dumps(settings | {"dtype": scales.pop()}))
    assert named_model(alone).formats == found
    assert named_model(directories(name)).formats == found


@pytest.mark.parametrize("name", ["fp8 in blocks", "int8", "int4 of 64", "awq", "gptq", "gptq out of order"])
def test_it_gives_the_logits_and_tokens_of_transformers(directories, dense_forward, name):
    """All formats are the same floats, as above: here one of each kind goes the whole way."""
    forward, case = dense_forward(open_checkpoint(directories(name))), expected("packed")
    greedy = [*case["prompt_ids"], *case["greedy_ids"]]
    found = forward(np.pad(case["ids"], (0, len(greedy) - len(case["ids"]))))
    np.testing.assert_allclose(found[: len(case["ids"])], case["logits"], atol=1e-3, rtol=0)
    likeliest = forward(greedy).argmax(-1)
    np.testing.assert_array_equal(likeliest[len(case["prompt_ids"]) - 1 : -1], case["greedy_ids"])


def experts(path, format_, is_packed=is_packed):
    """A Mixtral with its projections in a format, and as floats."""
    weights = PACKED_EXPERTS.weights()
    config = tiny_config("mixtral") | PACKED_EXPERTS.settings | {"head_dim": 32}
    tensors = packed(format_, weights, is_packed)
    settings = config | {"quantization_config": FORMATS[format_][1]}
    checkpoints = [
        open_checkpoint(write_tiny_directory(path / name, "mixtral", config=these, weights=held))
        for name, these, held in (("packed", settings, tensors), ("floats", config, weights))
    ]
    return checkpoints[0], load_on_one_device(checkpoints[1], jnp.float32)


@pytest.mark.parametrize("name", ["fp8 in blocks", "awq"])
def test_experts_are_one_stack_and_stay_packed(tmp_path, name):
    checkpoint, floats = experts(tmp_path, name)
    kept = load_on_one_device(checkpoint, jnp.float32, formats=checkpoint.formats)
    assert named_model(checkpoint.path / "config.json").formats == checkpoint.formats
    assert [kept[f"layers.0.mlp.{part}_proj"].stacked for part in ("gate", "up", "down")] == [1, 1, 1]
    same(kept, floats)


def test_a_stack_of_mixed_formats_becomes_floats(tmp_path):
    def is_one(name):
        return is_packed(name) and "experts.1." not in name

    checkpoint, floats = experts(tmp_path, "int4 of 128", is_one)
    assert {path.rpartition(".")[2] for path in checkpoint.formats} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    same(load_on_one_device(checkpoint, jnp.float32, formats=checkpoint.formats), floats)


def test_inputs_out_of_order_become_floats_with_their_cost(directories):
    found = open_checkpoint(directories("gptq out of order")).dequantized
    assert {one.format for one in found.values()} == {"UINT4-128 out of order"}
    assert found["layers.0.mlp.down_proj"].nbytes == 256 * 512 // 2 + 4 * 256 * 2 + 4 * 256 // 2 + 512 * 4


def test_the_first_format_of_gptq_borrows_from_the_next_zero_point(tmp_path):
    """GPTQModel 7.7 subtracts one from whole words, so a zero point of 0 takes one from its neighbour."""
    zeros = words(np.random.default_rng(0).integers(0, 16, (2, 512)), 4)
    less = (zeros.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    loaded = []
    for name, stored in (("gptq v2", zeros), ("gptq", less)):
        path = write_packed(tmp_path / name, name, change=lambda w, stored=stored: w.update({f"{UP}.qzeros": stored}))
        loaded.append(load_on_one_device(open_checkpoint(path), jnp.float32)["layers.1.mlp.up_proj"])
    np.testing.assert_array_equal(*loaded)


UP, QUERY = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def _set(name, index, value):
    def change(weights):
        weights[name] = weights[name].copy()
        weights[name][index] = value

    return change


def _drop(name):
    return lambda weights: weights.pop(name)


# Format, change of the tensors, settings besides, and what the sentence says.
REFUSED = {
    "no scales": ("fp8 per channel", _drop(f"{UP}.weight_scale"), {}, f"{UP}.weight.*it has no scales"),
    "scales of another shape": (
        "int8", lambda w: w.update({f"{UP}.weight_scale": np.ones((5, 1), np.float32)}), {}, f"{UP}.weight.*scales of",
    ),
    "no zero points": ("awq", _drop(f"{UP}.qzeros"), {}, f"{UP}.qweight.*with qzeros"),
    "words of another width": (
        "gptq", lambda w: w.update({f"{UP}.qweight": w[f"{UP}.qweight"][:, :-8].copy()}), {}, "qweight.*do not fit",
    ),
    "twice": (
        "int4 of 128", lambda w: w.update({f"{UP}.weight": np.ones((512, 256), np.float32)}), {}, "weight.*another",
    ),
    "another shape": ("int4 of 32", _set(f"{UP}.weight_shape", 1, 288), {}, f"{UP}.weight_packed.*weight_shape"),
    "scales that were cut off": (
        "fp8 in blocks", lambda w: w.update({f"{UP}.weight_scale_inv": np.ones((1, 1), np.float32)}), {},
        f"{UP}.weight.*512 x 256 weights share a scale, and quantization_config says 128 x 128",
    ),
    "scales of outputs that were cut off": (
        "int8", lambda w: w.update({f"{UP}.weight_scale": np.ones((1, 1), np.float32)}), {},
        f"{UP}.weight.*512 x 256 weights share a scale, and quantization_config says 1 x 256",
    ),
    "groups of another size": ("awq", lambda w: None, {"group_size": 64}, "proj.weight.*1 x 128 weights.*says 1 x 64"),
    "zero points that were lost": (
        "int4 with zeros", _drop(f"{UP}.weight_zero_point"),
        {"config_groups": {"group_0": {"weights": {"symmetric": False}}}}, f"{UP}.weight.*no zero points",
    ),
    "groups that are no whole numbers": (
        "gptq", lambda w: w.update({f"{UP}.g_idx": w[f"{UP}.g_idx"].astype(np.float32)}), {}, f"{UP}.qweight.*F32",
    ),
    "zero points that are no words": (
        "int4 with zeros", lambda w: w.update({f"{UP}.weight_zero_point": w[f"{UP}.weight_zero_point"].view("f4")}), {},
        f"{UP}.weight_packed.*F32",
    ),
    "groups beyond the last": ("gptq", _set(f"{UP}.g_idx", 3, 9), {}, "numbers below 2"),
    "a second scale": (
        "mxfp4", lambda w: w.update({f"{UP}.weight_global_scale": np.ones(1, np.float32)}), {}, f"{UP}.*NVFP4",
    ),
    "mixed": (
        "awq", lambda w: w.update({f"{QUERY}.weight_packed": w.pop(f"{QUERY}.qweight")}), {}, f"{QUERY}.weight_pack",
    ),
    "unknown": ("awq", lambda w: None, {"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes'"),
    "another layout of AWQ": ("awq", lambda w: None, {"version": "gemv"}, "version = 'gemv'"),
    "three bits": ("gptq", lambda w: None, {"bits": 3}, "bits = 3"),
    "another layout of GPTQ": ("gptq", lambda w: None, {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    "left out": ("int8", lambda w: None, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.f"),
    "turned": ("int8", lambda w: None, {"transform_config": {"config_groups": {"a": {}}}}, "transform_config.config"),
    "two scales": ("int8", lambda w: None, {"format": "nvfp4-pack-quantized"}, "format = 'nvfp4-pack-quantized'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_weight_is_refused_in_one_sentence_with_tensor_and_file(tmp_path, case):
    format_, change, settings, words_ = REFUSED[case]
    path = write_packed(tmp_path / "tiny", format_, change=change, settings=settings)
    with pytest.raises(CheckpointError, match=words_) as refusal:
        open_checkpoint(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


NAN = {
    "fp8 in blocks": (f"{UP}.weight_scale_inv", (2, 1), 256),
    "fp8 per channel": (f"{UP}.weight_scale", (7, 0), 7),
    "int4 of 128": (f"{UP}.weight_scale", (5, 1), 5),
    "gptq": (f"{UP}.scales", (1, 9), 9),
}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", NAN)
@pytest.mark.parametrize("stays", [True, False])
def test_scales_that_are_not_finite_are_refused(tmp_path, name, value, stays):
    tensor, at, row = NAN[name]
    checkpoint = open_checkpoint(write_packed(tmp_path / "tiny", name, change=_set(tensor, at, value)))
    formats = {path: layout for path, layout in checkpoint.formats.items() if path == "layers.1.mlp.up_proj" and stays}
    with pytest.raises(
        CheckpointError, match=rf"model.safetensors: tensor '{UP}.weight' holds .* in row {row}"
    ) as refusal:
        load_on_one_device(checkpoint, jnp.float32, formats=formats)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("stays", [True, False])
def test_a_float_of_8_bits_that_is_nan_is_found_and_stays_nan(tmp_path, stays):
    change = _set(f"{UP}.weight", (37, 200), np.nan)
    checkpoint = open_checkpoint(write_packed(tmp_path / "tiny", "fp8 per channel", change=change))
    formats = checkpoint.formats if stays else {}
    with pytest.raises(CheckpointError, match="holds nan in row 37"):
        load_on_one_device(checkpoint, jnp.float32, formats=formats)
    loaded = load_on_one_device(checkpoint, jnp.float32, formats=formats, allow_nonfinite=True)["layers.1.mlp.up_proj"]
    whole = parameter(loaded) if stays else loaded
    assert np.isnan(whole[200, 37])
    assert np.isfinite(np.delete(whole, 37, 1)).all()


def test_a_vision_tower_is_named_with_its_tensor_and_file(tmp_path):
    weights = PACKED["packed"].weights() | {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}
    config = tiny_config("packed") | {"vision_config": {"hidden_size": 8}, "text_config": {}}
    path = write_tiny_directory(tmp_path / "tiny", "packed", config=config, weights=weights)
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(path)
    assert str(refusal.value) == (
        f"{path / 'config.json'}: vision_config says that the model has a vision tower, tensor "
        f"'vision_tower.patch.weight' in {path / 'model.safetensors'}, and none is implemented: give a checkpoint of "
        "its language model alone."
    )
