"""What requests of lm-evaluation-harness mean here, without the harness."""

import pytest
from twinmesh.engine.evaluation.requests import answer_of, asked, scored
from twinmesh.models.checkpoints.open import open_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tiny_path):
    return open_checkpoint(tiny_path).tokenizer()


def test_what_is_too_long_is_cut_from_the_left_and_the_last_token_is_only_predicted():
    assert scored([1, 2, 3], [4, 5], 4) == ([1, 2, 3], [4, 5])
    assert scored([1, 2, 3], [4, 5], 3) == ([2, 3], [4, 5])
    assert scored([1, 2, 3], [4, 5], 2) == ([3], [4, 5])
    assert scored([1, 2, 3], [4, 5], 2).tokens == (3, 4, 5)


@pytest.mark.parametrize(
    ("context", "continuation", "says"),
    [
        ([], [4], "empty context"),
        ([1], [], "empty continuation"),
        ([1], [4, 5, 6], "has 3 tokens, and the model sees 2"),
    ],
)
def test_what_cannot_be_scored_is_refused(context, continuation, says):
    with pytest.raises(ValueError, match=says):
        scored(context, continuation, 2)


def test_answers_are_greedy_and_end_at_texts_at_special_tokens_and_at_eos(tokenizer):
    given = {"until": ["\n\n", "", "<|im_start|>"], "do_sample": False, "temperature": 0.7, "max_new_tokens": 9}
    params, until, most = asked(given, tokenizer, 256)
    assert (params.temperature, params.max_tokens, most) == (0, 9, 9)
    assert params.stop == ["\n\n"] or tuple(params.stop) == ("\n\n",)
    assert set(params.stop_token_ids) == {1, 2}
    assert until == ("\n\n", "<|im_start|>", "<|im_end|>")
    assert asked({}, tokenizer, 256).params.max_tokens == 256
    assert asked({"until": "."}, tokenizer, 256).until[0] == "."


def test_sampling_is_what_the_task_says(tokenizer):
    params = asked({"do_sample": True, "temperature": 0.5, "top_p": 0.9, "num_beams": 1}, tokenizer, 8).params
    assert (params.temperature, params.top_p) == (0.5, 0.9)
    assert asked({"do_sample": True}, tokenizer, 8).params.temperature == 1
    assert asked({"temperature": 0.5}, tokenizer, 8).params.temperature == 0.5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_beams": 4}, "num_beams=4, which is not known here"),
        ({"frequency": 4}, "frequency=4, which is not known here: it takes until, max_gen_toks"),
        ({"until": 3}, "until=3: give a text"),
    ],
)
def test_what_means_nothing_here_is_refused_by_name(tokenizer, given, says):
    with pytest.raises(ValueError, match=says):
        asked(given, tokenizer, 8)


def test_answers_are_cut_behind_their_thinking_and_before_their_end():
    assert answer_of("a b. c", (".",), None) == "a b"
    assert answer_of("<think>x. y</think> a. b", (".",), "</think>") == "a"
