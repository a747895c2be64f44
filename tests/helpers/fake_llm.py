"""An `LLM` without a model: it answers a prompt with the prompt, in an order and with the failures a test asks for."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from twinmesh.engine.api.job import Job
from twinmesh.engine.api.outputs import CompletionOutput, RequestOutput, TextDelta
from twinmesh.engine.api.prompts import Prompt
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.chat.tool_use import read_tool_use
from twinmesh.engine.errors import EngineError
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.protocol.timeline import Timeline
from twinmesh.engine.topology import Topology


@dataclass
class FakeLLM:
    """An engine whose tokens are characters. The newest request in the engine finishes first."""

    interrupt_after: int | None = None  # Ctrl-C comes after so many results
    fail: str | None = None  # prompts with this text fail in the engine
    most_in_flight: int = 0
    was_left_with: int | None = None  # how many requests ran when the iteration was left
    is_closed: bool = False
    sampling: list[SamplingParams] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)
    chat_options: list[dict] = field(default_factory=list)
    answer_names: list[str] = field(default_factory=list)
    config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(max_num_seqs=2, page_size=4, topology=Topology.parse("both=1"))
    )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.is_closed = True

    def chat_prompt(self, messages, tools=None, **options):
        self.chat_options.append(options)
        if messages[0].get("role") != "user":
            raise ValueError("Message 0 must be the user's.")
        names = "".join(tool["function"]["name"] for tool in tools or ())
        return [1, *(ord(c) for c in names + messages[-1]["content"])]

    def check_prompt(self, prompt):
        ids = [ord(c) for c in prompt] if isinstance(prompt, str) else list(prompt)
        if len(ids) > 50:
            raise ValueError("The prompt is too long.")
        return SimpleNamespace(token_ids=ids)

    def clock(self):
        return 0.0

    def check_request(self, prompt, sampling_params, arrival=None):
        self.check_sampling_params(sampling_params)
        ids = np.array(self.check_prompt(prompt).token_ids, np.int32)
        return Job(Prompt(None, ids), sampling_params, SamplingPlan(temperature=1.0, seed=0), arrival)

    def check_chat(self, messages, sampling_params, tools=None, *, arrival=None, options=None, name=None, **choice):
        read_tool_use(tools, **choice)
        self.answer_names.append(name)
        return self.check_request(self.chat_prompt(messages, tools, **(options or {})), sampling_params, arrival)

    def check_health(self):
        if self.is_closed:
            raise EngineError("the engine is closed: make a new LLM.")

    def check_sampling_params(self, sampling_params):
        if sampling_params.stop_token_ids and max(sampling_params.stop_token_ids) > 1000:
            raise ValueError("stop_token_ids holds a token id that the model does not have.")

    def run_jobs(self, jobs, *, window=None, deadline=None):
        self.deadlines.append(deadline)
        return FakeRun(self, iter(jobs), window)

    def waits(self, run):
        """Whether nothing finishes for a while."""
        return False

    def stream(self, prompt, sampling_params):
        self.sampling.append(sampling_params)
        return FakeStream(self.output(0, self.check_prompt(prompt).token_ids), self.interrupt_after)

    def output(self, index, ids, n=1):
        text = "".join(map(chr, ids))
        failed = self.fail is not None and self.fail in text
        error = "the mesh was lost." if failed else None
        stamps = Timeline(0.0, kv_ready=0.11, finish=1.0, tokens=[0.1 + 0.01 * i for i in range(len(ids))])
        reason = "error" if failed else "stop"
        completions = [CompletionOutput(i, text, ids, None, None, reason, None, stamps) for i in range(n)]
        return RequestOutput(f"request-{index}", None, ids, None, completions, True, 0, error)


@dataclass
class FakeRun:
    """A run over jobs."""

    llm: FakeLLM
    jobs: object
    window: int
    tokens: int = 0
    asked: int = 0
    entered: int = 0
    promoted: int = 0
    every: float | None = None

    def outputs(self, every=None):
        llm, running, finished, self.every = self.llm, [], 0, every
        try:
            while True:
                while len(running) < self.window and (job := next(self.jobs, None)):
                    running.append((self.entered, job))
                    self.entered += 1
                    self.asked += len(job.prompt.ids) + job.params.max_tokens
                llm.most_in_flight = max(llm.most_in_flight, len(running))
                if not running:
                    return
                if finished == llm.interrupt_after:
                    raise KeyboardInterrupt
                if every is not None and llm.waits(self):
                    yield None
                    continue
                index, job = running.pop()
                llm.sampling.append(job.params)
                self.tokens += 2 * len(job.prompt.ids)
                yield index, llm.output(index, job.prompt.token_ids, job.params.n)
                finished += 1
        finally:
            llm.was_left_with = len(running)

    def promote(self):
        self.promoted += self.window


@dataclass
class FakeStream:
    """A stream of an output's text, one character at a time."""

    output: RequestOutput
    interrupt_after: int | None

    def __iter__(self):
        for count, char in enumerate(self.output.outputs[0].text):
            if count == self.interrupt_after:
                raise KeyboardInterrupt
            yield TextDelta(char, [ord(char)], None)

    def result(self):
        return self.output


class Meddler(FakeLLM):
    """An engine that calls `meddle` when it is given the first prompt."""

    def __init__(self, meddle):
        super().__init__()
        self.meddle = meddle

    def check_prompt(self, prompt):
        if prompt == "0":
            self.meddle()
        return super().check_prompt(prompt)
