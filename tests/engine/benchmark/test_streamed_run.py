"""Requests that somebody else issues to an engine: each that ends is a record, failures and refusals too."""

import asyncio

from helpers.fake_core import FakeCore, make_fake
from twinmesh import AsyncLLM, SamplingParams
from twinmesh.engine.benchmark.streamed_run import StreamedRun
from twinmesh.engine.errors import Overloaded


def streamed(core, *prompts, tokens=4):
    """Answer prompts one after the other; return what was driven, and how many tokens each output had."""

    async def run():
        llm = make_fake(AsyncLLM, core)
        one, seen = StreamedRun(llm), []
        for prompt in prompts:
            try:
                seen.append([len(o.outputs[0].token_ids) async for o in one.answer(prompt, params)])
            except (Overloaded, ValueError) as error:
                seen.append(error)
        await llm.close()
        return one.driven(), seen

    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return asyncio.run(run())


def test_every_answer_is_a_record_with_the_engines_own_stamps():
    driven, seen = streamed(FakeCore(answers=True), [5] * 6, [7] * 9)
    assert [counts[-1] for counts in seen] == [4, 4]
    records = list(driven.records)
    assert [(one.number, one.prompt_len, one.output_len, one.reason) for one in records] == [
        (0, 6, 4, "length"), (1, 9, 4, "length"),
    ]  # fmt: skip
    assert all(one.arrival < one.first_token < one.last_token < one.finish for one in records)
    assert driven.gaps.distribution().count == 6


def test_what_is_turned_away_and_what_fails_is_a_record_too():
    class Some(FakeCore):
        def submit(self, submissions, *, may_refuse=False):
            if len(submissions[0].prompt) == 8:
                raise Overloaded(1.0)
            super().submit(submissions)

        def answer(self, submission):
            self.send(submission.facts.id, finish_reason="error", error="lost.")

    driven, seen = streamed(Some(answers=True), [5] * 6, [5] * 8, [5] * 80)
    assert [(one.number, one.prompt_len, one.reason) for one in driven.records] == [
        (0, 6, "error"), (1, 8, "refused"), (2, 0, "refused"),
    ]  # fmt: skip
    assert driven.errors == {"lost.": 1}
    assert isinstance(seen[1], Overloaded)
    assert isinstance(seen[2], ValueError)


def test_one_that_is_left_is_a_record_of_an_abort_with_the_tokens_that_it_had():
    async def run():
        llm = make_fake(AsyncLLM, core := FakeCore())
        one = StreamedRun(llm)
        answer = one.answer([5] * 6, SamplingParams(max_tokens=9, ignore_eos=True))
        begun = asyncio.ensure_future(anext(answer))
        while not core.running:
            await asyncio.sleep(0)
        core.send(0, [7])
        await begun
        await answer.aclose()
        await llm.close()
        return one.driven(), core

    driven, core = asyncio.run(run())
    assert [(one.output_len, one.reason) for one in driven.records] == [(1, "abort")]
    assert ("abort", 0) in core.said
