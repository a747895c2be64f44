"""A conversation on a real engine: what each turn finds cached, and why it misses the rest."""

import numpy as np
import pytest
from helpers.core_engine import greedy, make_engine, model_with_windows, prompts_of

PAGE = 4


@pytest.fixture(scope="module")
def llm():
    with make_engine(model_with_windows(None), "both=2", room=4) as llm:
        yield llm


def turn(llm, prompt, session="chat", tokens=8, **options):
    """Ask for so many tokens; return the whole conversation so far, and the report."""
    (output,) = llm.generate([prompt], greedy(tokens, **options), session=session)
    report = output.cache_report
    assert output.num_cached_tokens == report.cached_tokens
    assert report.cached_tokens + sum(miss.tokens for miss in report.missed) == len(prompt)
    return [*prompt, *output.outputs[0].token_ids], report


def reasons(report):
    return [(miss.reason, miss.tokens) for miss in report.missed]


def test_three_turns_a_changed_system_prompt_and_new_weights(llm):
    system, first, second, third = prompts_of(9, 4, 5, 3, seed=1)
    chat, report = turn(llm, [*system, *first])
    assert (report.cached_tokens, reasons(report)) == (0, [("never seen", 12), ("last page", 1)])

    # 13 + 8 tokens, the last of which was never fed back: 20 in 5 full pages.
    chat, report = turn(llm, [*chat, *second])
    assert (report.cached_tokens, reasons(report)) == (20, [("never seen", 4), ("last page", 2)])

    before, report = turn(llm, [*chat, *third])
    assert report.cached_tokens == (len(chat) - 1) // PAGE * PAGE

    changed = list(before)
    changed[5] += 1 if changed[5] < 10 else -1  # a token of the system prompt
    _, report = turn(llm, changed, tokens=1)
    (differs, *_) = report.missed
    assert (report.cached_tokens, differs.reason) == (4, "differs")
    assert (differs.token, differs.block, differs.earlier_blocks) == (5, 1, (len(before) - 1) // PAGE)

    llm.update_params({})
    _, report = turn(llm, changed, tokens=1)
    (void, *_) = report.missed
    assert (report.cached_tokens, void.reason) == (0, "weights changed")
    assert 0 < void.at <= llm.engine.core.clock()


def test_prompt_logprobs_compute_a_prompt_again(llm):
    (prompt,) = prompts_of(12, seed=2)
    turn(llm, prompt)
    _, report = turn(llm, prompt, prompt_logprobs=1)
    assert reasons(report) == [("not reusable", 12)]


def test_reasons_are_in_the_metrics(llm):
    (prompt,) = prompts_of(11, seed=3)
    before = llm.metrics()
    turn(llm, prompt, session=None)
    after = llm.metrics()
    assert after.missed_tokens["never seen"] - before.missed_tokens["never seen"] == 8
    assert after.missed_requests["never seen"] - before.missed_requests["never seen"] == 1
    assert after.missed_tokens["last page"] - before.missed_tokens["last page"] == 3


def test_in_deterministic_mode_an_answer_is_not_reusable():
    options = dict(deterministic=True, prefill_buckets=(16,))
    with make_engine(model_with_windows(None), room=4, **options) as llm:
        (prompt,) = prompts_of(9, seed=4)
        chat, _ = turn(llm, prompt, tokens=12)
        _, report = turn(llm, np.array(chat), tokens=1)
    assert report.cached_tokens == 8
    assert reasons(report) == [("not reusable", 12), ("last page", 1)]
