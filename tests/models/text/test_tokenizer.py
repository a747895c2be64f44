"""Text to ids and back: round trips, special tokens, and the streaming detokeniser."""

import copy

import pytest
from helpers.tiny_gguf import TOKENS, write_tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from twinmesh.models.checkpoints.open import open_checkpoint

IDS = st.lists(st.integers(0, len(TOKENS) - 1), max_size=40)
TEXT = st.text() | st.text(st.sampled_from("<|im_start>d7 \n\tthe é日👋")).map(lambda text: text + "<|im_end|>")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.tokenizer()


@settings(deadline=None)
@given(TEXT)
def test_any_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@settings(deadline=None, max_examples=300)
@given(st.lists(IDS, max_size=10), st.booleans())
def test_streaming_in_any_pieces_equals_decoding_at_once(tokenizer, pieces, skip_special):
    stream, ids, text = tokenizer.stream(skip_special), [], ""
    for piece in pieces:
        ids, text = ids + piece, text + stream.push(piece)
        assert tokenizer.decode(ids, skip_special).startswith(text)
    assert text + stream.finish() == tokenizer.decode(ids, skip_special)


@settings(deadline=None, max_examples=300)
@given(IDS, st.booleans())
def test_decoding_equals_the_library(tokenizer, ids, skip_special):
    tokenizer.backend.decoder = decoders.ByteLevel()
    assert tokenizer.decode(ids, skip_special) == tokenizer.backend.decode(ids, skip_special_tokens=skip_special)


def test_a_character_of_several_tokens_comes_out_whole(tokenizer):
    ids = tokenizer.encode("é👋")
    stream = tokenizer.stream()
    assert [stream.push([i]) for i in ids] == ["", "é", "", "", "", "👋"]
    assert stream.finish() == ""


def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    stream = tokenizer.stream()
    assert stream.push(tokenizer.encode("👋")[:3]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_digits_stand_alone_and_merges_apply(tokenizer):
    assert [TOKENS[i] for i in tokenizer.encode("the the 12")] == ["t", "he", "Ġthe", "Ġ", "1", "2"]


def test_special_tokens_become_their_ids_and_look_alikes_do_not(tokenizer):
    assert tokenizer.encode("<|im_start|><think><|im_end|>") == [1, 274, 2]
    assert not {0, 1, 2, 274} & set(tokenizer.encode("<|im_start |><|im_end<|endoftext|<THINK>"))


def test_control_tokens_are_skipped_and_user_defined_ones_kept(tokenizer):
    assert tokenizer.decode([1, 274, 2]) == "<think>"
    assert tokenizer.decode([1, 274, 2], skip_special=False) == "<|im_start|><think><|im_end|>"
    assert tokenizer.decode([1, 274, 2], skip_special_tokens=False) == "<|im_start|><think><|im_end|>"
    assert tokenizer.decode([1, 274, 2], skip_special_tokens=True) == "<think>"


def test_special_tokens_have_ids_by_their_names(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_end_ids_include_endoftext(tokenizer):
    assert tokenizer.eos_token_ids == {0, 2}
    assert (tokenizer.special.bos, tokenizer.special.eos) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.vocab_size == len(TOKENS)


def test_bos_comes_first_where_the_model_wants_it(tmp_path):
    path = write_tiny_gguf(tmp_path / "bos.gguf", metadata={"tokenizer.ggml.add_bos_token": True})
    tokenizer = open_checkpoint(path).tokenizer()
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special=False)]


def test_ids_past_the_vocabulary_stand_for_nothing_and_negative_ones_are_refused(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a"), len(TOKENS), 10**6]) == "a"
    with pytest.raises(ValueError, match="-1 is negative"):
        tokenizer.decode([-1])


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


def test_a_text_far_longer_than_there_is_room_is_refused_for_its_beginning(tokenizer):
    read = []

    class Backend:
        def encode(self, text, add_special_tokens):
            read.append(len(text))
            return tokenizer.backend.encode(text, add_special_tokens=add_special_tokens)

    watched = copy.copy(tokenizer)
    watched.backend = Backend()
    with pytest.raises(ValueError, match="has 1000000 characters, and 64 tokens is the most"):
        watched.encode("ab" * 500_000, at_most=64)
    assert read == [16 * 64]


def test_a_long_text_of_few_tokens_is_encoded(tokenizer):
    text = "<|im_start|>" * 100
    assert tokenizer.encode(text, add_special=False, at_most=60) == tokenizer.encode(text, add_special=False)
