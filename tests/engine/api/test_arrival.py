"""When a request counts as arrived: before it is tokenised, whichever way it came."""

import asyncio

import pytest
from helpers.fake_core import CONFIG, FakeCore
from helpers.tiny_gguf import CHAT_TEMPLATE, TOKENIZER
from twinmesh import LLM, AsyncLLM, SamplingParams
from twinmesh.engine.startup.build import Engine
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

PARAMS = SamplingParams(max_tokens=2)
TURN = [{"role": "user", "content": "sea"}]


class Slow:
    """A tokenizer during whose work an hour passes. `blocks`: of each list of texts, how many requests had entered
    the engine before, and its length."""

    def __init__(self, core):
        self._core, self._tokenizer, self.blocks = core, tokenizer_from_gguf(TOKENIZER), []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode(self, *args, **options):
        self._core.now += 3600
        return self._tokenizer.encode(*args, **options)

    def encode_batch(self, texts, **options):
        self._core.now += 3600
        self.blocks.append((len(self._core.arrivals), len(texts)))
        return self._tokenizer.encode_batch(texts, **options)


class StampedCore(FakeCore):
    """Its clock stands still unless something is tokenised."""

    def __init__(self, **options):
        super().__init__(**options)
        self.now, self.arrivals = 7.0, []

    def clock(self):
        return self.now

    def submit(self, submissions, **options):
        self.arrivals += [submission.arrival for submission in submissions]
        super().submit(submissions, **options)


@pytest.fixture
def core():
    return StampedCore(answers=True)


def make(kind, core):
    tokenizer = Slow(core)
    return kind.from_engine(Engine(core, CONFIG, tokenizer, ChatTemplate(CHAT_TEMPLATE, tokenizer, name="tiny")))


def test_all_prompts_of_generate_arrive_as_it_is_entered(core):
    make(LLM, core).generate(["sea"] * 100, PARAMS)
    assert core.now > 3600
    assert core.arrivals == [7.0] * 100


@pytest.mark.parametrize(("conversations", "count"), [(TURN, 1), (TURN * 2, 1), ([TURN], 1), ([TURN] * 40, 40)])
def test_all_conversations_of_chat_arrive_as_it_is_entered(core, conversations, count):
    make(LLM, core).chat(conversations, PARAMS)
    assert core.now > 3600
    assert core.arrivals == [7.0] * count


@pytest.mark.parametrize("how", ["stream", "add_request"])
def test_one_request_arrives_as_its_method_is_entered(core, how):
    llm = make(LLM, core)
    arguments = {"stream": ("sea", PARAMS), "add_request": ("a", "sea", PARAMS)}[how]
    getattr(llm, how)(*arguments)
    assert core.now > 3600
    assert core.arrivals == [7.0]


def test_a_job_arrives_as_it_is_taken_from_its_source(core):
    llm = make(LLM, core)
    taken = []

    def source():
        for _ in range(3):
            taken.append(core.now)
            yield "sea", PARAMS

    assert len(list(llm.as_completed(source(), window=1))) == 3
    assert core.arrivals == taken
    assert len(set(taken)) == 3


def test_a_job_that_was_checked_before_keeps_its_arrival(core):
    llm = make(LLM, core)
    jobs = [llm.check_request("sea", PARAMS), llm.check_request("sea", PARAMS, arrival=1.5)]
    list(llm.as_completed(jobs))
    assert core.arrivals == [7.0, 1.5]


def test_a_coroutines_request_arrives_with_its_first_iteration(core):
    async def run():
        async for _ in make(AsyncLLM, core).generate("sea", PARAMS):
            pass

    asyncio.run(run())
    assert core.arrivals == [7.0]


def test_devices_work_while_a_long_list_is_tokenised(core):
    llm = make(LLM, core)
    llm.generate(["sea"] * 200, PARAMS)
    blocks = llm.tokenizer.blocks
    assert [before for before, _ in blocks] == [sum(size for _, size in blocks[:i]) for i in range(len(blocks))]
    assert len(blocks) > 2


def test_devices_work_while_many_conversations_are_tokenised(core):
    llm = make(LLM, core)
    llm.chat([TURN] * 200, PARAMS)
    blocks = llm.tokenizer.blocks
    assert [before for before, _ in blocks] == [sum(size for _, size in blocks[:i]) for i in range(len(blocks))]
    assert len(blocks) > 2


def test_a_text_that_is_too_long_aborts_what_was_started():
    core = StampedCore()
    with pytest.raises(ValueError, match="shorten it"):
        make(LLM, core).generate(["sea"] * 40 + ["sea" * 100], PARAMS)
    assert len(core.said) == 32
    assert not core.running
