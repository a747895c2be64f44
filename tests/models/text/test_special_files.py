"""Which tokens of a directory are special, by which names, and which end a generation; and damaged files."""

import json

import pytest
from helpers.special_cases import ABC, CASES, TEXTS, TOKENS, SpecialCase, write_special_case
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twinmesh.models.errors import CheckpointError
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.chat_files import chat_template_from_directory
from twinmesh.models.text.tokenizer_files import save_tokenizer, tokenizer_from_directory


@pytest.fixture(scope="module")
def expected(fixtures):
    return json.loads((fixtures / "special_tokens.json").read_text())["cases"]


def tokenizer_of(path, config=None, /, **files):
    """The tokenizer of a directory with these settings and further files, by name without ".json"."""
    write_special_case(path, SpecialCase(config or {}, {f"{name}.json": content for name, content in files.items()}))
    return tokenizer_from_directory(path)


def said_of(tokenizer):
    """What a tokenizer says of the texts, as the fixture has it."""
    ids = [tokenizer.encode(text, add_special=False) for text in TEXTS]
    names = tokenizer.special.standard | tokenizer.special.others
    return {"ids": ids, "texts": [*map(tokenizer.decode, ids)], "abc": tokenizer.decode([ABC]), "names": names}


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_are_those_of_transformers(tmp_path, expected, name):
    write_special_case(tmp_path, CASES[name])
    assert said_of(tokenizer_from_directory(tmp_path)) == expected[name]


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_and_their_names_survive_saving(tmp_path, expected, name):
    write_special_case(tmp_path, CASES[name])
    tokenizer, copy = tokenizer_from_directory(tmp_path), tmp_path / "copy"
    copy.mkdir()
    save_tokenizer(tokenizer, ChatTemplate(None, tokenizer, name="tiny"), copy)
    again = tokenizer_from_directory(copy)
    assert said_of(again) == expected[name]
    assert again.eos_token_ids == tokenizer.eos_token_ids


def test_a_name_that_is_no_token_is_a_name_only(tmp_path):
    tokenizer = tokenizer_of(tmp_path, {"sep_token": "[SEP]", "additional_special_tokens": ["[X]"]})
    assert tokenizer.special.others == {"sep_token": "[SEP]"}
    assert tokenizer.vocab_size == len(TOKENS)
    assert len(tokenizer.encode("[SEP][X]", add_special=False)) == len("[SEP][X]")


END, OTHER, THIRD = TOKENS.index("</s>"), TOKENS.index("B"), TOKENS.index("C")


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": OTHER}, {"eos_token_id": THIRD}, {END, THIRD}),
        ({"eos_token_id": OTHER}, {"eos_token_id": [THIRD, END]}, {END, THIRD}),
        ({"eos_token_id": OTHER}, None, {END}),
        ({"eos_token_id": OTHER}, {}, {END}),
        ({"eos_token_id": [OTHER, THIRD]}, {"eos_token_id": None}, {END}),
        ({"text_config": {"eos_token_id": OTHER}}, {"eos_token_id": []}, {END}),
        (None, {"eos_token_id": [THIRD, None]}, {END, THIRD}),
    ],
)
def test_a_generation_ends_where_generation_config_and_the_tokenizer_say(tmp_path, config, generation, ends):
    files = {"config": config, "generation_config": generation}
    tokenizer = tokenizer_of(tmp_path, **{name: content for name, content in files.items() if content is not None})
    assert tokenizer.eos_token_ids == ends


@pytest.mark.parametrize("eos", [None, "<none>"])
@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": OTHER}, {}, {OTHER}),
        ({"eos_token_id": [OTHER, THIRD]}, {"eos_token_id": None}, {OTHER, THIRD}),
        ({"text_config": {"eos_token_id": [OTHER]}, "eos_token_id": THIRD}, {"eos_token_id": []}, {OTHER, THIRD}),
        ({"eos_token_id": OTHER}, {"eos_token_id": THIRD}, {THIRD}),
        ({}, {}, set()),
    ],
)
def test_config_json_counts_only_where_nothing_else_names_an_end(tmp_path, eos, config, generation, ends):
    assert tokenizer_of(tmp_path, {"eos_token": eos}, config=config, generation_config=generation).eos_token_ids == ends


@pytest.mark.parametrize(
    ("config", "template", "text"),
    [
        ({"sep_token": "<t>", "cls_token": "abc"}, "{{ bos_token }}|{{ sep_token }}|{{ cls_token }}", "<s>|<t>|abc"),
        ({"mask_token": "[MASK]"}, "{{ mask_token }}{{ eos_token }}", "[MASK]</s>"),
        ({"extra_special_tokens": {"turn": "<t>"}}, "{{ turn }}.", "<t>."),
        ({"image_token": "abc"}, "{{ image_token }}{{ audio_token }}.", "abc."),
        ({"pad_token": "abc"}, "{{ pad_token is defined }} {{ unk_token is defined }}", "True False"),
        ({"bos_token": None}, "{% if bos_token %}b{% else %}-{% endif %}{{ eos_token }}", "-</s>"),
        ({"extra_special_tokens": ["abc"]}, "{{ extra_special_tokens is defined }}", "False"),
    ],
)
def test_templates_have_every_name(tmp_path, config, template, text):
    tokenizer = tokenizer_of(tmp_path, config)
    (tmp_path / "chat_template.jinja").write_text(template)
    made = chat_template_from_directory(tmp_path, tokenizer, name="tiny")
    assert made.render([{"role": "user", "content": "x"}]) == text


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"sep_token": 3}, {}, ["tokenizer_config.json", "sep_token"]),
        ({"image_token": ["<t>"]}, {}, ["tokenizer_config.json", "image_token"]),
        ({"additional_special_tokens": "abc"}, {}, ["tokenizer_config.json", "special tokens"]),
        ({"extra_special_tokens": [1]}, {}, ["tokenizer_config.json", "special token"]),
        ({"extra_special_tokens": {"turn": None}}, {}, ["tokenizer_config.json", "turn"]),
        ({}, {"special_tokens_map": {"cls_token": []}}, ["special_tokens_map.json", "cls_token"]),
        ({}, {"added_tokens": {"zab": 5}}, ["added_tokens.json", "'zab'", "5"]),
        ({}, {"added_tokens": {"zab": "5"}}, ["added_tokens.json", "'zab'"]),
        ({"added_tokens_decoder": {"5": {"content": "zab"}}}, {}, ["tokenizer_config.json", "'zab'", "5"]),
        ({"added_tokens_decoder": {"5": {"content": 5}}}, {}, ["added_tokens_decoder is damaged"]),
    ],
)
def test_damaged_files_are_named(tmp_path, config, files, words):
    with pytest.raises(CheckpointError) as caught:
        tokenizer_of(tmp_path, config, **files)
    assert all(word in str(caught.value) for word in words), caught.value
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


WORDS = st.sampled_from(["abc", "<t>", "<s>", "zab", "", "\ud800", "content", "special", "0", "4", "-1", "259"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
TOKEN = st.fixed_dictionaries(
    {"content": WORDS}, optional={key: st.booleans() | VALUES for key in ("special", "lstrip", "normalized")}
)
NAMES = st.sampled_from(["eos_token", "sep_token", "image_token", "add_bos_token"])
CONFIGS = st.dictionaries(NAMES, VALUES | TOKEN, max_size=2) | st.fixed_dictionaries(
    {},
    optional={
        "additional_special_tokens": VALUES | st.lists(TOKEN, max_size=2),
        "extra_special_tokens": VALUES | st.dictionaries(WORDS, TOKEN, max_size=2),
        "added_tokens_decoder": VALUES | st.dictionaries(WORDS, TOKEN, max_size=2),
        "eos_token_id": VALUES,
    },
)
FILES = ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config"]


@settings(deadline=None, max_examples=300)
@given(files=st.dictionaries(st.sampled_from(FILES), CONFIGS, max_size=3))
@example({"tokenizer_config": {"additional_special_tokens": ["\ud800"]}})
@example({"tokenizer_config": {"eos_token": "a\udfff"}})
@example({"tokenizer_config": {"extra_special_tokens": {"image_token": "\ud800b"}}})
@example({"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "\ud83d"}}}})
@example({"special_tokens_map": {"sep_token": {"content": "\udc00"}}})
@example({"added_tokens": {"\ud800": 7}})
def test_any_json_gives_a_tokenizer_or_one_sentence(tmp_path_factory, files):
    path, said, files = tmp_path_factory.mktemp("any"), None, dict(files)
    write_special_case(path, SpecialCase(files.pop("tokenizer_config", {}), {f"{k}.json": v for k, v in files.items()}))
    try:
        assert tokenizer_from_directory(path).decode([ABC]) in ("abc", "")
    except CheckpointError as error:
        said = str(error)
    assert said is None or (str(path) in said and "\n" not in said)
