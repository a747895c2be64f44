"""Prompts as callers write them: which lists are token ids, and that a list of texts is tokenised as one by one."""

import itertools
from collections import namedtuple
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
from helpers.tiny_gguf import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.api.prompts import check_continuation, check_prompt, check_texts
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

TOKENS = tokenizer_from_gguf(TOKENIZER)
IDS = [5, 6, 7]
Three = namedtuple("Three", "a b c")


class Token(IntEnum):
    SEA = 5


def check(prompt, length=64):
    return check_prompt(prompt, TOKENS, length)


@pytest.mark.parametrize(
    "prompt",
    [
        IDS, tuple(IDS), Three(*IDS), range(5, 8), np.array(IDS), np.array(IDS, np.uint8), np.array(IDS, np.uint64),
        np.array(IDS, object), np.array([5, 0, 6, 0, 7])[::2], [np.int32(5), 6, np.uint8(7)], [Token.SEA, 6, 7],
        {"prompt_token_ids": IDS}, {"prompt_token_ids": np.array(IDS)},
    ],
)  # fmt: skip
def test_whole_numbers_in_any_sequence_are_token_ids(prompt):
    checked = check(prompt)
    assert checked.token_ids == IDS
    assert all(type(token) is int for token in checked.token_ids)
    assert (checked.ids.dtype, checked.ids.tolist()) == (np.int32, IDS)
    assert checked.text is None


@pytest.mark.parametrize(
    "wrong", [True, False, 1.0, "1", None, b"1", 1j, Fraction(1), np.bool_(True), np.float32(1), [1]]
)
@pytest.mark.parametrize("place", [0, 2, 4])
def test_whatever_is_no_whole_number_is_refused_wherever_it_stands(wrong, place):
    ids = [1, 2, 3, 4]
    ids.insert(place, wrong)
    for prompt in (ids, tuple(ids), {"prompt_token_ids": ids}):
        with pytest.raises(ValueError, match=r"must be text or a list of token ids"):
            check(prompt)


@pytest.mark.parametrize(
    "prompt",
    [np.array([1.0, 2.0]), np.array([True]), np.array([[1, 2]]), np.array(1), np.array(["1"]), {1, 2}, 7, None],
)
def test_other_arrays_and_collections_are_refused(prompt):
    with pytest.raises(ValueError, match=r"must be text or a list of token ids"):
        check(prompt)


@pytest.mark.parametrize("wrong", [-1, TOKENS.vocab_size, 2**31, 2**32 + 5, 2**63, 2**64 + 5, -(2**70)])
def test_ids_outside_the_vocabulary_are_refused_however_large(wrong):
    with pytest.raises(ValueError, match=f"outside 0 to {TOKENS.vocab_size - 1}"):
        check([5, wrong, 6])


@pytest.mark.parametrize("prompt", [[], (), np.array([]), np.array([], int), {"prompt_token_ids": []}])
def test_no_ids_are_an_empty_prompt(prompt):
    with pytest.raises(ValueError, match=r"is empty"):
        check(prompt)


def test_a_prompt_stays_what_it_was_when_the_callers_array_changes():
    ids = np.array(IDS, np.int32)
    checked = check(ids)
    ids[:] = 0
    assert checked.ids.tolist() == IDS
    with pytest.raises(ValueError, match=r"read-only"):
        checked.ids[0] = 0


@given(st.lists(st.text(max_size=20), max_size=8))
def test_texts_are_tokenised_together_as_one_by_one(texts):
    texts = [text for text in texts if TOKENS.encode(text)]
    assert [p.token_ids for p in check_texts(texts, TOKENS, 999)] == [check(text, 999).token_ids for text in texts]


def test_what_was_checked_before_passes_among_texts():
    ids = check(IDS)
    first, second, third = check_texts(["sea", ids, "land"], TOKENS, 64)
    assert second is ids
    assert (first.text, third.text) == ("sea", "land")
    assert (first.token_ids, third.token_ids) == (TOKENS.encode("sea"), TOKENS.encode("land"))


@pytest.mark.parametrize(("text", "why"), [("sea" * 64, "shorten it"), ("\ud800", "lone surrogate")])
def test_a_text_is_refused_in_a_list_as_by_itself(text, why):
    messages = []
    for refuse in (lambda: check(text, 16), lambda: check_texts(["sea", text], TOKENS, 16)):
        with pytest.raises(ValueError, match=why) as caught:
            refuse()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kinds", list(itertools.product([list, tuple, np.array], repeat=2)))
def test_a_continuation_is_joined_whatever_the_two_are(kinds):
    before, after = kinds
    assert check_continuation(check(before(IDS)), after([8, 9]), TOKENS, 64).token_ids == [*IDS, 8, 9]
