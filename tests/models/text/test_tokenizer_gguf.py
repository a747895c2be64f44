"""What GGUF's metadata say about a tokenizer: special tokens, ends of a generation, padding, and what is refused."""

import pytest
from helpers.tiny_gguf import MERGES, TOKEN_TYPES, TOKENIZER, TOKENS
from twinmesh.models.errors import CheckpointError
from twinmesh.models.text.tokenizer_gguf import merges_from_scores, tokenizer_from_gguf

LAST = len(TOKENS)


def build(*more, base=TOKENIZER, **changes):
    """The tiny tokenizer with `more` (token, type) at its end and `changes` of keys; None leaves one out."""
    lists = {"tokens": [token for token, _ in more], "token_type": [kind for _, kind in more]}
    metadata = dict(base)
    for key, extra in lists.items():
        metadata[f"tokenizer.ggml.{key}"] = [*base[f"tokenizer.ggml.{key}"], *extra]
    metadata |= {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return tokenizer_from_gguf({key: value for key, value in metadata.items() if value is not None})


def test_special_tokens_end_a_generation_by_name_or_by_text():
    more = [("<|eot_id|>", 3), ("<|end|>", 4), ("</s>", 4), ("<eom>", 3), ("<eot>", 3), ("<end_of_turn>", 1)]
    tokenizer = build(*more, eom_token_id=LAST + 3, eot_token_id=LAST + 4)
    assert tokenizer.eos_token_ids == {0, 2, LAST, LAST + 1, LAST + 3, LAST + 4}
    assert tokenizer.decode([LAST + 1, LAST + 2]) == "</s>"


def test_a_message_s_end_does_not_end_a_generation_where_calls_and_returns_do():
    more = [("<|end|>", 3), ("<|return|>", 3), ("<|call|>", 3)]
    assert build(*more).eos_token_ids == {0, 2, LAST + 1, LAST + 2}


def test_tokens_unused_at_the_end_are_padding_of_the_embedding():
    assert build(("[PAD0]", 5), ("[PAD1]", 5)).vocab_size == LAST
    assert build(("[PAD0]", 5), ("<x>", 3)).vocab_size == LAST + 2


def test_bos_and_eos_are_put_where_the_file_says_or_the_rule_does():
    ids = build().encode("a")
    assert build(add_bos_token=True, add_eos_token=True).encode("a") == [1, *ids, 2]
    assert build(add_bos_token=None, pre="llama-bpe").encode("a") == [1, *ids]
    assert build(add_bos_token=None).encode("a") == ids
    assert build(add_bos_token=True, bos_token_id=None).encode("a") == ids
    assert build(pre=None).encode("a") == ids


def test_unknown_padding_and_missing_names():
    tokenizer = build(unknown_token_id=0, padding_token_id=2)
    assert (tokenizer.special.unk, tokenizer.special.pad) == ("<|endoftext|>", "<|im_end|>")
    assert (build(eos_token_id=None).special.eos, build().special.unk) == (None, None)


def test_sentencepiece_models_have_llama_s_ids_where_the_file_is_silent(tiny_spm):
    tokenizer = tokenizer_from_gguf(tiny_spm)
    names = (tokenizer.special.unk, tokenizer.special.bos, tokenizer.special.eos)
    assert names == ("<0-unk>", "<1-bos>", "<2-eos>")
    assert tokenizer.encode("a")[0] == 1
    assert tokenizer.eos_token_ids == {2}


def test_a_space_is_put_first_and_behind_special_tokens_and_taken_away_again(tiny_spm):
    tokenizer = tokenizer_from_gguf(tiny_spm)
    a = tokenizer.encode("a", add_special=False)
    assert [tokenizer.backend.id_to_token(i) for i in a] == ["▁a"]
    assert tokenizer.encode("a<2-eos>a", add_special=False) == [*a, 2, *a]
    assert tokenizer.decode([*a, 2, *a]) == "a a"
    without = tokenizer_from_gguf(tiny_spm | {"tokenizer.ggml.add_space_prefix": False})
    assert [without.backend.id_to_token(i) for i in without.encode("a", add_special=False)] == ["a"]
    assert without.decode(a) == " a"
    assert tokenizer.encode("", add_special=False) == []


def test_text_that_goes_on_after_other_text_gets_no_space_of_its_own(tiny_spm):
    tokenizer = tokenizer_from_gguf(tiny_spm)
    for text in ("a", " a", "  a", "\na", "\n", "é b", ""):
        assert tokenizer.decode([tokenizer.encode("x")[-1], *tokenizer.encode_after(text)]) == "x" + text
    assert build().encode_after(" a") == build().encode(" a", add_special=False)


def test_phi_3_s_special_tokens_take_the_white_space_behind_them(tiny_spm):
    more = [("<|user|>", 3), ("<|endoftext|>", 3)]
    base = tiny_spm | {"tokenizer.ggml.scores": [*tiny_spm["tokenizer.ggml.scores"], 0.0, 0.0]}
    user = len(tiny_spm["tokenizer.ggml.tokens"])
    phi, other = (build(*more, base=base, **{"general.name": name}) for name in ("Phi-3 mini", "Llama"))
    a = phi.encode("a", add_special=False)
    assert phi.encode("<|user|>\n \ta", add_special=False) == [user, *a]
    assert other.encode("<|user|>\n \ta", add_special=False) != [user, *a]
    assert phi.encode("<|endoftext|>\na") == other.encode("<|endoftext|>\na")


def test_merges_follow_scores_and_then_the_longest_left_side():
    tokens, scores = ["a", "b", "ab", "aa", "aab", "x-"], [0.0, 0.0, -2.0, -1.0, -3.0, 0.0]
    assert merges_from_scores(tokens, scores) == [("a", "a"), ("a", "b"), ("aa", "b"), ("a", "ab")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "t5"}, ["Tokenizer model 't5'", "'gpt2'", "'llama'"]),
        ({"model": None}, ["Tokenizer model None"]),
        ({"pre": "other"}, ["Pre-tokenizer 'other'", "'llama-bpe'", "'qwen2'", "'tekken'"]),
        ({"model": "llama"}, ["tokenizer.ggml.scores"]),
        ({"model": "llama", "scores": [0.0] * LAST}, ["no token <0x00>"]),
        ({"model": "llama", "scores": [0.0]}, ["1 scores"]),
        ({"tokens": [*TOKENS[:-1], TOKENS[0]]}, ["'<|endoftext|>' more than once"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens"]),
        ({"token_type": TOKEN_TYPES[:-1]}, [f"{LAST} tokens", f"{LAST - 1} token types"]),
        ({"merges": [*MERGES, "a b c"]}, ["merge 'a b c'"]),
        ({"bos_token_id": -1}, ["bos_token_id = -1"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(changes, words):
    with pytest.raises(CheckpointError) as caught:
        build(**changes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
