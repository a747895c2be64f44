"""Detokenising with stop strings: what is given out is right, complete, and never taken back."""

import codecs

import pytest
from helpers.tiny_gguf import TOKENIZER, TOKENS
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.api.detokenizer import Detokenizer, StopSearch
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

TOKENIZE = tokenizer_from_gguf(TOKENIZER)
ID = {token: i for i, token in enumerate(TOKENS)}
# Few tokens, so that stop strings come up: letters, "he" and " the", the bytes of é and 🙂, two special tokens.
IDS = [ID[c] for c in ["h", "e", "t", "he", "Ġthe", "Ġ", "<|im_end|>", "<think>"]]
IDS += [TOKENIZE.encode(c, add_special=False)[i] for c, n in (("é", 2), ("🙂", 4)) for i in range(n)]
SEQUENCES = st.lists(st.sampled_from(IDS), max_size=24)
STOPS = st.lists(st.text("het é🙂�<|im_end>", min_size=1, max_size=5), min_size=1, max_size=3)
SPECIAL_STOPS = st.sampled_from([["<|im_end|>"], ["nk>h", "e<th"], ["he<|"]])


def certain_text(ids, skip_special):
    """The characters that `ids` complete."""
    pieces = (TOKENIZE.piece(i) for i in ids if not (skip_special and i in TOKENIZE.control_ids))
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pieces))


def reference(ids, stops, min_tokens, include_stop, skip_special):
    """Text and stop string by looking at the whole text after every character."""
    whole = certain_text(ids, skip_special)
    for end in range(len(certain_text(ids[:min_tokens], skip_special)) + 1, len(whole) + 1):
        for stop in stops:
            if whole[:end].endswith(stop):
                return whole[: end if include_stop else end - len(stop)], stop
    return TOKENIZE.decode(ids, skip_special), None


@given(SEQUENCES, STOPS | SPECIAL_STOPS, st.integers(0, 6), st.booleans(), st.booleans(), st.integers(1, 4))
def test_deltas_join_to_the_text_cut_at_the_first_stop_string(ids, stops, min_tokens, include, skip_special, step):
    text, stop = reference(ids, stops, min_tokens, include, skip_special)
    detokenizer = Detokenizer(TOKENIZE, stops, min_tokens=min_tokens, include_stop=include, skip_special=skip_special)
    shown = ""
    for start in range(0, len(ids), step):
        shown += detokenizer.push(ids[start : start + step])
        assert text.startswith(shown)  # nothing to be taken back
    assert shown + detokenizer.finish() == text

    search = StopSearch(TOKENIZE, stops, min_tokens=min_tokens, skip_special=skip_special)
    assert next(filter(None, map(search.push, ids)), None) == stop


@given(SEQUENCES, st.booleans(), st.integers(1, 4))
def test_without_stop_strings_deltas_join_to_the_whole_text(ids, skip_special, step):
    detokenizer = Detokenizer(TOKENIZE, skip_special=skip_special)
    deltas = [detokenizer.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(deltas) + detokenizer.finish() == TOKENIZE.decode(ids, skip_special)


def pushed(text, stops, **options):
    detokenizer = Detokenizer(TOKENIZE, stops, **options)
    return [detokenizer.push([i]) for i in TOKENIZE.encode(text)] + [detokenizer.finish()]


def test_what_may_be_the_start_of_a_stop_string_waits_until_it_is_known():
    assert pushed("abxabc!", ["abc"]) == ["", "", "abx", "", "", "", "", ""]
    assert pushed("abxab", ["abc"]) == ["", "", "abx", "", "", "ab"]


def test_nothing_waits_where_the_stop_string_is_shown():
    assert pushed("abxabc!", ["abc"], include_stop=True) == ["a", "b", "x", "a", "b", "c", "", ""]


def test_only_text_behind_a_match_can_start_another():
    # "aab" ends nothing, but its end may be the start of "ab..." once more.
    assert pushed("aaabc", ["aabc"]) == ["", "", "a", "", "", ""]


@pytest.mark.parametrize(("stops", "text", "stop"), [(["c", "bc"], "ab", "c"), (["bc", "c"], "a", "bc")])
def test_of_stop_strings_that_end_together_the_first_listed_counts(stops, text, stop):
    assert "".join(pushed("abcd", stops)) == text
    search = StopSearch(TOKENIZE, stops, min_tokens=0, skip_special=True)
    assert [search.push(i) for i in TOKENIZE.encode("abc")] == [None, None, stop]


def test_of_two_in_one_token_the_one_that_ends_first_counts():
    detokenizer = Detokenizer(TOKENIZE, ["he", "t"])
    assert detokenizer.push([ID["Ġthe"]]) + detokenizer.finish() == " "


def test_a_stop_string_that_ends_within_the_least_number_of_tokens_is_passed_over():
    assert "".join(pushed("abab", ["ab"], min_tokens=2)) == "ab"
    assert "".join(pushed("abab", ["ab"], min_tokens=1)) == ""
    assert "".join(pushed("abab", ["ab"], min_tokens=4)) == "abab"


def test_the_search_keeps_no_more_than_the_longest_stop_string():
    search = StopSearch(TOKENIZE, ["abcd", "x"], min_tokens=0, skip_special=True)
    for i in TOKENIZE.encode("the sea and the land " * 20):
        search.push(i)
    assert len(search.tail) == 3
