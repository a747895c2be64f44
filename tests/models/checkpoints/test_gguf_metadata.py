"""GGUF metadata that llama.cpp reads although they say things twice, wrongly or not at all.

llama.cpp b11739 opens each of these files and gives the logits, bit for bit, and the token ids of the plain one.
"""

import gguf
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.tiny_gguf import MERGES, TOKEN_TYPES, TOKENS, write_tiny_gguf
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.errors import CheckpointError

ABSENT = 2**32 - 1
SPECIAL = ("bos", "eos", "unknown", "padding", "seperator", "cls", "mask", "eot", "eom")
READ = {
    "rope factor 0": {"llama.rope.scaling.factor": 0.0},
    "rope factor 0 of a type": {"llama.rope.scaling.factor": 0.0, "llama.rope.scaling.type": "linear"},
    "rope factor 0 under its former name": {"llama.rope.scale_linear": 0.0},
    "rope factor 0 before its former name": {"llama.rope.scaling.factor": 0.0, "llama.rope.scale_linear": 4.0},
    "other scales of 0": {
        f"llama.{key}": 0.0 for key in ("logit_scale", "embedding_scale", "residual_scale", "attention.scale")
    },
    "vocabulary size too small": {"llama.vocab_size": 270},
    "vocabulary size too large": {"llama.vocab_size": 32000},
    "no vocabulary size": {"llama.vocab_size": None},
    "no token types": {"tokenizer.ggml.token_type": None},
    "more token types than tokens": {"tokenizer.ggml.token_type": [*TOKEN_TYPES, 1, 3]},
    "scores of byte-level tokens": {"tokenizer.ggml.scores": [0] * len(TOKENS)},
    "heads of each layer": {"llama.attention.head_count": [6, 6]},
    "key-value heads of each layer": {"llama.attention.head_count_kv": [2, 2]},
    "inner size of each layer": {"llama.feed_forward_length": [80, 80]},
    "all of each layer": {
        "llama.attention.head_count": [6, 6],
        "llama.attention.head_count_kv": [2, 2],
        "llama.feed_forward_length": [80, 80],
    },
    "no special token": {f"tokenizer.ggml.{name}_token_id": ABSENT for name in SPECIAL},
    "padding past the last token": {"tokenizer.ggml.padding_token_id": len(TOKENS)},
    "no rotary base": {"llama.rope.freq_base": None},
    "merges twice": {"tokenizer.ggml.merges": [*MERGES, MERGES[3], MERGES[0]]},
    "no experts": {"llama.expert_count": 0},
    "no name": {"general.name": None},
}
TEXTS = ["the he", "on and off<|im_end|>", "<think> the 12"]


@pytest.mark.parametrize("case", READ)
def test_what_llama_cpp_reads_opens_as_the_plain_file_does(tmp_path, tiny, case):
    checkpoint = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", metadata=READ[case]))
    assert checkpoint.config == tiny.config
    for text in TEXTS[: 2 if case == "no token types" else 3]:
        assert checkpoint.tokenizer().encode(text) == tiny.tokenizer().encode(text)
    assert checkpoint.tokenizer().vocab_size == len(TOKENS)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.attention.head_count_kv": [2, 1]}, ["attention.head_count_kv = [2, 1]", "the same 2 times"]),
        ({"llama.attention.head_count": [6, 6, 6]}, ["attention.head_count = [6, 6, 6]", "the same 2 times"]),
        ({"llama.feed_forward_length": [80]}, ["feed_forward_length = [80]"]),
        ({"llama.attention.head_count": [0, 0]}, ["attention.head_count = 0", "positive"]),
        ({"llama.feed_forward_length": [80.0, 80.0]}, ["feed_forward_length = 80.0", "integer"]),
        ({"llama.rope.scaling.factor": -1.0}, ["rope.scaling.factor = -1.0", "positive"]),
    ],
)
def test_layers_that_differ_and_other_numbers_are_refused(tmp_path, metadata, words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata))
    assert all(word in str(caught.value) for word in words), caught.value


WORDS = "M\u00fcller"


@pytest.mark.parametrize(
    "key", ["general.name", "general.author", "general.description", "general.license", "llama.comment", "x.y"]
)
def test_texts_in_another_encoding_do_not_matter(tmp_path, tiny, key):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", metadata={key: WORDS})
    path.write_bytes(path.read_bytes().replace(WORDS.encode(), b"M\xfcller "))  # Latin 1, of the same length
    assert b"M\xfcller" in path.read_bytes()
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == tiny.config
    assert checkpoint.tokenizer().encode(TEXTS[0]) == tiny.tokenizer().encode(TEXTS[0])


@pytest.mark.parametrize(
    "names",
    [
        ["output_norm.weight"],
        ["blk.0.attn_norm.weight"],
        ["blk.1.ffn_norm.weight"],
        ["output_norm.weight", "blk.0.ffn_norm.weight", "blk.1.attn_norm.weight"],
        ["token_embd.weight"],
        ["blk.0.attn_q.weight", "blk.1.ffn_down.weight"],
    ],
)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_dimensions_of_1_may_be_written_or_left_out(tmp_path, tiny, names, dimensions):
    plain = write_tiny_gguf(tmp_path / "plain.gguf")
    arrays = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(plain).tensors}
    tensors = {name: arrays[name].reshape((1,) * dimensions + arrays[name].shape) for name in names}
    found = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", tensors=tensors))
    assert found.config == tiny.config
    for path, leaf in load_on_one_device(found, np.float32).items():
        np.testing.assert_array_equal(leaf, load_on_one_device(tiny, np.float32)[path])
