"""`AsyncLLM` over an engine that a test drives: what coroutines see, and what leaving does."""

import asyncio
import threading
from contextlib import aclosing

import pytest
from helpers.fake_core import FakeCore, make_fake
from twinmesh import AsyncLLM, EngineError, SamplingParams
from twinmesh.engine.core.submission import Update

LONG = SamplingParams(max_tokens=30)


@pytest.fixture
def core():
    return FakeCore()


@pytest.fixture
def llm(core):
    return make_fake(AsyncLLM, core)


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


async def last_of(outputs):
    async for output in outputs:
        last = output
    return last


def test_outputs_are_cumulative_and_the_last_is_finished(llm, core):
    async def run():
        outputs = llm.generate("a", LONG, request_id="x")
        ids = llm.tokenizer.encode("sea")
        seen = []
        task = asyncio.create_task(anext(outputs))
        await until(lambda: "x" in core.names())
        core.send("x", ids[:1])
        seen.append(await task)
        core.send("x", ids[1:])
        core.send("x", finish_reason="length")
        async for output in outputs:
            seen.append(output)
        return [(output.request_id, output.outputs[0].text, output.finished) for output in seen]

    seen = asyncio.run(run())
    assert seen[0] == ("x", "s", False)
    assert seen[-1] == ("x", "sea", True)


def test_many_requests_run_at_once():
    async def run():
        async with make_fake(AsyncLLM, FakeCore(answers=True)) as llm:
            prompts = [f"{i} seas" for i in range(20)]
            outputs = await asyncio.gather(*(last_of(llm.generate(prompt, LONG)) for prompt in prompts))
            return prompts, [output.outputs[0].text for output in outputs]

    prompts, texts = asyncio.run(run())
    assert texts == prompts


@pytest.mark.parametrize("n", [1, 3])
def test_cancelling_aborts_every_completion(llm, core, n):
    async def run():
        task = asyncio.create_task(last_of(llm.generate("a", SamplingParams(n=n))))
        await until(lambda: core.running)
        names = list(core.running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return names

    names = asyncio.run(run())
    assert core.said == [("abort", name) for name in names]
    assert len(names) == n
    assert not core.running


def test_leaving_the_iteration_aborts(llm, core):
    async def run():
        async with aclosing(llm.generate("a", LONG, request_id="x")) as outputs:
            task = asyncio.create_task(anext(outputs))
            await until(lambda: core.running)
            core.send("x", [5])
            await task
        assert core.said == [("abort", 0)]

    asyncio.run(run())


def test_an_iterator_that_is_dropped_aborts(llm, core):
    async def run():
        outputs = llm.generate("a", LONG, request_id="x")
        task = asyncio.create_task(anext(outputs))
        await until(lambda: core.running)
        core.send("x", [5])
        await task
        del outputs, task
        await until(lambda: core.said)

    asyncio.run(run())
    assert core.said == [("abort", 0)]


def test_a_request_that_ended_is_not_aborted(llm, core):
    async def run():
        task = asyncio.create_task(last_of(llm.generate("a", LONG, "x")))
        await until(lambda: core.running)
        core.send("x", [5], finish_reason="length")
        return await task

    assert asyncio.run(run()).finished
    assert core.said == []


def test_abort_ends_the_iteration_with_what_there_is(llm, core):
    async def run():
        task = asyncio.create_task(last_of(llm.generate("a", SamplingParams(n=2), "x")))
        await until(lambda: core.running)
        core.send(next(iter(core.running)), llm.tokenizer.encode("sea"))
        await llm.abort("x")
        return await task

    output = asyncio.run(run())
    assert [completion.finish_reason for completion in output.outputs] == ["abort", "abort"]
    assert output.outputs[0].text == "sea"


def test_refusals_come_with_the_first_iteration(llm, core):
    async def run():
        with pytest.raises(ValueError, match="empty"):
            await last_of(llm.generate("", LONG))
        with pytest.raises(ValueError, match="token id 5000"):
            await last_of(llm.generate("a", SamplingParams(stop_token_ids=[5000])))
        await llm.close()
        with pytest.raises(EngineError, match="closed"):
            await last_of(llm.generate("a", LONG))

    asyncio.run(run())
    assert not core.batches


def test_several_event_loops_share_the_engine():
    llm = make_fake(AsyncLLM, FakeCore(answers=True))
    results = {}

    def work(text):
        async def run():
            outputs = await asyncio.gather(*(last_of(llm.generate(text, LONG)) for _ in range(10)))
            return [output.outputs[0].text for output in outputs]

        results[text] = asyncio.run(run())

    threads = [threading.Thread(target=work, args=(f"the {i} seas",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {f"the {i} seas": [f"the {i} seas"] * 10 for i in range(4)}


def test_news_for_a_loop_that_is_gone_is_dropped(llm, core):
    async def run():
        task = asyncio.create_task(last_of(llm.generate("a", LONG, "x")))
        await until(lambda: core.running)
        (submission,) = core.running.values()
        core.send("x", [5], finish_reason="length")
        await task
        return submission

    submission = asyncio.run(run())
    submission.sink.put(Update(submission.facts.id))


def test_new_parameters_are_awaited(llm, core):
    asyncio.run(llm.update_params({"norm.scale": 1}))
    assert core.said == [("update_params", {"norm.scale": 1})]


def test_new_roles_are_awaited_and_shown(llm, core):
    assert asyncio.run(llm.set_roles("prefill=1,decode=1")) == "reached"
    assert asyncio.run(llm.set_roles({0: "both"}, drain_timeout=2.0)) == "reached"
    assert core.said == [("set_roles", "prefill=1,decode=1", 30.0), ("set_roles", {0: "both"}, 2.0)]
    assert llm.roles() == {0: "prefill", 1: "decode (draining prefill)"}
