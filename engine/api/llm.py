"""`LLM`: the engine as a Python object. Prompts in, texts and log-probabilities out; `client.py` does what
`AsyncLLM` needs as well, `core/` the rest.

Every method may be called from any thread; the requests of all callers run in the same batches, in the
policy's order. `step` alone is for one thread at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Unpack

from ...models.text.chat import ChatOptions, ReasoningEffort
from ...models.text.chat_messages import Message, Tool
from ..chat.tool_use import ToolChoice, read_tool_use
from ..config import check_whole_number
from ..core.submission import Update
from ..host.progress import Progress
from .base import DRAIN_TIMEOUT, BaseLLM
from .beam_search import BeamSearch, BeamSearchOutput, BeamSearchParams, check_search
from .job import Job
from .job_run import JobRun
from .new_params import named_params
from .outputs import RequestOutput, Score
from .pooling_params import PoolingParams
from .prompts import PromptLike, as_list, check_continuation, check_ids_or_text, check_texts
from .research import EmbeddingRequestOutput, HiddenStates, ParameterInfo, Pooling, PromptLogits, Research
from .sampling_params import SamplingParams
from .scorer import Scorer
from .service_options import ServiceOptions, ServicesOptions, service_of, services_of
from .streams import HandDriven, RequestStream
from .trace_replay import replayed, scoring_of
from .vllm_names import names_what_is_missing
from .vllm_tables import GENERATE

if TYPE_CHECKING:
    from .vllm_engine import LLMEngine


class LLM(BaseLLM):
    """A model on its meshes, ready to generate. Use it as a context manager, or call `close`.

    The options are those of `EngineOptions`. Making an engine loads the model and compiles every program, which takes
    seconds to minutes; nothing compiles afterwards. An option, a model's file, devices or memory that cannot be used is
    a ValueError that says what to change.

    An engine that is dropped or still open when the program ends is closed then.
    """

    def _prepare(self) -> None:
        self._hand_driven = HandDriven(self._client)
        self._scorer = Scorer(self._client)
        self._research = Research(self.engine.core, self.tokenizer, self.config.max_model_len)

    @names_what_is_missing("LLM.generate", GENERATE, ServicesOptions)
    def generate(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = False,
        **service: Unpack[ServicesOptions],
    ) -> list[RequestOutput]:
        """Complete prompts and return the results in their order.

        Args:
            prompts: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, which may have a "cache_salt": its
                cached pages serve prompts of the same salt alone. One, or many in a list, a generator or a series.
                Token ids are a list or an array of one dimension: numpy's, JAX's, torch's; an array of two dimensions
                is a prompt a row.
            sampling_params: one for all prompts, or one for each; None: the defaults.
            use_tqdm: say on stderr how many are answered.
            service: how they are to be served, see `ServicesOptions`.

        Raises:
            ValueError: a prompt is empty, too long or unreadable, or parameters do not go with the model. What was
                started of the list is aborted.
            EngineError: the engine is closed or has failed.
            KeyboardInterrupt: Ctrl-C; this call's requests are aborted, and the engine goes on.
        """
        arrival, many = self._client.clock(), as_list(prompts)
        services = services_of(service, len(many))
        jobs = self._client.check_all(many, _one_each(sampling_params, len(many)), arrival, services)
        return self._run_all(jobs, len(many), use_tqdm)

    @names_what_is_missing("LLM.chat", GENERATE, ServicesOptions)
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reasoning_effort: ReasoningEffort | None = None,
        **service: Unpack[ServicesOptions],
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, each a list of {"role": ..., "content": ...}.

        Of models whose format of answers is known, outputs have `reasoning`, `content` and `tool_calls`; what a
        function is called with is also in the text of the answer, in the model's own form. `tool_choice` is "auto" (the
        model decides, as without it), "none" (calls are not read), "required" (the answer is calls and nothing else) or
        {"type": "function", "function": {"name": ...}} (the answer is one call of it); parallel_tool_calls=False means
        at most one call. The other arguments are those of `chat_prompt`, for every conversation, and of
        `ServicesOptions`. Raises as `generate` does, and ValueError where the model has no chat template, the template
        refuses the messages or would leave some of them out, or tools cannot be called as is asked for.
        """
        arrival, use = self._client.clock(), read_tool_use(tools, tool_choice, parallel_tool_calls)
        options: ChatOptions = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
            "reasoning_effort": reasoning_effort,
        }
        many = isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations = messages if many else [messages]
        services = services_of(service, len(conversations))
        rendered = [self._chat.prompt(one, tools, **options) for one in conversations]  # type: ignore[arg-type]
        params = _one_each(sampling_params, len(rendered))
        held = [
            self._held(one, prompt, conversation, use, options)  # type: ignore[arg-type]
            for one, prompt, conversation in zip(params, rendered, conversations, strict=True)
        ]
        answers = [self._chat.answers(one, use, options) for one in conversations]  # type: ignore[arg-type]
        jobs = self._client.check_rendered(
            rendered, [one for one, _ in held], arrival, services, answers, [end for _, end in held]
        )
        return self._run_all(jobs, len(rendered), use_tqdm)

    @names_what_is_missing("LLM.stream", GENERATE, ServiceOptions)
    def stream(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams | None = None,
        **service: Unpack[ServiceOptions],
    ) -> RequestStream:
        """Start one request, served as `ServiceOptions` say; iterate over the result for its text as it comes.

        Raises as `generate` does, and Overloaded where as many requests wait as may.
        """
        return self._stream(self._client.check(prompt, sampling_params, service=service_of(service)))

    @names_what_is_missing("LLM.stream_chat", GENERATE, ServiceOptions)
    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reasoning_effort: ReasoningEffort | None = None,
        **service: Unpack[ServiceOptions],
    ) -> RequestStream:
        """Start the answer to one conversation as `stream` does; deltas have what is new of its parts.

        The arguments are those of `chat`, and it raises as that and as `stream` do.
        """
        options: ChatOptions = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
            "reasoning_effort": reasoning_effort,
        }
        job = self.check_chat(
            messages, sampling_params, tools, options=options, service=service,
            tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls,
        )  # fmt: skip
        return self._stream(job)

    def _stream(self, job: Job) -> RequestStream:
        updates: SimpleQueue[Update] = SimpleQueue()
        ticket = self._client.ticket(job, lambda _, update: updates.put(update))
        stream = RequestStream(ticket.collector, updates, self._client.withdraw)
        try:
            self._client.start(ticket, may_refuse=True)
        except BaseException:
            stream.close()
            raise
        return stream

    def score(
        self, prompts: PromptLike | Iterable[PromptLike], continuations: PromptLike | Iterable[PromptLike]
    ) -> list[Score]:
        """Score continuations: how likely each is after its prompt, in one forward pass each. Those that differ in
        their last token alone share one, and what prompts begin with alike is computed once, where the prefix cache is
        on.

        Args:
            prompts: as for `generate`; one may go with several continuations.
            continuations: text or token ids. They are tokenised by themselves: a text usually starts with a space.

        Raises:
            ValueError: numbers that do not match, an empty continuation, or a prompt and continuation that `generate`
                would refuse as a prompt. Nothing was started.
            EngineError: the engine is closed, or a request failed or was aborted.
        """
        befores, afters = as_list(prompts), as_list(continuations)
        if len(befores) == 1:
            befores = befores * len(afters)
        if len(befores) != len(afters):
            raise ValueError(
                f"There are {len(befores)} prompts and {len(afters)} continuations: give one prompt, or one for each."
            )
        bounds = self.tokenizer, self.config.max_model_len
        checked = check_texts([check_ids_or_text(before, *bounds) for before in befores], *bounds)
        wholes = [check_continuation(prompt, after, *bounds) for prompt, after in zip(checked, afters, strict=True)]
        return self._scorer.score([len(prompt.ids) for prompt in checked], wholes)

    def hidden_states(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        *,
        layers: Sequence[int] = (-1,),
        positions: Sequence[int] | None = None,
    ) -> list[HiddenStates]:
        """Compute hidden states of prompts, in a step of its own beside what the engine serves.

        It is compiled on the first call of each size, and for each choice of layers; the engine's memory does not grow
        with the number of prompts. Parameters are those at the time of the call.

        Args:
            prompts: as for `generate`.
            layers: counted as transformers' `hidden_states`: 0 for the embeddings, l for what the l-th layer gives, the
                last, also -1, for what the final norm makes of it.
            positions: of which of a prompt's tokens, from 0 on or from -1 backwards; None: of all.

        Raises:
            ValueError: prompts that `generate` would refuse, layers or positions that there are not, or an engine whose
                meshes are in other processes. Nothing was computed.
            EngineError: the engine is closed, or the device has no memory left for the step.
        """
        return self._research.hidden_states(prompts, layers, positions)

    def logits(
        self, prompts: PromptLike | Iterable[PromptLike], *, positions: Sequence[int] | None = (-1,)
    ) -> list[PromptLogits]:
        """Compute the logits of the whole vocabulary after tokens of prompts, in a step of its own.

        `positions`: after which of a prompt's tokens, from 0 on or from -1 backwards; None: after all. The head runs on
        `scored_rows` of them at a time, which are 8 to 64. Else as `hidden_states`, and raises as it does.
        """
        return self._research.logits(prompts, positions)

    @names_what_is_missing("LLM.embed", GENERATE)
    def embed(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[EmbeddingRequestOutput]:
        """Compute an embedding of each prompt, from the hidden states after the final norm.

        Args:
            prompts: as for `generate`; a text gets the special tokens that it gets there.
            pooling: "last", the last token's state; "mean", their mean; "cls", the first token's.
            normalize: whether to divide it by its length.
            pooling_params: vLLM's, one for all prompts or one for each; what they say goes before `normalize`.
            use_tqdm: as for `generate`.

        Returns:
            Outputs whose `outputs.embedding` is a list of numbers, as vLLM has them.

        Raises as `hidden_states` does, and ValueError for another pooling, or more dimensions than there are.
        """
        return self._research.embed(prompts, pooling, normalize, pooling_params, use_tqdm)

    def parameters(self) -> dict[str, ParameterInfo]:
        """Return the shape and dtype of each parameter by the name that `update_params` takes.

        Raises:
            ValueError: an engine whose meshes are in other processes.
            EngineError: the engine is closed or has failed.
        """
        return self._research.parameters()

    @names_what_is_missing("LLM.add_request", GENERATE, ServiceOptions)
    def add_request(
        self,
        request_id: str,
        prompt: PromptLike,
        sampling_params: SamplingParams | None = None,
        **service: Unpack[ServiceOptions],
    ) -> None:
        """Start a request to be followed with `step`, as vLLM's `LLMEngine` does, served as `ServiceOptions` say.

        Raises as `generate` does, ValueError where the name is in use, and Overloaded where as many requests wait as
        may.
        """
        self._hand_driven.add(request_id, self._client.check(prompt, sampling_params, service=service_of(service)))

    def step(self) -> list[RequestOutput]:
        """Wait for the next update of requests from `add_request`, and return what the updated ones made so far.

        The engine computes on a thread of its own, so that a step is not one step of the model: an output may hold
        several new tokens, and nothing waits for the next call. Each output holds all completions from their first
        token on; a request's last has `finished` set, also when it was aborted. An empty list: nothing is unfinished.
        """
        return self._hand_driven.step()

    def has_unfinished_requests(self) -> bool:
        """Return whether `step` has more to return."""
        return self._hand_driven.has_unfinished

    def abort(self, request_id: str) -> None:
        """End all completions of a request early, with finish_reason "abort" and the tokens so far.

        Unknown and finished requests are ignored.
        """
        self._client.abort(request_id)

    def update_params(self, params: Mapping[str, Any]) -> None:
        """Replace parameters of the model on every mesh; return when new requests run with them.

        Running requests finish with the old parameters, and requests that arrive meanwhile wait. Nothing compiles.
        Cached prefixes are dropped.

        Args:
            params: arrays by name, of JAX, numpy, or what hands them over by DLPack or `__array__`, such as torch.
                Names are the model's, such as "layers.0.attention.q_proj", with the shape and dtype that `parameters`
                lists; or Hugging Face's, such as "model.layers.0.self_attn.q_proj.weight", as files on the hub have
                them, which are transposed, divided and cast as they are when they are loaded. Those left out stay as
                they are. Values are taken as they are, NaN and infinity included.

        Raises:
            ValueError: a name that the model does not have, another shape or dtype, or a part of a parameter. Nothing
                was replaced.
            EngineError: the engine is closed or has failed.
        """
        self.engine.core.update_params(named_params(params, self.engine.core))

    @names_what_is_missing("LLM.beam_search", GENERATE)
    def beam_search(
        self,
        prompts: PromptLike | Iterable[PromptLike],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Search for the most likely completions, as vLLM's method does: one request for each token of each beam.

        Args:
            prompts: as for `generate`.
            params: width, length and penalty.
            use_tqdm: as for `generate`, of each step.
            concurrency_limit: prompts that are searched together; None: all.

        Raises:
            ValueError: as `generate`, 2 * beam_width is more than `max_logprobs`, beams would not fit into
                `max_model_len`, or an engine that reports logits.
            EngineError: the engine is closed, or a request failed or was aborted.
        """
        eos = frozenset(self.tokenizer.eos_token_ids)
        given = [self.check_prompt(prompt) for prompt in as_list(prompts)]
        params = check_search(given, params, self.config)
        size = max(1, len(given)) if concurrency_limit is None else concurrency_limit
        check_whole_number("concurrency_limit", size, 1)

        def run(extended: list[dict[str, Any]], one: SamplingParams) -> list[RequestOutput]:
            return self.generate(extended, one, use_tqdm=use_tqdm)

        blocks = [given[start : start + size] for start in range(0, len(given), size)]
        found = [best for block in blocks for best in BeamSearch(block, params, eos, run).outputs()]
        for beam in (beam for best in found for beam in best):
            beam.text = self.tokenizer.decode(beam.tokens, params.skip_special_tokens)
        return [BeamSearchOutput(best) for best in found]

    @property
    def llm_engine(self) -> "LLMEngine":
        """Return this engine under the names of vLLM's `LLMEngine`."""
        from .vllm_engine import view

        return view(self)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Drop every cached prefix, and return True once that is done. Requests that run end first, and those that
        arrive meanwhile wait, so neither argument is needed.

        Raises:
            EngineError: the engine is closed or has failed.
        """
        self.engine.core.update_params({})
        return True

    def set_roles(
        self, roles: str | Mapping[int, str], *, drain_timeout: float = DRAIN_TIMEOUT
    ) -> Literal["reached", "superseded"]:
        """Change what the meshes of a pool are for, while they run; return when each has its role and nothing else.

        Meshes take their new roles at once. What runs in a role that a mesh has no more is finished there, or moves to
        another mesh if that takes less; nothing is lost, compiled or loaded. A later call takes the place of one that
        has not returned, which then returns "superseded", as does this one if there is a later one; else "reached".
        `update_params` that runs ends first.

        Args:
            roles: so many meshes of each role, such as "prefill=2,decode=2" or "both=1,decode=3", of which those
                change that have least to finish; or roles by mesh, such as {0: "prefill"}, and the others keep theirs.
            drain_timeout: the seconds that all of it may take.

        Raises:
            ValueError: the topology is no pool, there is no such role or mesh, the counts do not add up, or nobody
                would be left to prefill or to decode. Nothing has changed.
            TimeoutError: meshes had work left when the time was over. It says what held them, and which roles there are
                now: meshes that had changed keep their new roles as far as both phases have one, the others take work
                in their old roles again.
            EngineError: the engine is closed or has failed.
        """
        return self.engine.core.set_roles(roles, drain_timeout)

    def close(self) -> None:
        """Abort running requests, join the threads and free the device memory. Calling it again does nothing."""
        self.engine.core.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_all(self, jobs: Iterable[Job], count: int, use_tqdm: bool) -> list[RequestOutput]:
        """Run `count` jobs, and return their results in order."""
        outputs: list[RequestOutput | None] = [None] * count
        replays: dict[int, Job] = {}

        def runnable() -> Iterator[Job]:
            for index, job in enumerate(jobs):
                if job.params.trace_decode_token_ids is not None:
                    replays[index] = job
                    yield scoring_of(job, self._client)
                else:
                    yield job

        with (
            Progress("answered", count, "requests", shown=use_tqdm) as line,
            closing(JobRun(self._client, runnable(), None).results()) as results,
        ):
            for result in results:
                if result is not None:
                    index, collector = result
                    job = replays.get(index)
                    outputs[index] = collector.output() if job is None else replayed(collector, job, self._client)
                    line.advance(1)
        return [output for output in outputs if output is not None]


def _one_each(params: SamplingParams | Iterable[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Iterable) or isinstance(params, str | bytes | Mapping):
        raise ValueError(f"sampling_params of type {type(params).__name__} are not usable: give SamplingParams.")
    listed = list(params)
    if len(listed) != count:
        raise ValueError(f"There are {count} prompts and {len(listed)} sampling_params: give one, or one for each.")
    return listed
