"""Tokenizers from the files of a directory: which file says what, round trips, and what is refused."""

import json

import pytest
from helpers.awkward_texts import awkward_texts
from helpers.tiny_gguf import CHAT_TEMPLATE, MERGES, TOKENIZER, TOKENS
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from twinmesh.models.errors import CheckpointError
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.chat_files import chat_template_from_directory
from twinmesh.models.text.tokenizer_files import save_tokenizer, tokenizer_from_directory
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

VOCAB = {token: i for i, token in enumerate(TOKENS)}
PAIRS = [tuple(merge.split(" ")) for merge in MERGES]


def backend(*special, bos=None):
    """A small byte-level tokenizer as `tokenizers` writes it, as yet without any tokens added but `special`."""
    made = Backend(models.BPE(VOCAB, PAIRS))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if bos is not None:
        made.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, VOCAB[bos])])
    return made


def directory(path, made=None, **files):
    """A directory with `made` as tokenizer.json; `files` are contents by name without ".json"."""
    if made is not None:
        made.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refuses(path, *words):
    with pytest.raises(CheckpointError) as caught:
        tokenizer_from_directory(path)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def same(one, other):
    for text in awkward_texts():
        for add_special in (True, False):
            ids = one.encode(text, add_special=add_special)
            assert other.encode(text, add_special=add_special) == ids, text
        assert all(one.decode(ids, skip) == other.decode(ids, skip) for skip in (True, False))
    assert (one.special, one.control_ids, one.vocab_size) == (other.special, other.control_ids, other.vocab_size)
    assert (one.add_bos, one.byte_decoder) == (other.add_bos, other.byte_decoder)


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "tekken", "default"])
def test_a_byte_level_tokenizer_from_gguf_survives_saving(tmp_path, pre):
    tokenizer = tokenizer_from_gguf(TOKENIZER | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": True})
    save_tokenizer(tokenizer, ChatTemplate(CHAT_TEMPLATE, tokenizer, name="tiny"), tmp_path)
    again = tokenizer_from_directory(tmp_path)
    same(tokenizer, again)
    assert again.add_bos
    assert chat_template_from_directory(tmp_path, again, name="tiny").templates == {"default": CHAT_TEMPLATE}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
def test_a_sentencepiece_tokenizer_from_gguf_survives_saving(tmp_path, tiny_spm, prefix, adds_eos):
    more = {"tokenizer.ggml.add_space_prefix": prefix, "tokenizer.ggml.add_eos_token": adds_eos}
    tokenizer = tokenizer_from_gguf(tiny_spm | more)
    save_tokenizer(tokenizer, ChatTemplate(None, tokenizer, name="tiny"), tmp_path)
    same(tokenizer, tokenizer_from_directory(tmp_path))
    assert tokenizer.encode("a")[0] == 1
    assert (tokenizer.encode("a")[-1] == 2) == adds_eos


def test_padding_and_truncation_in_the_file_are_not_for_prompts(tmp_path):
    made = backend()
    made.enable_truncation(3)
    made.enable_padding(length=9)
    assert len(tokenizer_from_directory(directory(tmp_path, made)).encode("zzzzz")) == 5


def test_a_name_may_be_an_object_or_null(tmp_path):
    config = {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True}, "bos_token": None}
    tokenizer = tokenizer_from_directory(directory(tmp_path, backend("<|im_end|>"), tokenizer_config=config))
    assert (tokenizer.special.eos, tokenizer.special.bos, tokenizer.add_bos) == ("<|im_end|>", None, False)
    assert tokenizer.eos_token_ids == {2}


def test_named_tokens_become_special_and_special_tokens_map_names_them_too(tmp_path):
    path = directory(tmp_path, backend(), special_tokens_map={"eos_token": "<|im_end|>", "pad_token": "<none>"})
    tokenizer = tokenizer_from_directory(path)
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.decode([2]) == ""
    assert (tokenizer.special.pad, tokenizer.vocab_size) == ("<none>", len(TOKENS))


def test_tokens_that_the_configuration_adds_get_their_ids(tmp_path):
    added = {str(len(TOKENS)): {"content": "<new>", "special": True}, "0": {"content": TOKENS[0], "special": True}}
    path = directory(tmp_path, backend(), tokenizer_config={"added_tokens_decoder": added})
    tokenizer = tokenizer_from_directory(path)
    assert tokenizer.encode("<new><|endoftext|>") == [len(TOKENS), 0]
    assert tokenizer.control_ids == {0, len(TOKENS)}
    wrong = {str(len(TOKENS) + 5): {"content": "<new>"}}
    refuses(
        directory(path, tokenizer_config={"added_tokens_decoder": wrong}), "tokenizer_config.json", "'<new>'", "280"
    )


@pytest.mark.parametrize(
    ("bos", "asked", "expected"),
    [("<|im_start|>", False, [1, 3]), (None, True, [1, 3]), (None, False, [3]), (None, None, [3])],
)
def test_a_template_decides_about_bos_and_else_the_configuration(tmp_path, bos, asked, expected):
    made, config = backend("<|im_start|>", bos=bos), {"bos_token": "<|im_start|>", "add_bos_token": asked}
    expected = [*expected[:-1], VOCAB["a"]]
    tokenizer = tokenizer_from_directory(directory(tmp_path, made, tokenizer_config=config))
    assert tokenizer.encode("a") == expected
    assert tokenizer.add_bos == (len(expected) == 2)
    assert tokenizer.encode("a", add_special=False) == [VOCAB["a"]]


def test_embeddings_may_be_padded_and_added_tokens_past_them_cannot_be_used(tmp_path):
    made = backend("<|im_end|>", "<image>")
    config = {"eos_token": "<image>"}
    tokenizer = tokenizer_from_directory(directory(tmp_path, made, tokenizer_config=config))
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (len(TOKENS) + 1, {len(TOKENS)})
    tokenizer.limit(len(TOKENS) + 100)
    assert tokenizer.vocab_size == len(TOKENS) + 1
    tokenizer.limit(len(TOKENS))
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (len(TOKENS), frozenset())
    with pytest.raises(CheckpointError, match=f"has {len(TOKENS)} tokens, the model 100"):
        tokenizer.limit(100)


@pytest.mark.parametrize(("kind", "pre"), [("GPT2Tokenizer", "gpt-2"), ("Qwen2TokenizerFast", "qwen2")])
def test_vocabulary_and_merges_of_a_known_class_are_read(tmp_path, kind, pre):
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    config = {"tokenizer_class": kind, "eos_token": "<|im_end|>"}
    config["added_tokens_decoder"] = {str(VOCAB[t]): {"content": t, "special": True} for t in TOKENS[:3]}
    tokenizer = tokenizer_from_directory(directory(tmp_path, vocab=VOCAB, tokenizer_config=config))
    expected = tokenizer_from_gguf(TOKENIZER | {"tokenizer.ggml.pre": pre})
    for text in awkward_texts():
        if "<think>" not in text:
            assert tokenizer.encode(text) == expected.encode(text)
    refuses(directory(tmp_path, tokenizer_config={"tokenizer_class": "XTokenizer"}), "GPT2Tokenizer", "XTokenizer")


def test_directories_without_a_tokenizer_that_can_be_read_say_so(tmp_path):
    refuses(tmp_path, str(tmp_path), "tokenizer.json is missing")
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    refuses(tmp_path, "tokenizer.model", "save_pretrained")


PANIC = json.loads(backend("<|im_start|>", bos="<|im_start|>").to_str())
PANIC["post_processor"]["single"][0]["SpecialToken"]["id"] = "<|im_stort|>"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer": "{"}, ["tokenizer.json"]),
        ({"tokenizer": "[]"}, ["tokenizer.json"]),
        # `tokenizers` panics over a template whose special token it does not know, once it is used.
        ({"tokenizer": PANIC}, ["tokenizer.json is damaged"]),
        ({"tokenizer_config": "{"}, ["tokenizer_config.json"]),
        ({"tokenizer_config": "[1]"}, ["tokenizer_config.json"]),
        ({"tokenizer_config": {"bos_token": 3}}, ["tokenizer_config.json", "bos_token"]),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, ["tokenizer_config.json", "added_tokens_decoder"]),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, ["tokenizer_config.json", "added_tokens_decoder"]),
        ({"special_tokens_map": "no"}, ["special_tokens_map.json"]),
        ({"generation_config": {"eos_token_id": "</s>"}}, ["generation_config.json", "eos_token_id", "'</s>'"]),
        ({"config": {"eos_token_id": [1, -2]}}, ["config.json", "eos_token_id"]),
        ({"generation_config": "{", "config": {"eos_token_id": 1}}, ["generation_config.json"]),
    ],
)
def test_damaged_files_are_named(tmp_path, files, words):
    refuses(directory(tmp_path, backend(), **files), str(tmp_path), *words)
