"""What each output of a request under way holds, that none changes once handed out, and how consumers are woken."""

import asyncio
import copy
import json
import pickle
import threading
from contextlib import aclosing

import numpy as np
import pytest
from helpers.fake_core import FakeCore, make_fake, scores
from hypothesis import given
from hypothesis import strategies as st
from twinmesh import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from twinmesh.engine.core.submission import Update
from twinmesh.engine.protocol.list_view import ListView

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind


@pytest.fixture
def core():
    return FakeCore()


@pytest.fixture
def llm(core):
    return make_fake(AsyncLLM, core)


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


async def follow(llm, core, params, updates, *, name="x"):
    """All outputs of a request whose updates, (completion, ids, fields), come one by one as they are waited for."""
    seen, outputs = [], llm.generate("a", params, request_id=name)
    task = asyncio.ensure_future(anext(outputs))
    await until(lambda: name in core.names())
    ids = [id_ for id_, submission in core.running.items() if submission.sink.collector.request_id == name]
    for completion, tokens, fields in updates:
        core.send(ids[completion], tokens, **fields)
        for _ in range(5):
            await asyncio.sleep(0)
        if task.done():
            seen.append(task.result())
            task = asyncio.ensure_future(anext(outputs))
    with pytest.raises(StopAsyncIteration):
        await task
    return seen


def run(llm, core, params, updates):
    return asyncio.run(follow(llm, core, params, updates))


def of(llm, text):
    return llm.tokenizer.encode(text)


def parts(output):
    return [(c.index, c.text, list(c.token_ids), c.finish_reason) for c in output.outputs]


def test_the_kinds_are_those_of_vllm():
    assert {kind.name: kind.value for kind in RequestOutputKind} == {"CUMULATIVE": 0, "DELTA": 1, "FINAL_ONLY": 2}
    assert SamplingParams().output_kind is CUMULATIVE


@pytest.mark.parametrize("kind", ["DELTA", 1, None, True, "delta"])
def test_another_kind_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"output_kind=.*one of RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA"):
        SamplingParams(output_kind=kind)


def test_cumulative_outputs_hold_all_so_far(llm, core):
    s, e, a = of(llm, "s")[0], of(llm, "e")[0], of(llm, "a")[0]
    seen = run(llm, core, SamplingParams(), [(0, [s], {}), (0, [e], {}), (0, [a], {"finish_reason": "length"})])
    assert [parts(output) for output in seen] == [
        [(0, "s", [s], None)], [(0, "se", [s, e], None)], [(0, "sea", [s, e, a], "length")],
    ]  # fmt: skip


def test_deltas_hold_what_is_new_and_add_up_to_the_whole(llm, core):
    ids = of(llm, "the sea")
    updates = [(0, [token], {}) for token in ids[:-1]] + [(0, ids[-1:], {"finish_reason": "length"})]
    seen = run(llm, core, SamplingParams(output_kind=DELTA, stop="seal"), updates)
    assert "".join(output.outputs[0].text for output in seen) == "the sea"
    assert [token for output in seen for token in output.outputs[0].token_ids] == ids
    assert [output.finished for output in seen] == [False] * (len(ids) - 1) + [True]


def test_the_final_output_is_the_only_one_where_that_is_asked_for(llm, core):
    s, e = of(llm, "s")[0], of(llm, "e")[0]
    params = SamplingParams(output_kind=FINAL_ONLY)
    (output,) = run(llm, core, params, [(0, [s], {}), (0, [e], {"finish_reason": "length"})])
    assert parts(output) == [(0, "se", [s, e], "length")]
    assert output.finished


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (CUMULATIVE, [[0, 1], [0, 1], [0, 1], [0, 1]]),
        (DELTA, [[1], [0], [1], [0]]),
        (FINAL_ONLY, [[0, 1]]),
    ],
)
def test_of_several_completions_a_delta_holds_those_with_something_new(llm, core, kind, expected):
    updates = [(1, [5], {}), (0, [6], {}), (1, [7], {"finish_reason": "stop"}), (0, [8], {"finish_reason": "length"})]
    seen = run(llm, core, SamplingParams(n=2, output_kind=kind), updates)
    assert [[c.index for c in output.outputs] for output in seen] == expected
    assert seen[-1].finished


def test_logprobs_of_a_delta_are_those_of_its_tokens_and_the_sum_is_of_all(llm, core):
    updates = [
        (0, [5], {"scores": [scores((-1.0, 1, [5]))]}),
        (0, [6, 7], {"scores": [scores((-2.0, 1, [6]), (-3.0, 1, [7]))], "finish_reason": "length"}),
    ]
    seen = run(llm, core, SamplingParams(output_kind=DELTA, logprobs=0), updates)
    assert [[list(at) for at in output.outputs[0].logprobs] for output in seen] == [[[5]], [[6], [7]]]
    assert [output.outputs[0].cumulative_logprob for output in seen] == [-1.0, -6.0]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_no_output_changes_once_it_is_handed_out(llm, core, kind):
    async def watch():
        taken, outputs = [], llm.generate("a", SamplingParams(output_kind=kind, logprobs=0, n=2), request_id="x")
        task = asyncio.ensure_future(anext(outputs))
        await until(lambda: core.running)
        first, second = core.running
        for step in range(6):
            for id_ in (first, second):
                last = {"finish_reason": "length"} if step == 5 else {}
                core.timelines[id_].kv_ready = 1.0 if step > 2 else None
                core.send(id_, [5 + step], scores=[scores((-1.0, 1, [5]))], **last)
                for _ in range(5):
                    await asyncio.sleep(0)
                if task.done() and not task.exception():
                    taken.append((task.result(), repr(task.result()), copy.deepcopy(task.result())))
                    task = asyncio.ensure_future(anext(outputs))
        task.cancel()
        return taken

    taken = asyncio.run(watch())
    assert len(taken) == (1 if kind is FINAL_ONLY else 12)
    for output, shown, copied in taken:
        assert repr(output) == shown == repr(copied)
        tokens = [len(completion.token_ids) for completion in output.outputs]
        if kind is not DELTA:
            assert [len(completion.timeline.tokens) for completion in output.outputs] == tokens
        assert all((c.timeline.finish is None) == (c.finish_reason is None) for c in output.outputs)


def test_an_output_that_the_caller_changes_leaves_the_engines_stamps_alone(core):
    llm = make_fake(LLM, core)
    stream = llm.stream("a")
    core.send(stream.request_id, [5, 6], finish_reason="length")
    output, (timeline,) = stream.result(), core.timelines.values()
    output.timeline.tokens.clear()
    output.timeline.finish = None
    assert len(timeline.tokens) == 2
    assert timeline.finish is not None


def test_what_has_ended_is_in_lists(llm, core):
    (output,) = run(llm, core, SamplingParams(logprobs=0), [
        (0, [5], {"scores": [scores((-1.0, 1, [5]))], "finish_reason": "length"}),
    ])  # fmt: skip
    (completion,) = output.outputs
    assert type(completion.token_ids) is type(completion.logprobs) is type(completion.timeline.tokens) is list
    assert json.dumps(completion.token_ids) == "[5]"


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_a_slow_consumer_gets_what_it_missed_at_once(llm, core, kind):
    async def watch():
        seen = []
        async with aclosing(llm.generate("a", SamplingParams(output_kind=kind), request_id="x")) as outputs:
            task = asyncio.ensure_future(anext(outputs))
            await until(lambda: core.running)
            core.send("x", [5])
            seen.append(await task)
            for token in range(6, 30):
                core.send("x", [token])
                await asyncio.sleep(0)
            core.send("x", [30], finish_reason="length")
            await asyncio.sleep(0)
            async for output in outputs:
                seen.append(output)
        return seen

    first, rest = asyncio.run(watch())
    assert list(first.outputs[0].token_ids) == [5]
    assert list(rest.outputs[0].token_ids) == list(range(6 if kind is DELTA else 5, 31))
    assert rest.finished


def test_a_loop_is_woken_once_for_all_that_a_step_brings(llm, core):
    async def watch():
        loop, calls = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        tasks = [asyncio.ensure_future(last_of(llm.generate("a", SamplingParams()))) for _ in range(20)]
        await until(lambda: len(core.running) == 20)
        sinks = [submission.sink for submission in core.running.values()]

        def one_step(**fields):
            """What the dispatching thread does with a step's results."""
            updates = [Update(id_, core.timelines[id_], [5], **fields) for id_ in ids]
            outlets = {sink.put(update) for sink, update in zip(sinks, updates, strict=True)}
            for outlet in outlets:
                outlet.flush()
            return len(outlets)

        ids = list(core.running)
        loop.call_soon_threadsafe = lambda *call: calls.append(call) or wake(*call)
        for fields in ({}, {}, {"finish_reason": "length"}):
            thread = threading.Thread(target=one_step, kwargs=fields)
            thread.start()
            await until(lambda: not thread.is_alive())  # noqa: B023
            for _ in range(5):
                await asyncio.sleep(0)
        loop.call_soon_threadsafe = wake
        core.running.clear()
        return calls, [await task for task in tasks]

    async def last_of(outputs):
        async for output in outputs:
            last = output
        return last

    calls, outputs = asyncio.run(watch())
    assert len(calls) == 3
    assert [list(output.outputs[0].token_ids) for output in outputs] == [[5, 5, 5]] * 20


def test_steps_that_a_busy_loop_missed_wait_as_one_update(llm, core):
    async def watch():
        outputs = llm.generate("a", SamplingParams(output_kind=DELTA), request_id="x")
        task = asyncio.ensure_future(anext(outputs))
        await until(lambda: core.running)
        woken, loop = [], asyncio.get_running_loop()
        wake, loop.call_soon_threadsafe = loop.call_soon_threadsafe, lambda *call: woken.append(call)
        for token in range(5, 25):  # the loop does not run meanwhile
            core.send("x", [token])
        loop.call_soon_threadsafe = wake
        for call in woken:
            wake(*call)
        core_said = len(woken)
        output = await task
        await outputs.aclose()
        return core_said, output

    woken, output = asyncio.run(watch())
    assert woken == 1
    assert list(output.outputs[0].token_ids) == list(range(5, 25))


def test_steps_by_hand_give_the_kind_that_was_asked_for(core):
    llm = make_fake(LLM, core)
    llm.add_request("delta", "a", SamplingParams(output_kind=DELTA))
    llm.add_request("final", "a", SamplingParams(output_kind=FINAL_ONLY))
    core.send("delta", [5])
    core.send("final", [5])
    assert [(output.request_id, list(output.outputs[0].token_ids)) for output in llm.step()] == [("delta", [5])]
    core.send("final", [6], finish_reason="length")
    core.send("delta", [6], finish_reason="length")
    outputs = {output.request_id: list(output.outputs[0].token_ids) for output in llm.step()}
    assert outputs == {"delta": [6], "final": [5, 6]}


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_whole_results_are_whole_whatever_the_kind(kind):
    core = FakeCore(answers=True)
    with make_fake(LLM, core) as llm:
        params = SamplingParams(output_kind=kind, max_tokens=3)
        (output,) = llm.generate("the sea and the land", params)
        assert len(output.outputs[0].token_ids) == 3
        ((_, again),) = llm.as_completed([("the sea and the land", params)])
        assert again.outputs[0].text == output.outputs[0].text


# ---- views

IDS = st.integers(-(2**63), 2**63 - 1)  # of tokens, as arrays hold them


@given(st.lists(IDS), st.lists(IDS, min_size=1), st.data())
def test_a_view_reads_as_the_list_that_it_was(items, later, data):
    growing = list(items)
    view = ListView(growing, len(growing))
    growing += later
    assert view == items
    assert items == view
    assert view != [*items, 0]
    assert (len(view), list(view), repr(view), list(reversed(view))) == (len(items), items, repr(items), items[::-1])
    assert np.array(view).tolist() == items
    assert (view + later, later + view) == (items + later, later + items)
    assert pickle.loads(pickle.dumps(view)) == items
    bounds = st.none() | st.integers(-9, 9)
    part = slice(data.draw(bounds), data.draw(bounds), data.draw(bounds.filter(lambda x: x != 0)))
    assert view[part] == items[part]
    assert type(view[part]) is list
    for index in range(-len(items) - 2, len(items) + 2):
        if -len(items) <= index < len(items):
            assert view[index] == items[index]
        else:
            with pytest.raises(IndexError):
                view[index]
    with pytest.raises(TypeError):
        hash(view)


# ---- the prompt's log-probabilities


@pytest.mark.parametrize(("kind", "expected"), [(CUMULATIVE, [0, 2, 2]), (DELTA, [0, 2, 0]), (FINAL_ONLY, [2])])
def test_a_delta_holds_the_prompts_logprobs_once(llm, core, kind, expected):
    updates = [
        (0, [], {}),
        (0, [5], {"prompt_scores": [scores((-1, 1, [6]))]}),
        (0, [6], {"finish_reason": "length"}),
    ]
    params = SamplingParams(output_kind=kind, prompt_logprobs=0)

    async def watch():
        seen, outputs = [], llm.generate([7, 8], params, request_id="x")
        task = asyncio.ensure_future(anext(outputs))
        await until(lambda: core.running)
        for _, tokens, fields in updates:
            core.send("x", tokens, **fields)
            for _ in range(5):
                await asyncio.sleep(0)
            if task.done():
                seen.append(task.result())
                task = asyncio.ensure_future(anext(outputs))
        with pytest.raises(StopAsyncIteration):
            await task
        return seen

    assert [len(output.prompt_logprobs or ()) for output in asyncio.run(watch())] == expected
