"""The model class for lm-evaluation-harness without the harness: modules in its place have what the class takes."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from helpers.fake_core import CONFIG, FakeCore, make_fake
from twinmesh import LLM
from twinmesh.engine import evaluation
from twinmesh.engine.api.outputs import Score


class TemplateLM:
    """In place of the harness's base class; it keeps what its cache is told, and takes requests that are tokens."""

    def __init__(self):
        self.kept = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *partial: self.kept.append(partial))

    def loglikelihood(self, requests):
        return self._loglikelihood_tokens(requests, disable_tqdm=True)


@pytest.fixture
def lm(monkeypatch):
    """A `TwinmeshLM` over a core that repeats its prompts."""
    contents = {
        "lm_eval": {},
        "lm_eval.utils": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": lambda name: lambda made: made},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["lm_eval"].utils = sys.modules["lm_eval.utils"]
    monkeypatch.setattr(evaluation, "harness", None, raising=False)
    monkeypatch.delitem(sys.modules, "twinmesh.engine.evaluation.harness", raising=False)
    module = importlib.import_module("twinmesh.engine.evaluation.harness")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.TwinmeshLM(make_fake(LLM, FakeCore(answers=True), config=replace(CONFIG, max_model_len=130)))


def asked(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_answers_come_in_the_order_of_the_requests_and_are_kept_for_the_cache(lm):
    short, long = {"until": ["l"], "max_gen_toks": 64}, {"max_gen_toks": 4}
    answers = lm.generate_until(asked(("the land", short), ("a sea", long), ("the sea", short)), disable_tqdm=True)
    ids = lm.tok_encode("a sea")
    assert answers == ["the ", lm.tokenizer.decode(ids[:4]), "the sea"]
    assert sorted(partial[1][0] for partial in lm.kept) == ["a sea", "the land", "the sea"]
    with pytest.raises(ValueError, match=r"generation_kwargs has num_beams=4"):
        lm.generate_until(asked(("a", {"num_beams": 4})))


def test_scores_come_in_the_order_of_the_requests_whatever_order_they_are_computed_in(lm, monkeypatch):
    seen = []

    def score(contexts, continuations):
        seen.extend(zip(contexts, continuations, strict=True))
        return [
            Score(after, np.zeros(1), -float(sum(after)), np.array([min(len(before), 2)]))  # greedy behind one token
            for before, after in zip(contexts, continuations, strict=True)
        ]

    monkeypatch.setattr(lm.llm, "score", score)
    requests = [(("c", "d"), [9, 9], [5]), (None, [3], [7, 8]), (("a", "b"), [4] * 200, [6])]
    found = lm.loglikelihood(requests)
    assert found == [(-5.0, False), (-15.0, True), (-6.0, False)]
    assert [before for before, _ in seen] == [[3], [4] * lm.max_length, [9, 9]]  # sorted, and cut from the left
    assert [partial[1] for partial in lm.kept] == [("a", "b"), ("c", "d")]


def test_a_context_is_cut_from_the_left_so_that_its_answer_fits(lm):
    text = "the sea and the land " * 20
    (answer,) = lm.generate_until(asked((text, {"max_gen_toks": 20})), disable_tqdm=True)
    assert answer == lm.tokenizer.decode(lm.tok_encode(text)[-(lm.max_length - 20) :][:20])
    with pytest.raises(ValueError, match="answers of 500 tokens, and the model sees 128"):
        lm.generate_until(asked(("a", {"max_gen_toks": 500})))
