"""Questions with known answers: how an answer is read, and what is counted."""

from contextlib import closing
from types import SimpleNamespace

import pytest
from helpers.fake_core import FakeCore, make_fake
from twinmesh import LLM
from twinmesh.engine.benchmark.accuracy import Item, ask, check_room, is_right, prompt_of, read_items
from twinmesh.engine.metrics.benchmark_file import Accuracy


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 3 x 4 = 12. #### 12\n", True), ("It is 1,200", False), ("12 and 13", False), ("so 12", True), ("none", False),
     ("#### 12 and 13", True), ("11\n\nQuestion: 12", False), ("12.0", True)],
)  # fmt: skip
def test_an_answer_is_right_if_its_number_is(text, right):
    assert is_right(Item("?", 12), text) is right


def test_the_questions_are_read_and_scored():
    items = read_items()
    assert len({item.question for item in items}) == len(items) == 32
    assert Accuracy(name="a", asked=4, right=1).score == 0.25


@pytest.mark.parametrize(("reasons", "right", "failed"), [(["stop", "length"], 2, 0), (["stop", "error"], 1, 1)])
def test_questions_that_get_no_answer_are_failed_and_not_right(reasons, right, failed):
    class Answering:
        """Gives right answers, but for what fails."""

        def generate(self, prompts, params):
            assert params.temperature == 0
            texts = ["" if reason == "error" else " #### 7" for reason in reasons]
            answers = [SimpleNamespace(text=text, finish_reason=one) for text, one in zip(texts, reasons, strict=True)]
            return [SimpleNamespace(outputs=[answer]) for answer in answers]

    scored = ask(Answering(), [Item("?", 7), Item("??", 7)])
    assert (scored.asked, scored.right, scored.failed) == (2, right, failed)


def test_an_engine_without_room_for_the_questions_is_refused_before_it_runs():
    with (
        closing(make_fake(LLM, FakeCore())) as llm,
        pytest.raises(ValueError, match=r"take \d+ tokens, and the engine has room for max_model_len=64: raise it"),
    ):
        check_room(llm, read_items())


def test_every_prompt_has_the_solved_examples_and_its_question():
    prompt = prompt_of(Item("How many?", 3))
    assert prompt.count("Question:") == prompt.count("Answer:") == 5
    assert prompt.endswith("Question: How many?\nAnswer:")
