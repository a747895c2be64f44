"""Batch files in an engine that serves others as well: every line finishes, with the tokens that it has alone."""

import asyncio

import pytest
from helpers.batch_files import BatchFiles
from helpers.core_engine import (
    ask,
    assert_at_rest,
    greedy,
    in_threads,
    make_engine,
    model_with_windows,
    prompts_of,
    token_ids,
)
from twinmesh import AsyncLLM
from twinmesh.engine import batch
from twinmesh.engine.core.inspection import Observer

LENGTHS = (5, 17, 30, 9, 40, 12, 22, 3, 35, 14)


@pytest.fixture(scope="module", params=["both=2", "prefill=1,decode=1"])
def llm(request):
    with make_engine(model_with_windows(None), request.param, room=3, prefill_buckets=(4, 16)) as engine:
        engine.for_coroutines = AsyncLLM.from_engine(engine.engine)  # kept: an object that is dropped closes its engine
        yield engine


def lines_of(prompts):
    return [{"prompt": p, "temperature": 0, "max_tokens": 8, "ignore_eos": True} for p in prompts]


def alone(llm, prompts, tokens=8):
    return token_ids([llm.generate([prompt], greedy(tokens))[0] for prompt in prompts])


def texts(llm, files):
    written = sorted(files.read(), key=lambda line: int(line["custom_id"].removeprefix("line-")))
    return [line["response"]["body"]["choices"][0]["text"] for line in written]


def test_a_batch_run_in_an_async_engine_leaves_all_tokens_as_they_are_alone(llm, tmp_path):
    lines, asked = prompts_of(*LENGTHS, seed=1), prompts_of(8, 21, 33, 4, 15, 10, seed=2)
    expected_lines = [llm.tokenizer.decode(ids) for ids in alone(llm, lines)]
    expected = alone(llm, asked, 12)
    engine, files = llm.for_coroutines, BatchFiles(tmp_path)
    files.write(lines_of(lines))

    async def answer(prompt):
        async for output in engine.generate(prompt, greedy(12)):
            last = output
        return last.outputs[0].token_ids

    async def serve():
        job = asyncio.to_thread(batch.run, engine, files.source, files.target, model=files.model, deadline=600.0)
        return await asyncio.gather(job, *map(answer, asked))

    result, *answers = asyncio.run(serve())
    assert (result.succeeded, result.failed) == (len(lines), 0)
    assert answers == expected
    assert texts(llm, files) == expected_lines
    assert_at_rest(llm)


class Arrivals(Observer):
    """The classes of requests, as they arrive."""

    def __init__(self):
        self.services = []

    def received(self, message):
        if isinstance(message, tuple):
            self.services += [submission.facts.service for submission in message]


def test_files_with_deadlines_of_their_own_run_at_once_and_all_end(llm, tmp_path):
    deadlines, seen = [300.0, 30.0, None], Arrivals()
    prompts = [prompts_of(*LENGTHS[:6], seed=10 + index) for index in range(3)]
    expected = [[llm.tokenizer.decode(ids) for ids in alone(llm, each)] for each in prompts]
    folders = [BatchFiles(tmp_path / str(index)) for index in range(3)]

    def run(index):
        folders[index].folder.mkdir()
        return folders[index].run(lines_of(prompts[index]), llm, deadline=deadlines[index])

    with llm.engine.core.observe(seen):
        results = in_threads(3, run)
    assert [result.succeeded for result in results] == [6, 6, 6]
    assert [texts(llm, files) for files in folders] == expected
    assert all(service.is_batch for service in seen.services)
    assert len({service.due for service in seen.services}) == 3
    assert_at_rest(llm)


def test_jobs_that_are_promoted_on_the_way_keep_their_tokens(llm):
    prompts = prompts_of(*LENGTHS, seed=5)
    expected = alone(llm, prompts, 16)
    run = llm.run_jobs([(prompt, greedy(16)) for prompt in prompts], window=8, deadline=100.0)
    found = {}
    for index, output in run.outputs():
        found[index] = output.outputs[0].token_ids
        if len(found) == 1:
            run.promote()
    assert [found[index] for index in range(len(prompts))] == expected
    assert run.promoted >= len(prompts) - 2
    assert ask(llm, lambda scheduler, _: scheduler.meshes[0].shared.interactive.count) == 0
    assert_at_rest(llm)
