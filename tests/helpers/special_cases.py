"""Directories that name special tokens in one place or another, and what to ask their tokenizers.

    write_special_case(path, CASES["sep_token"])

`abc` is a word of the vocabulary; `added` lists what tokenizer.json adds to it. Also run with transformers, in
`tests/make_special_fixtures.py`: no import of twinmesh here.
"""

import json
from dataclasses import dataclass, field

from helpers.tiny_gguf import byte_characters
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

TEXTS = ["xabcy", "x abc y", " abc ", "abcabc", "xabc\n y", "zabc", "<s>abc<t>"]
MERGES = [("a", "b"), ("ab", "c")]
TOKENS = ["<s>", "</s>", "<t>", *byte_characters().values(), "ab", "abc"]
ABC = TOKENS.index("abc")


@dataclass(frozen=True)
class SpecialCase:
    """What the files of a directory say."""

    config: dict  # tokenizer_config.json, besides bos_token and eos_token
    files: dict = field(default_factory=dict)  # further files by name
    added: tuple = ()  # tokens that tokenizer.json adds besides <s> and </s>: content and flags


def _flags(content="abc", **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False} | flags


def _decoder(index=ABC, **flags):
    return {"added_tokens_decoder": {str(index): _flags(**flags)}}


def _map(**names):
    return {"special_tokens_map.json": names}


PLAIN = ({"content": "abc", "special": False, "normalized": False},)
SPECIAL = ({"content": "abc", "special": True, "normalized": False},)
STRIPPING = ({"content": "abc", "special": True, "normalized": False, "rstrip": True},)
LISTED = {"additional_special_tokens": ["abc"]}
OBJECT = {"__type": "AddedToken", **_flags(special=True)}

CASES = {
    "nothing": SpecialCase({}),
    # Names in tokenizer_config.json.
    "sep_token": SpecialCase({"sep_token": "abc"}),
    "cls_token": SpecialCase({"cls_token": "abc"}),
    "mask_token": SpecialCase({"mask_token": "abc"}),
    "unk_token": SpecialCase({"unk_token": "abc"}),
    "pad_token": SpecialCase({"pad_token": "abc"}),
    "bos_token": SpecialCase({"bos_token": "abc"}),
    "a name of the model's own": SpecialCase({"image_token": "abc"}),
    "a name of the model's own, as an object": SpecialCase({"image_token": OBJECT}),
    "a name that ends otherwise": SpecialCase({"image_word": "abc"}),
    "a name that is null": SpecialCase({"sep_token": None, "image_token": None}),
    "a name as an object": SpecialCase({"mask_token": OBJECT | {"lstrip": True}}),
    "a name that is no token": SpecialCase({"sep_token": "</s>", "cls_token": "<s>"}),
    "additional_special_tokens": SpecialCase(LISTED),
    "additional_special_tokens, several": SpecialCase({"additional_special_tokens": ["<t>", "abc", "<s>"]}),
    "additional_special_tokens, objects": SpecialCase({"additional_special_tokens": [OBJECT | {"rstrip": True}]}),
    "additional_special_tokens, none": SpecialCase({"additional_special_tokens": []}),
    "extra_special_tokens": SpecialCase({"extra_special_tokens": ["abc"]}),
    "extra_special_tokens by name": SpecialCase({"extra_special_tokens": {"turn": "abc", "tool_token": "<t>"}}),
    "extra_special_tokens before additional ones": SpecialCase(LISTED | {"extra_special_tokens": ["<t>"]}),
    "empty extra_special_tokens beside additional ones": SpecialCase(LISTED | {"extra_special_tokens": []}),
    # special_tokens_map.json.
    "map, sep_token": SpecialCase({}, _map(sep_token="abc")),
    "map, object": SpecialCase({}, _map(cls_token=_flags(rstrip=True))),
    "map, additional": SpecialCase({}, _map(additional_special_tokens=["abc"])),
    "map, extra": SpecialCase({}, _map(extra_special_tokens=["abc"])),
    "map, extra by name": SpecialCase({}, _map(extra_special_tokens={"turn": "abc"})),
    "map, a name of the model's own": SpecialCase({}, _map(image_token="abc")),
    "map over the configuration": SpecialCase({"sep_token": "abc"}, _map(sep_token="<t>")),
    "map beside a list in the configuration": SpecialCase(
        {"additional_special_tokens": ["<t>"]}, _map(additional_special_tokens=["abc"])
    ),
    "map and added_tokens_decoder": SpecialCase(_decoder(2, content="<t>", special=True), _map(sep_token="abc")),
    "map and an empty added_tokens_decoder": SpecialCase({"added_tokens_decoder": {}}, _map(sep_token="abc")),
    # Tokens that tokenizer.json adds.
    "added as plain": SpecialCase({}, added=PLAIN),
    "added as special": SpecialCase({}, added=SPECIAL),
    "eos_token, added as plain": SpecialCase({"eos_token": "abc"}, added=PLAIN),
    "sep_token, added with rstrip": SpecialCase({"sep_token": "abc"}, added=STRIPPING),
    "image_token, added as plain": SpecialCase({"image_token": "abc"}, added=PLAIN),
    "additional_special_tokens, added as plain": SpecialCase(LISTED, added=PLAIN),
    "map, additional, added as plain": SpecialCase({}, _map(additional_special_tokens=["abc"]), added=PLAIN),
    # added_tokens_decoder.
    "decoder, special": SpecialCase(_decoder(special=True)),
    "decoder, plain": SpecialCase(_decoder(special=False)),
    "decoder, normalized": SpecialCase(_decoder(special=False, normalized=True)),
    "decoder, lstrip": SpecialCase(_decoder(special=True, lstrip=True)),
    "decoder, single_word": SpecialCase(_decoder(special=False, single_word=True)),
    "decoder, rstrip over tokenizer.json": SpecialCase(_decoder(special=False, rstrip=True), added=PLAIN),
    "decoder, lstrip over a special one": SpecialCase(_decoder(special=True, lstrip=True), added=SPECIAL),
    "decoder, special over plain": SpecialCase(_decoder(special=True), added=PLAIN),
    "decoder, plain over special": SpecialCase(_decoder(special=False), added=SPECIAL),
    "decoder without rstrip over one with": SpecialCase(_decoder(special=True), added=STRIPPING),
    "decoder, a new token": SpecialCase(_decoder(len(TOKENS), content="zab", special=True)),
    "decoder and eos_token": SpecialCase(_decoder(special=False, rstrip=True) | {"eos_token": "abc"}, added=PLAIN),
    # added_tokens.json.
    "added_tokens.json": SpecialCase({}, {"added_tokens.json": {"abc": ABC}}),
    "added_tokens.json, special by name": SpecialCase({"sep_token": "abc"}, {"added_tokens.json": {"abc": ABC}}),
    "added_tokens.json, special by list": SpecialCase(LISTED, {"added_tokens.json": {"abc": ABC}}),
    "added_tokens.json beside tokenizer.json": SpecialCase({}, {"added_tokens.json": {"abc": ABC}}, added=STRIPPING),
    "added_tokens.json, a new token": SpecialCase({}, {"added_tokens.json": {"zab": len(TOKENS)}}),
}


def write_special_case(path, case):
    """Write tokenizer.json, tokenizer_config.json and the case's files into the directory `path`."""
    backend = Backend(models.BPE({token: i for i, token in enumerate(TOKENS)}, MERGES))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    for token in case.added:
        backend.add_tokens([AddedToken(**token)])
    backend.save(str(path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name, content in ({"tokenizer_config.json": names | case.config} | case.files).items():
        (path / name).write_text(json.dumps(content))
