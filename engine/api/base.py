"""What `LLM` and `AsyncLLM` have in common: how an engine is made of its options, and methods that do not wait.

The options are described in `options.py`, once; they are in the signature and the docstring of both classes.
"""

import inspect
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Self, Unpack

from ...models.text.chat import ChatOptions, ReasoningEffort
from ...models.text.chat_messages import Message, Tool
from ...models.text.tokenizer import Tokenizer
from ..chat.chat_format import ChatFormat
from ..chat.tool_use import ToolChoice, ToolUse, read_tool_use
from ..config import EngineConfig, check_whole_number
from ..metrics.metrics import Metrics
from ..metrics.prometheus import EngineCollector, as_prometheus
from ..options import EngineOptions, as_text, documentation, with_options
from ..startup.build import Engine, start_engine
from ..structured.params import StructuredOutputsParams
from .client import EngineClient
from .job import Job
from .job_run import JobRun
from .outputs import RequestOutput
from .prompts import Prompt, PromptLike, check_prompt
from .sampling_params import SamplingParams, check_params
from .service_options import ServiceOptions, check_deadline, service_of
from .vllm_methods import VllmMethods
from .vllm_names import unknown
from .vllm_options import adapt
from .vllm_tables import ENGINE

DRAIN_TIMEOUT = 30.0  # seconds that a change of roles may take


def _unknown_option(engine: type, name: str) -> str:
    return unknown(engine.__name__, "option", name, ENGINE, documentation())


class BaseLLM(VllmMethods):
    """An engine made from its options: the base of `LLM` and `AsyncLLM`. Methods may be called from any thread.

    An engine that is dropped or still open when the program ends is closed then.
    """

    @with_options(EngineOptions, _unknown_option, adapt)
    def __init__(self, options: EngineOptions) -> None:
        self._serve(start_engine(options), options.seed)

    @classmethod
    def from_engine(cls, engine: Engine, *, seed: int = 0) -> Self:
        """Make an object of this class from an engine that runs already; closing the object closes the engine.

        This is for engines whose parts are made by hand, for example with weights that come from no file; see
        `startup/build.py`. `seed` is the option of this name.
        """
        self = cls.__new__(cls)
        self._serve(engine, seed)
        return self

    def _serve(self, engine: Engine, seed: int) -> None:
        self.engine: Engine = engine
        self.config: EngineConfig = engine.config
        self.tokenizer = engine.tokenizer
        self._chat = engine.chat_format or ChatFormat(engine.tokenizer, engine.chat_template)
        self._client = EngineClient(engine, seed)
        self._prepare()
        # At exit too: threads that still wait for a device when Python ends would take the process down with them.
        weakref.finalize(self, engine.core.close)

    def __init_subclass__(cls) -> None:
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{as_text()}"

    def _prepare(self) -> None:
        """Set up what a subclass needs besides."""

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer, also `tokenizer`: `encode` a text to ids, `decode` ids to a text.

        A chat template is not the tokenizer's here: `chat_prompt` applies it.
        """
        return self.tokenizer

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reasoning_effort: ReasoningEffort | None = None,
    ) -> list[int]:
        """Turn a conversation into token ids with the model's chat template, or in the harmony format.

        Args:
            messages: dicts with "role" and "content", also as OpenAI's API writes them: contents in parts, tool calls,
                reasoning, whole messages of a response.
            tools: JSON schemas of functions that the model may call; None: none.
            add_generation_prompt: whether to open the assistant's turn at the end.
            continue_final_message: whether to leave the last message open, for the model to go on with it; it needs
                add_generation_prompt=False, as in vLLM.
            chat_template: another template, a Jinja text or the name of one of the model's; "harmony": OpenAI's harmony
                format, for models that have its markers; None: the model's template, or harmony where it has none.
            chat_template_kwargs: variables of the template, such as {"enable_thinking": False}.
            reasoning_effort: how long to think first, "low", "medium" or "high", where the template reads that.

        Raises:
            ValueError: no template, messages, tools or variables that it refuses or would leave out, or far more tokens
                than max_model_len.
        """
        return self._chat.encode(
            messages,
            tools,
            at_most=self.config.max_model_len,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            reasoning_effort=reasoning_effort,
        )

    def check_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        tools: Sequence[Tool] | None = None,
        *,
        arrival: float | None = None,
        options: ChatOptions | None = None,
        service: ServiceOptions | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool | None = None,
        name: str | None = None,
    ) -> Job:
        """Do for a conversation what `check_request` does for a prompt; its answer is read into parts.

        Args:
            messages: as for `chat_prompt`.
            sampling_params: None: the defaults.
            tools: as for `chat_prompt`.
            arrival: as for `check_request`.
            options: the other arguments of `chat_prompt`.
            service: how it is to be served.
            tool_choice: which tools may and must be called, see `LLM.chat`.
            parallel_tool_calls: likewise, whether there may be several calls.
            name: what ids of the answer's tool calls are made of; None: they are like no others.

        Raises:
            ValueError: as `chat_prompt` and `check_request`, or tools that cannot be called.
        """
        use = read_tool_use(tools, tool_choice, parallel_tool_calls)
        arrival = self._client.clock() if arrival is None else arrival
        rendered = self._chat.prompt(messages, tools, **(options or {}))
        params = SamplingParams() if sampling_params is None else sampling_params
        params, end = self._held(params, rendered, messages, use, options or {})
        answers, served = self._chat.answers(messages, use, options or {}), service_of(service or {})
        return replace(self._client.check_chat(rendered, params, arrival, served, answers, end), name=name)

    def _held(
        self,
        params: SamplingParams,
        prompt: str | Sequence[int],
        messages: Sequence[Message],
        use: ToolUse,
        options: ChatOptions,
    ) -> tuple[SamplingParams, bytes | None]:
        """Return what an answer has to keep to besides, where tools have to be called, and behind which pattern that
        begins, where the parameters do not say.

        Raises:
            ValueError: it has to keep to something else, or calls cannot be kept to.
        """
        if not use.is_forced:
            is_bound = check_params(params).structured_outputs is not None
            return params, self._chat.reasoning_end(prompt, messages, options) if is_bound else None
        if check_params(params).structured_outputs is not None:
            raise ValueError(
                "structured_outputs and a tool_choice that asks for a call exclude each other: leave one of them out."
            )
        lark, after = self._chat.grammar(prompt, messages, use, options)
        return replace(params, structured_outputs=StructuredOutputsParams(grammar=lark, after=after)), None

    def check_prompt(self, prompt: PromptLike) -> Prompt:
        """Turn a prompt into token ids that this engine can run.

        Raises:
            ValueError: empty, too long, ids outside the vocabulary, or of another form.
        """
        return check_prompt(prompt, self.tokenizer, self.config.max_model_len)

    def check_request(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams,
        arrival: float | None = None,
        **service: Unpack[ServiceOptions],
    ) -> Job:
        """Do all that can be done for a request before it starts, once: `as_completed` takes what this returns.

        `arrival`: when it arrived, by `clock`; None: now. `service`: how it is to be served, see `ServiceOptions`.

        Raises:
            ValueError: as `check_prompt` and `check_sampling_params`.
        """
        return self._client.check(prompt, sampling_params, arrival, service_of(service))

    def as_completed(
        self,
        jobs: Iterable[Job | tuple[PromptLike, SamplingParams] | None],
        *,
        window: int | None = None,
        deadline: float | None = None,
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Run jobs, each a prompt and its sampling parameters, and yield (index, result) of each as it finishes.

        They are batch work: they use what interactive requests, those of all other methods, leave of the engine, and
        give way to them. Waiting for a result blocks: beside coroutines iterate in a thread of its own.

        Args:
            jobs: what `check_request` gave, or a prompt and parameters, which are checked now; read as they are needed.
                One may be None while others run: no job is ready yet, results come first, and it is asked for again
                whenever a request has an update. Where nothing runs, None ends the iteration.
            window: how many may be in the engine at once, 1 or more; None: all of them.
            deadline: seconds from now by which all are wanted; of several such calls the earliest goes first. None:
                after those that have one. Nothing ends when it passes.

        Leaving the iteration early aborts what is left. Raises as `generate` does; jobs before a bad one are aborted.
        """
        return _those_finished(self.run_jobs(jobs, window=window, deadline=deadline))

    def run_jobs(
        self,
        jobs: Iterable[Job | tuple[PromptLike, SamplingParams] | None],
        *,
        window: int | None = None,
        deadline: float | None = None,
    ) -> JobRun:
        """Make the run of `as_completed` without starting it, for callers that follow how far it has come.

        Raises:
            ValueError: a window or deadline out of range.
        """
        if window is not None:
            check_whole_number("window", window, 1)
        if deadline is not None:
            check_deadline(deadline)
        due = None if deadline is None else self._client.clock() + deadline
        checked = (job if job is None or isinstance(job, Job) else self._client.check(*job) for job in jobs)
        return JobRun(self._client, checked, window, is_batch=True, due=due)

    def clock(self) -> float:
        """Return the time on the engine's clock, which stamps the timelines, in seconds."""
        return self._client.clock()

    def check_sampling_params(self, sampling_params: SamplingParams) -> None:
        """Refuse parameters that do not go with this model's vocabulary.

        Raises:
            ValueError: token ids outside it, bad words that are too many or too long, no token left to choose,
                structured outputs that cannot be kept to, or something that was assigned is out of range.
        """
        params = check_params(sampling_params).clone()
        self._client.resolve(params)
        self._client.grammar(params)

    def check_health(self) -> None:
        """Check that the engine takes requests, as vLLM's method of this name does.

        Raises:
            EngineError: it is closed or has failed.
        """
        self.engine.core.check_health()

    def metrics(self) -> Metrics:
        """Return counts and latencies so far."""
        return self.engine.core.metrics()

    def metrics_text(self) -> str:
        """Return the figures as Prometheus text, for a page of one's own; it waits for nothing.

        Raises:
            ValueError: prometheus-client is not installed.
        """
        return as_prometheus(self.engine.core.metrics)

    def metrics_collector(self) -> EngineCollector:
        """Return what prometheus-client reads the figures from, to be registered in a registry of one's own:
        `prometheus_client.REGISTRY.register(llm.metrics_collector())`. A registry takes that of one engine. It does not
        keep the engine alive.

        Raises:
            ValueError: prometheus-client is not installed.
        """
        return EngineCollector(self.engine.core.metrics)

    def roles(self) -> dict[int, str]:
        """Return each mesh's role now, by its number: "prefill", "decode" or "both"; of a pool's mesh that has work
        left of another, for example "decode (draining prefill)"."""
        return dict(enumerate(self.engine.core.roles()))

    def preempt(self, request_id: str) -> None:
        """Give up a request's KV and compute it again later, with the tokens it has; it may wait for its turn.

        For experiments: the engine preempts by itself where memory asks for it. Unknown and finished requests are
        ignored, and so is one that has not begun.
        """
        self._client.preempt(request_id)

    def migrate(self, request_id: str, destination: int | None = None) -> None:
        """Move a decoding request's KV to another decoding mesh, counted from 0 in the topology's order; None: any.

        Ignored where the request is not decoding, or where there is no room.
        """
        self._client.migrate(request_id, destination)


def _those_finished(run: JobRun) -> Generator[tuple[int, RequestOutput], None, None]:
    with closing(run.outputs()) as results:
        yield from (result for result in results if result is not None)
