"""Where as many requests wait as may: calls that bring one are refused, calls that bring many wait."""

import asyncio
import threading

import pytest
from helpers.core_engine import greedy, make_engine, model_with_windows, prompts_of
from twinmesh import AsyncLLM, Overloaded
from twinmesh.engine.options import EngineOptions

KEPT = []
MODEL = model_with_windows(None)


class Full:
    """An engine whose one slot is taken and whose waiting room, of two, is full, as long as the block goes on."""

    def __init__(self, llm):
        self._llm, self._go_on = llm, threading.Event()

    def __enter__(self):
        entered = threading.Event()

        def hold(scheduler, executor):
            entered.set()
            self._go_on.wait(60)

        thread = threading.Thread(target=lambda: self._llm.engine.core.inspect(hold))
        thread.start()
        entered.wait(60)
        self.streams = [self._llm.stream(prompt, greedy(3)) for prompt in prompts_of(5, 6)]
        return self

    def __exit__(self, *error):
        self._go_on.set()


@pytest.fixture
def llm():
    with make_engine(MODEL, max_waiting=2, max_num_seqs=1, decode_buckets=(1,)) as llm:
        yield llm


def test_calls_that_bring_one_request_are_refused_and_told_when_to_try_again(llm):
    with Full(llm) as full:
        for call in (
            lambda: llm.stream([5, 6, 7], greedy(3)),
            lambda: llm.add_request("x", [5, 6, 7], greedy(3)),
        ):
            with pytest.raises(Overloaded, match=r"try again in .* s\.") as error:
                call()
            assert 0.1 <= error.value.retry_after <= 600
        assert not llm.has_unfinished_requests()
    assert [len(stream.result().outputs[0].token_ids) for stream in full.streams] == [3, 3]
    llm.add_request("x", [5, 6, 7], greedy(3))  # the name was not taken
    while llm.has_unfinished_requests():
        llm.step()


def test_an_interrupted_call_leaves_its_room(llm, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.core, "check_health", interrupt)  # asked once they have entered
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                llm.stream([5, 6, 7], greedy(3))
    assert len(llm.stream([5, 6, 7], greedy(3)).result().outputs[0].token_ids) == 3


def test_a_coroutine_is_refused_too(llm):
    front = AsyncLLM.from_engine(llm.engine)
    KEPT.append(front)  # an engine is closed with any of its fronts that is dropped

    async def generate():
        async for _ in front.generate([5, 6, 7], greedy(3)):
            pass

    with Full(llm), pytest.raises(Overloaded):
        asyncio.run(generate())


def test_lists_wait_and_are_answered_in_full(llm):
    with Full(llm):
        results = []
        thread = threading.Thread(target=lambda: results.extend(llm.generate(prompts_of(*[5] * 20), greedy(3))))
        thread.start()
    thread.join(60)
    assert [len(output.outputs[0].token_ids) for output in results] == [3] * 20
    jobs = [(prompt, greedy(2)) for prompt in prompts_of(*[4] * 20)]
    assert sorted(index for index, _ in llm.as_completed(jobs)) == list(range(20))
    assert [len(score.token_ids) for score in llm.score([[5, 6]] * 8, [[7, 8]] * 8)] == [2] * 8


@pytest.mark.parametrize("name", ["max_waiting", "max_waiting_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_bound_that_is_no_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is not usable: it must be a whole number, 1 or more"):
        EngineOptions("", **{name: value})
