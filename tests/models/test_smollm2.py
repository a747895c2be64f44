"""The real small model against transformers (see tests/make_fixtures.py). Skipped where it has not been fetched."""

import json

import numpy as np
import pytest

LENGTH = 96  # both tests pad to it, so that one program serves them


@pytest.fixture(scope="module")
def logits(smollm2, dense_forward):
    forward = dense_forward(smollm2)
    return lambda ids: forward(np.pad(ids, (0, LENGTH - len(ids))))[: len(ids)]


@pytest.fixture(scope="module")
def expected(fixtures):
    return np.load(fixtures / "smollm2_logits.npz")


def test_logits_of_a_passage_equal_those_of_transformers(logits, expected):
    found = logits(expected["ids"])
    np.testing.assert_allclose(found[:, expected["columns"]], expected["column_logits"], atol=1e-3, rtol=0)
    top = np.take_along_axis(found, expected["top_ids"], axis=-1)
    np.testing.assert_allclose(top, expected["top_logits"], atol=1e-3, rtol=0)
    np.testing.assert_array_equal(found.argmax(-1), expected["top_ids"][:, 0])


def test_the_capital_of_france(smollm2, logits, expected):
    ids = smollm2.chat_template().encode([{"role": "user", "content": "What is the capital of France?"}])
    assert ids == expected["question_ids"].tolist()
    answer = []
    while not answer or answer[-1] not in smollm2.tokenizer().eos_token_ids:
        answer.append(int(logits(ids + answer)[-1].argmax()))
    assert answer == [504, 3575, 282, 4649, 314, 7042, 30, 2] == expected["answer_ids"].tolist()
    assert smollm2.tokenizer().decode(answer) == "The capital of France is Paris."


def test_token_ids_of_awkward_texts_and_back(smollm2, fixtures):
    tokenizer = smollm2.tokenizer()
    for case in json.loads((fixtures / "smollm2_token_ids.json").read_text()):
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special=False) == case["text"]


def test_facts(smollm2):
    config = smollm2.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (9, 3, 64, 49152)
    assert config.layers[0].rope.theta == 1e5
    assert config.tie_embeddings
    assert smollm2.tokenizer().eos_token_ids == {0, 2}
