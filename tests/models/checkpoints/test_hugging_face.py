"""Hugging Face directories that are right, and every way in which one can be wrong."""

import json

import ml_dtypes
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.tiny_directory import write_tiny_llama_directory
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from twinmesh.models.checkpoints import streaming
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def directory(tmp_path):
    return write_tiny_llama_directory(tmp_path / "tiny")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_it_is_the_same_model_as_the_gguf_file(tmp_path, tied, shards, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 10_000)
    model = TinyLlama(tied=tied, eps=2.0**-17)  # GGUF keeps it in float32
    ours = open_checkpoint(write_tiny_llama_directory(tmp_path / "tiny", model, shards=shards))
    theirs = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", model))
    found, expected = load_on_one_device(ours, "float32"), load_on_one_device(theirs, "float32")
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
    assert ours.config == theirs.config
    assert ours.name == "tiny"
    messages = [{"role": "user", "content": "the land of rain"}]
    assert ours.chat_template().encode(messages) == theirs.chat_template().encode(messages)


@pytest.mark.parametrize("stored", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "float16", ml_dtypes.bfloat16])
def test_weights_are_cast_to_the_dtype_asked_for(tmp_path, stored, wanted):
    checkpoint = open_checkpoint(write_tiny_llama_directory(tmp_path / "tiny", dtype=stored))
    assert checkpoint.dtype == np.dtype(stored)
    weights = TinyLlama().weights()
    found = load_on_one_device(checkpoint, wanted)
    np.testing.assert_array_equal(found["embedding.weight"], weights[EMBEDDING].astype(stored).astype(wanted))
    up = weights["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(found["layers.1.mlp.up_proj"], up.T.astype(stored).astype(wanted))


def test_what_is_known_to_be_harmless_may_be_there(tmp_path):
    extras = {
        "lm_head.weight": TinyLlama().weights()[EMBEDDING],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.layers.0.self_attn.k_scale": np.ones(1, np.float32),
    }
    assert open_checkpoint(write_tiny_llama_directory(tmp_path / "tiny", tensors=extras)).has_kv_scales
    del extras["model.layers.0.self_attn.k_scale"]
    assert not open_checkpoint(write_tiny_llama_directory(tmp_path / "without", tensors=extras)).has_kv_scales


def test_the_name_in_the_hubs_cache_is_the_hubs(tmp_path):
    snapshots = tmp_path / "models--org--some-name" / "snapshots"
    snapshots.mkdir(parents=True)
    assert open_checkpoint(write_tiny_llama_directory(snapshots / "0123abcd")).name == "org/some-name"


def refuses(path, *words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).tokenizer()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_an_empty_directory_says_what_was_looked_for(tmp_path):
    refuses(tmp_path, "holds no model", "config.json", "twinmesh.json")


def test_a_directory_of_gguf_files(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refuses(tmp_path, "name the file itself", str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model-00001.bin"])
@pytest.mark.parametrize("with_config", [True, False])
def test_pickles_are_never_opened(directory, file, with_config):
    (directory / "model.safetensors").rename(directory / file)
    if not with_config:
        (directory / "config.json").unlink()
    refuses(directory, "pickle", file, "it can run code", "safetensors")


def test_no_weights_at_all(directory):
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    refuses(directory, "neither model.safetensors nor model.safetensors.index.json", "only other.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["config.json is not readable JSON"]),
        ("{", ["config.json is not readable JSON"]),
        ("\xff", ["config.json is not readable JSON"]),
        ("[]", ["config.json is not a JSON object"]),
        ("{}", ["config.json: model_type None is not supported; supported: llama"]),
        ('{"model_type": "mamba"}', ["config.json: model_type 'mamba' is not supported; supported: llama"]),
        ('{"model_type": ["llama"]}', ["config.json: model_type ['llama'] is not supported"]),
        ('{"model_type": "llama"}', ["config.json: The settings have no 'hidden_size'"]),
    ],
)
def test_a_configuration_that_is_none(directory, content, words):
    (directory / "config.json").write_text(content, encoding="latin-1")
    refuses(directory, *words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.norm.weight": None}, ["has no tensor 'model.norm.weight'"]),
        ({"model.norm.weight": np.ones(71, np.float32)}, ["'model.norm.weight'", "(71,)", "(72,)"]),
        ({"model.layers.1.self_attn.q_proj.bias": np.ones(96, np.float32)}, ["q_proj.bias'", "not implemented"]),
        ({"model.norm.weight": np.ones(72, np.float64)}, ["'model.norm.weight' is of type F64", "not implemented"]),
        ({"model.norm.weight": np.ones(72, np.int8)}, ["'model.norm.weight' is of type I8", "not implemented"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, tensors, words):
    refuses(write_tiny_llama_directory(tmp_path / "tiny", tensors=tensors), *words)


def test_an_untied_head_is_needed(tmp_path):
    path = write_tiny_llama_directory(tmp_path / "tiny", config={"tie_word_embeddings": False})
    refuses(path, "no tensor 'lm_head.weight'")


@pytest.mark.parametrize("shards", [1, 3])
def test_truncated_weights(tmp_path, shards):
    path = write_tiny_llama_directory(tmp_path / "tiny", shards=shards)
    file = max(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    refuses(path, file.name, "is truncated: tensor 'model.", "fetch it again")


def test_a_shard_that_is_absent(tmp_path):
    path = write_tiny_llama_directory(tmp_path / "tiny", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    refuses(path, "index.json places tensor 'model.", "in 'model-00002-of-00003.safetensors', which is not there")


def test_no_tokenizer(directory):
    for file in directory.glob("token*"):
        file.unlink()
    refuses(directory, "no tokenizer")


def test_a_stored_head_that_differs_from_a_tied_embedding_counts_as_for_transformers(tmp_path):
    head = TinyLlama().weights()[EMBEDDING] + 1
    path = write_tiny_llama_directory(tmp_path / "tiny", tensors={"lm_head.weight": head})
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.tie_embeddings
    np.testing.assert_array_equal(load_on_one_device(checkpoint, "float32")["head.weight"], head)


def test_a_tied_embedding_may_be_stored_as_the_head_alone(tmp_path):
    weight = TinyLlama().weights()[EMBEDDING]
    path = write_tiny_llama_directory(tmp_path / "tiny", tensors={"lm_head.weight": weight, EMBEDDING: None})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_embeddings
    np.testing.assert_array_equal(load_on_one_device(checkpoint, "float32")["embedding.weight"], weight)


def test_a_file_of_tensors_and_shards_without_an_index_say_what_is_missing(tmp_path):
    path = write_tiny_llama_directory(tmp_path / "tiny", shards=2)
    refuses(path / "model-00001-of-00002.safetensors", "tensors only", "name the directory")
    (path / "model.safetensors.index.json").unlink()
    refuses(path, "only model-00001-of-00002.safetensors", "and their index")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    weights = TinyLlama().weights()
    path = write_tiny_llama_directory(
        tmp_path / "tiny", config={"vocab_size": 200}, tensors={EMBEDDING: weights[EMBEDDING][:200]}
    )
    refuses(path, "The tokenizer has 275 tokens, the model 200")


def test_a_padded_embedding_is_fine(tmp_path):
    padded = np.pad(TinyLlama().weights()[EMBEDDING], ((0, 13), (0, 0)))
    path = write_tiny_llama_directory(tmp_path / "tiny", config={"vocab_size": 288}, tensors={EMBEDDING: padded})
    assert open_checkpoint(path).tokenizer().vocab_size == 275


def test_a_tokenizer_that_cannot_be_read(directory):
    (directory / "tokenizer.json").write_text(json.dumps({"model": "?"}))
    refuses(directory, "tokenizer.json")
