"""Texts of tokens in log-probabilities: a character is whole, or it is not there yet."""

import numpy as np
from helpers.tiny_gguf import TOKENIZER
from twinmesh.engine.api.logprob_names import LogprobNames
from twinmesh.engine.protocol.results import TokenScores
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

TOKENIZE = tokenizer_from_gguf(TOKENIZER)


def scores(ids, tops):
    count = len(ids)
    return TokenScores(
        np.zeros(count, np.float32),
        np.ones(count, np.int32),
        np.array(tops),
        np.zeros((count, len(tops[0])), np.float32),
    )


def test_texts_of_tokens_joined_are_the_text():
    text = "a é𝄞x"
    ids = TOKENIZE.encode(text, add_special=False)
    assert len(ids) > len(text)  # characters in pieces
    at = list(LogprobNames(TOKENIZE).named([scores(ids, [[i] for i in ids])], ids, 1))
    texts = [one[token].decoded_token for one, token in zip(at, ids, strict=True)]
    assert "".join(texts) == text
    assert "" in texts


def test_the_state_outlasts_a_call_and_each_candidate_is_seen_after_the_same_tokens():
    first, second = TOKENIZE.encode("é", add_special=False)[-2:]
    names = LogprobNames(TOKENIZE)
    (at,) = names.named([scores([first], [[second]])], [first], 1)
    assert (at[first].decoded_token, at[second].decoded_token) == ("", "")
    (at,) = names.named([scores([second], [[first]])], [second], 1)
    assert (at[second].decoded_token, at[first].decoded_token) == ("é", "")


def test_only_the_asked_for_tokens_and_the_own_one_are_named():
    (at,) = LogprobNames(TOKENIZE, only=[7, 9]).named([scores([5], [[3, 7, 8, 9]])], [5], -1)
    assert list(at) == [5, 7, 9]
    assert [at[7].rank, at[9].rank] == [2, 4]
    (at,) = LogprobNames(None).named([scores([5], [[3, 7]])], [5], 1)
    assert list(at) == [5, 3]
    assert at[5].decoded_token is None
