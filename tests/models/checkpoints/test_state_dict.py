"""Tensors by Hugging Face's names against what a directory of them is loaded as, for every family."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.tiny_families import TINY
from helpers.tiny_files import write_tiny_directory
from twinmesh.kernels_pallas.quantized import abstract
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.state_dict import from_state_dict, sources_by_path
from twinmesh.models.decoder import abstract_params
from twinmesh.models.families import HUGGING_FACE, known


def described(checkpoint, dtype=jnp.float32):
    return {path: spec.value for path, spec in abstract_params(checkpoint.config, dtype).specs.items()}


@pytest.fixture
def opened(tmp_path):
    return lambda name: open_checkpoint(write_tiny_directory(tmp_path / name, name))


@pytest.mark.parametrize("name", TINY)
def test_tensors_become_what_loading_makes_of_them(opened, name):
    checkpoint = opened(name)
    dtype = jnp.bfloat16 if name == "phi3" else jnp.float32
    made = from_state_dict(TINY[name].weights(), checkpoint.config, described(checkpoint, dtype))
    loaded = load_on_one_device(checkpoint, dtype)
    assert made.keys() == loaded.keys()
    for path, array in loaded.items():
        assert made[path].dtype == array.dtype
        np.testing.assert_array_equal(made[path], array)


def test_a_model_of_every_known_family_has_names():
    families = {known.known_config(name).family for name in known.known_names()}
    assert {name.removesuffix("_text") for name in HUGGING_FACE} == families
    for name in known.known_names():
        assert "embedding.weight" in sources_by_path(known.known_config(name))


def test_a_fused_tensor_is_all_of_its_parameters(opened):
    checkpoint = opened("phi3")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    made = from_state_dict({name: TINY["phi3"].weights()[name]}, checkpoint.config, described(checkpoint))
    assert set(made) == {f"layers.1.attention.{part}_proj" for part in "qkv"}


def test_a_head_that_is_the_embedding_may_be_given_with_it(opened):
    checkpoint = opened("gemma3")
    table = TINY["gemma3"].weights()["model.embed_tokens.weight"]
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table.copy()}
    assert list(from_state_dict(both, checkpoint.config, described(checkpoint))) == ["embedding.weight"]
    with pytest.raises(ValueError, match="which is this model's head as well: leave it out"):
        from_state_dict({"lm_head.weight": table}, checkpoint.config, described(checkpoint))
    both["lm_head.weight"] = table + 1
    with pytest.raises(ValueError, match="or give both alike"):
        from_state_dict(both, checkpoint.config, described(checkpoint))


@pytest.mark.parametrize(
    ("family", "name", "change", "says"),
    [
        ("llama2", "model.layers.0.self_attn.q_proj.weight", lambda x: x[:-1], r"q_proj\.weight'\] has shape"),
        ("llama2", "model.norm.weight", lambda x: x.astype(np.int8), r"norm\.weight'\] is of type int8: give an array"),
        ("llama2", "model.norm.weight", lambda x: x.tolist(), r"norm\.weight'\] is of type list: give an array"),
        ("llama2", "model.layers.0.self_attn.q.weight", None, r"files of the family llama do not have: use names"),
        ("llama2", "model.layers.0.self_attn.q_proj.qweight", None, r"q_proj\.qweight', which files of the family"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight", lambda x: x, r"but not .*experts\.0\.w1"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(opened, family, name, change, says):
    checkpoint = opened(family)
    tensor = np.ones((4, 4), np.float32) if change is None else change(TINY[family].weights()[name])
    with pytest.raises(ValueError, match=says):
        from_state_dict({name: tensor}, checkpoint.config, described(checkpoint))


def test_a_parameter_that_is_quantised_is_refused_by_name(opened):
    checkpoint, path = opened("llama2"), "layers.0.mlp.up_proj"
    specs = described(checkpoint)
    specs[path] = abstract("Q8_0", specs[path].shape, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"is layers\.0\.mlp\.up_proj here, which is Q8_0: round it with `quantize`"):
        from_state_dict({name: TINY["llama2"].weights()[name]}, checkpoint.config, specs)
