"""A model's sizes by its name, its directory or its file, without any weights."""

import json

import pytest
from helpers.tiny_directory import settings_of
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from twinmesh.models.checkpoints.known_models import known_model, named_model, profile_name
from twinmesh.models.errors import CheckpointError
from twinmesh.models.families.known import known_config, known_names


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("smollm2", "smollm2-135m"),
    ],
)
def test_all_spellings_are_one_model(spelling, name):
    assert named_model(spelling) == (name, known_config(name), {})
    assert profile_name(spelling) == name


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6), ("llama-3.2-1b", 1.24), ("qwen3-8b", 8.19), ("qwen3-32b", 32.8),
     ("gemma-3-27b", 27.0), ("phi-4", 14.7), ("smollm2-135m", 0.1345), ("qwen2.5-7b", 7.62)],
)  # fmt: skip
def test_sizes_add_up_to_the_parameters_that_the_name_promises(name, billions):
    model = known_config(name)
    attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    layers = model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size
    assert (layers + embeddings) / 1e9 == pytest.approx(billions, rel=0.005)


def test_every_known_model_is_one_that_its_family_reads():
    assert all(known_config(name).num_layers > 0 for name in known_names())


def test_a_directory_needs_no_more_than_its_config(tmp_path):
    """An index whose weights were not fetched is no hindrance."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(settings_of(TinyLlama())))
    places = {"model.norm.weight": "model-00001-of-00001.safetensors"}
    (tmp_path / "mine" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    name, config, _ = named_model(tmp_path / "mine")
    assert (name, config.num_layers, config.hidden_size) == ("mine", 2, 72)


def test_a_gguf_file_describes_itself(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf")
    assert known_model(tmp_path / "tiny.gguf").hidden_size == 72


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(CheckpointError, match=r"'lama-3.1-8b' is known.*the nearest is 'llama-3.1-8b'"):
        known_model("lama-3.1-8b")


def test_a_config_that_is_not_implemented_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings_of(TinyLlama()) | {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"config.json: model_type 'mamba' is not supported"):
        known_model(tmp_path)
