"""Checkpoints that are right, and every way in which a file can be wrong."""

import contextlib

import jax
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.tiny_gguf import TOKENS, TinyLlama, write_tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.models.checkpoints import gguf as gguf_checkpoint
from twinmesh.models.checkpoints import streaming
from twinmesh.models.checkpoints.gguf_file import GGUFFile
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.decoder import abstract_params
from twinmesh.models.errors import CheckpointError


def test_facts_of_the_file(tiny):
    config = tiny.config
    assert tiny.name == "Tiny Llama"
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (2, 72, 6, 2)
    assert (config.head_dim, config.intermediate_size, config.vocab_size, config.max_position) == (16, 80, 275, 512)
    assert config.tie_embeddings
    assert config.layers[0].rope.theta == 10000.0
    assert config.attention_scale == 0.25


def test_rotary_rows_come_back_in_halves(tiny):
    expected = TinyLlama().weights()["model.layers.1.self_attn.k_proj.weight"]  # [H * D, E]
    found = load_on_one_device(tiny, "float32")["layers.1.attention.k_proj"]  # [E, H, D]
    np.testing.assert_array_equal(found.reshape(72, 32).T, expected)


def test_every_row_is_read_once_however_many_meshes_want_it(tiny_path, monkeypatch):
    seen = []

    class Spy(GGUFFile):
        def read_rows(self, name, start, stop):
            seen.extend((name, row) for row in range(start, stop))
            return super().read_rows(name, start, stop)

    monkeypatch.setattr(gguf_checkpoint, "GGUFFile", Spy)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 10_000)
    checkpoint = open_checkpoint(tiny_path)
    load_on_one_device(checkpoint, "float32")
    once, seen[:] = sorted(seen), []
    placements = [jax.sharding.SingleDeviceSharding(device) for device in jax.devices()[:2]]
    specs = abstract_params(checkpoint.config, "float32").specs
    wanted = {
        path: tuple(jax.ShapeDtypeStruct(spec.value.shape, spec.value.dtype, sharding=place) for place in placements)
        for path, spec in specs.items()
    }
    for path, (first, second) in checkpoint.load(wanted):
        assert (first.sharding, second.sharding) == tuple(placements), path
        np.testing.assert_array_equal(first, second)
    assert sorted(seen) == once
    assert len(set(once)) == len(once)


def refuses(path, *words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).tokenizer()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_file(tmp_path):
    refuses(tmp_path / "no.gguf", "no model file")


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 something else entirely"])
def test_not_gguf(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    refuses(path, "not a GGUF file")


def test_unknown_version(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(64))
    refuses(path, "version")


@pytest.mark.parametrize("keep", [4, 20, 2000, 9000])
def test_truncated_header(tmp_path, tiny_path, keep):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_path.read_bytes()[:keep])
    refuses(path, "truncated", "header")


def test_truncated_tensor(tmp_path, tiny_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_path.read_bytes()[:-4096])
    refuses(path, "truncated", "'blk.1.ffn_down.weight'", "fetch it again")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.architecture": "mamba"}, ["'mamba'", "supported: llama"]),
        ({"llama.rope.scaling.type": "longrope"}, ["rope.scaling.type", "'longrope'"]),
        ({"llama.rope.scaling.type": "yarn"}, ["no 'llama.rope.scaling.factor'"]),
        ({"llama.expert_count": 8}, ["no 'llama.expert_used_count'"]),
        ({"llama.attention.sliding_window": 4096}, ["sliding_window"]),
        ({"llama.rope.dimension_count": 8}, ["rope.dimension_count", "16"]),
        ({"llama.attention.value_length": 8}, ["value_length"]),
        ({"llama.embedding_length": None}, ["no 'llama.embedding_length'"]),
        ({"llama.attention.head_count": [6, 4]}, ["head_count", "[6, 4]"]),
        ({"llama.attention.head_count_kv": 4}, ["6 query heads over 4"]),
        ({"llama.attention.head_count": 6.5}, ["head_count", "integer"]),
        ({"llama.context_length": 0}, ["context_length"]),
        ({"llama.block_count": 4_000_000_000}, ["block_count", "4000000000"]),
        ({"llama.block_count": 3}, ["'blk.2."]),
        ({"llama.block_count": 1}, ["'blk.1.", "not implemented"]),
        ({"tokenizer.ggml.model": "t5"}, ["Tokenizer model 't5'", "'gpt2'"]),
        ({"tokenizer.ggml.pre": "other"}, ["Pre-tokenizer 'other'", "'smollm'"]),
        ({"tokenizer.ggml.merges": None}, ["tokenizer.ggml.merges"]),
        ({"tokenizer.ggml.merges": ["no such"]}, ["merges"]),
        (
            {"tokenizer.ggml.tokens": [*TOKENS, "extra"], "tokenizer.ggml.token_type": [1] * 276},
            ["276 tokens", "model 275"],
        ),
        ({"tokenizer.ggml.merges": ["alone"]}, ["merge 'alone'"]),
        ({"tokenizer.ggml.token_type": [1, 1]}, ["275", "2 in tokenizer.ggml.token_type"]),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, ["eos_token_id", "'</s>'"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, metadata, words):
    refuses(write_tiny_gguf(tmp_path / "model.gguf", metadata=metadata), *words)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"blk.1.attn_q.weight": None}, ["no tensor 'blk.1.attn_q.weight'"]),
        ({"output_norm.weight": np.ones(71, np.float32)}, ["'output_norm.weight'", "(71,)", "(72,)"]),
        ({"blk.0.attn_q.bias": np.ones(96, np.float32)}, ["'blk.0.attn_q.bias'", "not implemented"]),
        ({"rope_freqs.weight": np.ones(7, np.float32)}, ["'rope_freqs.weight'", "(7,)", "(8,)"]),
        ({"rope_freqs.weight": np.zeros(8, np.float32)}, ["'rope_freqs.weight'", "0.0", "positive"]),
    ],
)
def test_missing_extra_and_misshapen_tensors(tmp_path, tensors, words):
    refuses(write_tiny_gguf(tmp_path / "model.gguf", tensors=tensors), *words)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damage_is_a_sentence_or_harmless(tmp_path_factory, tiny_path, data):
    content = bytearray(tiny_path.read_bytes())
    header = content.index(b"blk.1.ffn_down.weight") + 64
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content[: data.draw(st.sampled_from([None, header // 2, -1]))])
    with contextlib.suppress(CheckpointError):
        open_checkpoint(path).tokenizer().decode(range(10))
