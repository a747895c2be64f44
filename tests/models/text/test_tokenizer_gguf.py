"""What GGUF's metadata say about a tokenizer: special tokens, ends of a generation, padding, and what is refused."""

import pytest
from helpers.tiny_gguf import MERGES, TOKEN_TYPES, TOKENIZER, TOKENS
from twinmesh.models.errors import CheckpointError
from twinmesh.models.text.chat import ChatTemplate
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
    assert tokenizer.eos_token_ids == {0, 2, LAST, LAST + 1, LAST + 3, LAST + 4, LAST + 5}
    assert tokenizer.decode([LAST + 1, LAST + 2]) == "</s>"


CONTROL_LOOKING = [
    *(("<|fim_prefix|>", 4), ("<|fim_suffix|>", 1), ("<|fim_pad|>", 1), ("<tool_call>", 4), ("<|eom_id|>", 1)),
    *(("<|box|>", 3), ("<|im", 4), ("[PAD300]", 5), ("<|repo_name|>", 1)),
]


# By llama.cpp b11739, with special tokens parsed.
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<|fim_suffix|>", ["<|fim_suffix|>"]),
        ("the<|fim_suffix|> on<|fim_pad|>", ["t", "he", "<|fim_suffix|>", "Ġ", "on", "<|fim_pad|>"]),
        (" <|eom_id|> ", ["Ġ", "<|eom_id|>", "Ġ"]),
        ("<|fim_suffix|", ["<", "|", "f", "i", "m", "_", "s", "u", "f", "f", "i", "x", "|"]),
        ("<|im_end|><|im_<|im_start|>", ["<|im_end|>", "<|im", "_", "<|im_start|>"]),
        ("<|box|>\n\n<|box|> 12", ["<|box|>", "Ċ", "Ċ", "<|box|>", "Ġ", "1", "2"]),
        ("<tool_call>\n{}", ["<tool_call>", "Ċ", "{", "}"]),
        ("[PAD300]<|repo_name|>x", ["[", "P", "A", "D", "3", "0", "0", "]", "<|repo_name|>", "x"]),
        ("<|PAD|>\u0301<|fim_pad|>\u0301", ["<", "|", "P", "A", "D", "|", ">", "Ì", "ģ", "<|fim_pad|>", "Ì", "ģ"]),
        ("é<|eom_id|>é", ["Ã", "©", "<|eom_id|>", "Ã", "©"]),
    ],
)
def test_texts_that_hold_the_spelling_of_a_control_token_whatever_its_type(text, tokens):
    tokenizer = build(*CONTROL_LOOKING, pre="qwen2")
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)] == tokens


def test_where_spellings_overlap_the_first_in_the_text_counts():
    ids = build(("xy<", 4)).encode("xy<|im_end|>")  # llama.cpp: x, y, <|im_end|>
    assert (ids[0], ids[1:]) == (LAST, build().encode("|im_end|>"))


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


ABSENT = 2**32 - 1


@pytest.mark.parametrize("absent", [ABSENT, LAST, LAST + 7, -1])
def test_an_id_that_is_no_token_s_means_that_the_file_does_not_say(tiny_spm, absent):
    names = ("bos", "eos", "unknown", "padding", "seperator", "cls", "mask", "eot", "eom")
    tokenizer = build(**{f"{name}_token_id": absent for name in names}, add_bos_token=True)
    assert (tokenizer.special.standard, tokenizer.special.others) == ({}, {})
    assert tokenizer.eos_token_ids == {0, 2}  # by their texts
    assert tokenizer.encode("the he") == build().encode("the he")
    llama = build(base=tiny_spm, bos_token_id=ABSENT, eos_token_id=len(tiny_spm["tokenizer.ggml.tokens"]))
    assert llama.special == tokenizer_from_gguf(tiny_spm).special


def test_without_types_all_tokens_are_ordinary_but_those_that_are_ends():
    tokenizer = build(token_type=None)
    assert tokenizer.encode("the he<|im_end|>") == build().encode("the he<|im_end|>")
    assert len(tokenizer.encode("<|im_start|>")) == len("<|im_start|>")
    assert tokenizer.eos_token_ids == {0, 2}
    assert build(("</s>", 1)).eos_token_ids == {0, 2, LAST}


def test_lists_may_be_longer_than_the_tokens_and_scores_whole_numbers(tiny_spm):
    assert build(token_type=[*TOKEN_TYPES, 3, 3]).encode("the he") == build().encode("the he")
    scores = [int(1000 * score) for score in tiny_spm["tokenizer.ggml.scores"]]
    assert build(base=tiny_spm, scores=[*scores, 0]).encode("a b") == tokenizer_from_gguf(tiny_spm).encode("a b")


def test_of_a_merge_that_is_there_twice_the_first_counts():
    twice = build(merges=[*MERGES, MERGES[1], MERGES[0]])
    assert twice.encode("the the he the") == build().encode("the the he the")


def test_further_special_tokens_have_their_names_in_templates():
    tokenizer = build(seperator_token_id=0, cls_token_id=1, mask_token_id=LAST - 1, padding_token_id=2)
    template = "{{ sep_token }} {{ cls_token }} {{ mask_token }} {{ pad_token }} {{ unk_token is defined }}"
    text = ChatTemplate(template, tokenizer, name="tiny").render([{"role": "user", "content": "x"}])
    assert text == "<|endoftext|> <|im_start|> <think> <|im_end|> False"


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
        ({"model": "llama", "scores": [0.0]}, ["1 in tokenizer.ggml.scores"]),
        ({"tokens": [*TOKENS[:-1], TOKENS[0]]}, ["'<|endoftext|>' more than once"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens"]),
        ({"token_type": TOKEN_TYPES[:-1]}, [f"{LAST} tokens", f"{LAST - 1} in tokenizer.ggml.token_type"]),
        ({"merges": [*MERGES, "a b c"]}, ["merge 'a b c'"]),
        ({"model": "llama", "scores": ["0"] * LAST}, ["tokenizer.ggml.scores"]),
        ({"bos_token_id": 1.0}, ["bos_token_id = 1.0"]),
        ({"eos_token_id": True}, ["eos_token_id = True"]),
        ({"cls_token_id": "<s>"}, ["cls_token_id = '<s>'"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(changes, words):
    with pytest.raises(CheckpointError) as caught:
        build(**changes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
