"""`LLM`: the engine as a Python object. Checks prompts, turns text into tokens and back; `core.py` does the rest.

Every method may be called from any thread; the requests of all callers run in the same batches, first come first
served.
"""

import itertools
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, cast

import jax
import numpy as np
from jax.typing import DTypeLike
from tqdm import tqdm

from ..models.chat import Message
from .config import Topology, check_whole_number
from .core import Submission, Update
from .executor import Payload
from .loader import Options, start_engine
from .metrics import Metrics
from .outputs import RequestOutput
from .request import Request, Timeline
from .sampling_params import SamplingParams
from .stream import Prompt, RequestStream, make_output, shown

type PromptLike = str | Sequence[int] | np.ndarray | Mapping[str, Any]
type Job = tuple[PromptLike, SamplingParams]


class LLM:
    """A model on its meshes, ready to generate. Use it as a context manager, or call `close`.

    An engine that is dropped or still open when the program ends is closed then.

    Args:
        model: a GGUF file, or the name of a model that `twinmesh fetch` has fetched.
        topology: the meshes, such as "both=1" or "prefill=1,decode=1".
        dtype: of weights, activations and KV: float32, bfloat16 or float16, by name or as JAX's.
        max_model_len: prompt and completion together, in tokens; None: the model's context, or what memory allows.
        page_size: tokens per KV page.
        max_num_seqs: requests that a mesh holds at once.
        prefill_buckets: token counts that prefill steps are padded to, ascending; the last is the chunk size.
        decode_buckets: row counts that decode steps are padded to, ascending up to max_num_seqs; None: a few of them.
        kv_cache_bytes: the most memory per mesh for KV pages and hand-offs; None: nine tenths of what is free on a GPU,
            and on CPU a quarter of what the machine has available for all meshes together, at most 2 GiB each.
        seed: of the engine; requests without a seed of their own draw theirs from it and from their number.
        devices: what to run on, one per mesh in the topology's order; None: JAX's. The same device may be named twice.
        progress: show bars on stderr while weights load and programs compile.

    Raises:
        ValueError: an option, the model's files, the devices or the memory do not do; one sentence says what to change.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        topology: str | Topology = "both=1",
        dtype: DTypeLike = "float32",
        max_model_len: int | None = None,
        page_size: int = 64,
        max_num_seqs: int = 32,
        prefill_buckets: tuple[int, ...] = (64, 256, 512),
        decode_buckets: tuple[int, ...] | None = None,
        kv_cache_bytes: int | None = None,
        seed: int = 0,
        devices: Sequence[jax.Device] | None = None,
        progress: bool = False,
    ) -> None:
        """Load the model and compile every program; nothing compiles afterwards."""
        check_whole_number("seed", seed, 0)
        parsed = Topology.parse(topology) if isinstance(topology, str) else topology
        options = Options(
            parsed, dtype, max_model_len, page_size, max_num_seqs, prefill_buckets, decode_buckets, kv_cache_bytes,
            devices, progress,
        )  # fmt: skip
        engine = start_engine(model, options)
        self.config = engine.config
        self.tokenizer, self._chat_template = engine.tokenizer, engine.chat_template
        self._core, self._seed, self._numbers = engine.core, seed, itertools.count()
        # At exit too: threads that still wait for a device when Python ends would take the process down with them.
        weakref.finalize(self, engine.core.close)

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts and return the results in their order.

        Args:
            prompts: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; one, or a list of them.
            sampling_params: one for all prompts, or one for each; None: the defaults.
            use_tqdm: show a progress bar on stderr.

        Raises:
            ValueError: a prompt is empty, too long or unreadable. Nothing was started.
            EngineError: the engine is closed or has failed.
            KeyboardInterrupt: Ctrl-C; this call's requests are aborted, and the engine goes on.
        """
        many = _as_list(prompts)
        sampling = _one_each(sampling_params, len(many))
        checked = [self.check_prompt(prompt) for prompt in many]
        outputs: list[RequestOutput | None] = [None] * len(many)
        with tqdm(total=len(many), unit="req", disable=not use_tqdm) as bar:
            for index, output in self._run(zip(checked, sampling, strict=True), None):
                outputs[index] = output
                bar.update()
        return [output for output in outputs if output is not None]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or a list of them, each a list of {"role": ..., "content": ...}.

        Raises as `generate` does, and ValueError where the model has no chat template or it refuses the messages.
        """
        single = not messages or isinstance(messages[0], Mapping)
        conversations = [messages] if single else messages
        prompts = [self.chat_prompt(conversation) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> RequestStream:
        """Start one request; iterate over the result for its text as it comes. Raises as `generate` does."""
        sink: SimpleQueue[Update] = SimpleQueue()
        checked = self.check_prompt(prompt)
        submission = self._submission(checked, sampling_params or SamplingParams(), sink)
        request = submission.request
        stream = RequestStream(request.id, checked, request.timeline, sink, self.tokenizer, self.abort)
        try:
            self._core.submit(submission)
        except BaseException:
            stream.close()
            raise
        return stream

    def as_completed(
        self, jobs: Iterable[Job], *, window: int | None = None
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Run jobs, each a prompt and its sampling parameters, and give (index, result) as they finish.

        Args:
            jobs: read as they are needed.
            window: how many may be in the engine at once, 1 or more; None: all of them.

        Leaving the iteration early aborts what is left. Raises as `generate` does; jobs before a bad one are aborted.
        """
        if window is not None:
            check_whole_number("window", window, 1)
        return self._run(((self.check_prompt(prompt), sampling) for prompt, sampling in jobs), window)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation through the model's chat template, the assistant's turn opened.

        Raises:
            ValueError: no template, or messages it does not take.
        """
        return self._chat_template.encode(messages)

    def check_prompt(self, prompt: PromptLike) -> Prompt:
        """Token ids of a prompt that this engine can run.

        Raises:
            ValueError: empty, too long, ids outside the vocabulary, or of another form.
        """
        text, ids = _read_prompt(prompt, self.tokenizer.encode)
        limit = self.config.max_model_len
        if not ids:
            raise ValueError("The prompt is empty: give at least one token.")
        if len(ids) >= limit:
            raise ValueError(
                f"The prompt has {len(ids)} tokens, and max_model_len={limit} must hold it and at least one more: "
                "shorten it or raise max_model_len."
            )
        if min(ids) < 0 or max(ids) >= self.tokenizer.vocab_size:
            raise ValueError(f"The prompt holds token ids outside 0 to {self.tokenizer.vocab_size - 1}.")
        return Prompt(text, ids)

    def abort(self, request_id: str) -> None:
        """End a request early, with finish_reason "abort" and the tokens so far; unknown ones are ignored."""
        self._core.abort(request_id)

    def metrics(self) -> Metrics:
        """Counts and latencies so far."""
        return self._core.metrics()

    def close(self) -> None:
        """Abort what runs, join the threads, free the device memory. Calling it again does nothing."""
        self._core.close()

    def __enter__(self) -> "LLM":
        """The engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """`close`."""
        self.close()

    def _run(
        self, jobs: Iterable[tuple[Prompt, SamplingParams]], window: int | None
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        sink: SimpleQueue[Update] = SimpleQueue()
        running: dict[str, _Running] = {}
        numbered = enumerate(jobs)
        try:
            while True:
                room = None if window is None else window - len(running)
                for index, (prompt, sampling) in itertools.islice(numbered, room):
                    submission = self._submission(prompt, sampling, sink)
                    running[submission.request.id] = _Running(index, prompt, submission.request.timeline)
                    self._core.submit(submission)
                if not running:
                    return
                update = sink.get()
                job = running[update.request_id]
                job.token_ids.extend(update.token_ids)
                if update.finish_reason is not None:
                    del running[update.request_id]
                    text = self.tokenizer.decode(shown(job.token_ids, update.finish_reason))
                    yield job.index, make_output(job.prompt, job.token_ids, text, job.timeline, update)
        finally:
            for request_id in running:
                self.abort(request_id)

    def _submission(self, prompt: Prompt, sampling: SamplingParams, sink: "SimpleQueue[Update]") -> Submission:
        number = next(self._numbers)
        length = len(prompt.token_ids)
        max_tokens = min(sampling.max_tokens, self.config.max_model_len - length)
        request = Request(f"request-{number}", length, max_tokens, Timeline(self._core.clock()))
        seed = sampling.seed
        if seed is None:
            seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        stop_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_ids |= frozenset(self.tokenizer.eos_token_ids)
        return Submission(request, Payload(np.array(prompt.token_ids, np.int32), sampling, seed), stop_ids, sink)


@dataclass
class _Running:
    """A job in the engine: its place in the input and what it has generated."""

    index: int
    prompt: Prompt
    timeline: Timeline
    token_ids: list[int] = field(default_factory=list)


def _as_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """A list of ints is one prompt, and so is an array; any other list is many."""
    if isinstance(prompts, str | bytes | Mapping | np.ndarray) or (len(prompts) and isinstance(prompts[0], Integral)):
        return [cast(PromptLike, prompts)]
    return list(cast(Sequence[PromptLike], prompts))


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"There are {count} prompts and {len(params)} sampling_params: give one, or one for each.")
    return list(params)


def _read_prompt(prompt: PromptLike, encode: Callable[[str], list[int]]) -> tuple[str | None, list[int]]:
    if not isinstance(prompt, Mapping):
        return (prompt, encode(prompt)) if isinstance(prompt, str) else (None, _token_ids(prompt))
    match dict(prompt):
        case {"prompt": str(text), **rest} if not rest:
            return text, encode(text)
        case {"prompt_token_ids": ids, **rest} if not rest:
            return None, _token_ids(ids)
    raise ValueError(
        f"A prompt dict needs text under 'prompt' or ids under 'prompt_token_ids' and nothing else, not {list(prompt)}."
    )


def _token_ids(ids: object) -> list[int]:
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    listed: list[object] = [None] if isinstance(ids, str | bytes) or not isinstance(ids, Sequence) else list(ids)
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in listed):
        raise ValueError("A prompt must be text or a list of token ids.")
    return [int(cast(int, i)) for i in listed]
