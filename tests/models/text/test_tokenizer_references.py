"""500 awkward texts against independent references (see tests/make_tokenizer_fixtures.py), and back."""

import json
import lzma
import unicodedata

import numpy as np
import pytest
from helpers.awkward_texts import awkward_texts
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.errors import CheckpointError
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

TEXTS = awkward_texts()
BYTE_LEVEL = ["default", "gpt-2", "smollm", "falcon", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"]
BYTE_LEVEL += ["deepseek-coder", "deepseek-v3"]


def unpack(fixtures, name):
    """Token ids of each text."""
    stored = np.load(fixtures / "tokenizer_ids.npz")
    return [ids.tolist() for ids in np.split(stored[f"{name}_ids"], np.cumsum(stored[f"{name}_counts"])[:-1])]


def read(fixtures, name):
    return json.loads(lzma.decompress((fixtures / name).read_bytes()))


def metadata(parts, **more):
    keys = {key: parts[key] for key in ("tokens", "token_type", "merges", "scores") if key in parts}
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items()}


@pytest.fixture(scope="module")
def qwen3(fixtures):
    """Qwen3's tokenizer as far as the texts need it, and ids by every rule."""
    return read(fixtures, "tokenizer_qwen3.json.xz")


@pytest.fixture(scope="module")
def spm(fixtures):
    """Two small SentencePiece models and what the sentencepiece library makes of the texts."""
    return read(fixtures, "tokenizer_spm.json.xz")


@pytest.fixture(scope="module")
def gemma3():
    try:
        return open_checkpoint(resolve_model("gemma3-270m")).tokenizer()
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("rule", BYTE_LEVEL)
def test_every_rule_cuts_text_as_llama_cpp_does(qwen3, rule):
    tokenizer = tokenizer_from_gguf(metadata(qwen3, model="gpt2", pre=rule))
    expected = qwen3["ids"][rule]
    for text, ids in zip([*TEXTS, "a wholeword"], expected, strict=True):
        assert tokenizer.encode(text) == ids, text
        original = unicodedata.normalize("NFC", text) if rule in ("qwen2", "qwen35") else text
        assert tokenizer.decode(ids, skip_special=False) == original


@pytest.mark.parametrize(("name", "alias"), [("llama-bpe", "llama3"), ("qwen2", "megrez"), ("gpt-2", "olmo")])
def test_aliases_cut_alike(qwen3, name, alias):
    one, other = (tokenizer_from_gguf(metadata(qwen3, model="gpt2", pre=pre)) for pre in (name, alias))
    texts = [text for text in TEXTS if unicodedata.is_normalized("NFC", text)]
    assert [one.encode(text) for text in texts] == [other.encode(text) for text in texts]


def test_a_rule_that_takes_words_whole_needs_no_merges_for_them(qwen3):
    word = qwen3["tokens"].index("Ġwholeword")
    for rule in BYTE_LEVEL:
        ids = tokenizer_from_gguf(metadata(qwen3, model="gpt2", pre=rule)).encode("a wholeword")
        assert (word in ids) == (rule in ("llama-bpe", "tekken"))


@pytest.mark.parametrize("form", ["prefix", "no_prefix"])
def test_scores_merge_as_sentencepiece_does(spm, form):
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(spm, form))
    for text, ids in zip(TEXTS, spm[form]["ids"], strict=True):
        # SentencePiece looks for users' tokens where spaces are "▁" already; llama.cpp looks for them in the text.
        if form == "prefix" or "▁" not in text:
            assert tokenizer.encode(text, add_special=False) == ids, text
            assert tokenizer.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("form", ["prefix", "no_prefix"])
def test_any_tokens_decode_as_sentencepiece_decodes_them(spm, form):
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(spm, form))
    for ids, text in spm[form]["decoded"]:
        assert tokenizer.decode(ids) == text


def sentencepiece_metadata(spm, form):
    special = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return metadata(spm[form], model="llama", add_space_prefix=form == "prefix", **special)


def test_smollm2_encodes_as_the_hand_written_tokenizer_does(smollm2, fixtures):
    tokenizer = smollm2.tokenizer()
    for text, ids in zip(TEXTS, unpack(fixtures, "smollm2"), strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == text


def test_gemma3_encodes_as_its_own_tokenizer_json_does(gemma3, fixtures):
    for text, ids in zip(TEXTS, unpack(fixtures, "gemma3"), strict=True):
        # The file's converter wrote the tokens of several "▁" as spaces, so that a "▁" in a text is not part of one.
        if "▁" not in text:
            assert gemma3.encode(text) == [2, *ids], text
            assert gemma3.decode(ids, skip_special=False) == text


def test_gemma3_ends_turns_and_documents_but_not_at_a_tag_of_html(gemma3):
    ends = [gemma3.decode([i], skip_special=False) for i in sorted(gemma3.eos_token_ids)]
    assert ends == ["<eos>", "<end_of_turn>"]
    assert gemma3.decode(gemma3.encode("<s>a</s>"))
