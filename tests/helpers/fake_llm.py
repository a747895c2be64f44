"""An `LLM` without a model: it answers a prompt with the prompt, in an order and with the failures a test asks for."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from twinmesh.engine.api.outputs import CompletionOutput, RequestOutput, TextDelta
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.errors import EngineError
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
    config: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(max_num_seqs=2, page_size=4, topology=Topology.parse("both=1"))
    )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.is_closed = True

    def chat_prompt(self, messages, tools=None):
        if messages[0].get("role") != "user":
            raise ValueError("Message 0 must be the user's.")
        names = "".join(tool["function"]["name"] for tool in tools or ())
        return [1, *(ord(c) for c in names + messages[-1]["content"])]

    def check_prompt(self, prompt):
        ids = [ord(c) for c in prompt] if isinstance(prompt, str) else list(prompt)
        if len(ids) > 50:
            raise ValueError("The prompt is too long.")
        return SimpleNamespace(token_ids=ids)

    def check_health(self):
        if self.is_closed:
            raise EngineError("the engine is closed: make a new LLM.")

    def check_sampling_params(self, sampling_params):
        if sampling_params.stop_token_ids and max(sampling_params.stop_token_ids) > 1000:
            raise ValueError("stop_token_ids holds a token id that the model does not have.")

    def as_completed(self, jobs, *, window=None):
        waiting, running, finished, started = iter(jobs), [], 0, 0
        try:
            while True:
                while len(running) < window and (job := next(waiting, None)):
                    running.append((started, job))
                    started += 1
                self.most_in_flight = max(self.most_in_flight, len(running))
                if not running:
                    return
                if finished == self.interrupt_after:
                    raise KeyboardInterrupt
                index, (ids, sampling) = running.pop()
                self.sampling.append(sampling)
                yield index, self.output(index, [int(i) for i in ids], sampling.n)
                finished += 1
        finally:
            self.was_left_with = len(running)

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
