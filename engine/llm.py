"""`LLM`: the engine as a Python object. Checks prompts, turns text into tokens and back; `core.py` does the rest.

Every method may be called from any thread. Requests of one caller never wait for another's to finish: all of them run
in the same batches.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, cast

import jax
import numpy as np
from tqdm import tqdm

from ..models.chat import Message
from .config import Topology
from .core import Submission, Update
from .executor import Payload
from .loader import Options, start_engine
from .metrics import Metrics
from .outputs import RequestOutput
from .request import Request, Timeline
from .sampling_params import SamplingParams
from .stream import Prompt, RequestStream, make_output, shown

type PromptLike = str | Sequence[int] | Mapping[str, Any]
type Job = tuple[PromptLike, SamplingParams]


class LLM:
    """A model on its meshes, ready to generate. Use it as a context manager, or call `close`.

    Args:
        model: a GGUF file, or the name of a model that `twinmesh fetch` has fetched.
        topology: the meshes, such as "both=1" or "prefill=1,decode=1".
        dtype: of weights, activations and KV: "float32", "bfloat16" or "float16".
        max_model_len: prompt and completion together, in tokens; None: the model's context, or what memory allows.
        page_size: tokens per KV page.
        max_num_seqs: requests that a mesh holds at once.
        prefill_buckets: token counts that prefill steps are padded to, ascending; the last is the chunk size.
        decode_buckets: row counts that decode steps are padded to, ascending up to max_num_seqs; None: a few of them.
        kv_cache_bytes: memory per mesh for KV pages and hand-offs on devices that do not report theirs (CPU).
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
        dtype: str = "float32",
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
        parsed = Topology.parse(topology) if isinstance(topology, str) else topology
        options = Options(
            parsed, dtype, max_model_len, page_size, max_num_seqs, prefill_buckets, decode_buckets, kv_cache_bytes,
            devices, progress,
        )  # fmt: skip
        engine = start_engine(model, options)
        self.config = engine.config
        self.model_config = engine.checkpoint.config
        self.tokenizer = engine.checkpoint.tokenizer()
        self._chat_template = engine.checkpoint.chat_template()
        self._core, self._seed, self._numbers = engine.core, seed, itertools.count()

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
        self._core.submit(submission)
        request = submission.request
        return RequestStream(request.id, checked, request.timeline, sink, self.tokenizer, self.abort)

    def as_completed(
        self, jobs: Iterable[Job], *, window: int | None = None
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Run jobs, each a prompt and its sampling parameters, and give (index, result) as they finish.

        Args:
            jobs: read as they are needed.
            window: how many may be in the engine at once; None: all of them.

        Leaving the iteration early aborts what is left. Raises as `generate` does; jobs before a bad one are aborted.
        """
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
    """A list of ints is one prompt; any other list is many."""
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"There are {count} prompts and {len(params)} sampling_params: give one, or one for each.")
    return list(params)


def _read_prompt(prompt: PromptLike, encode: Callable[[str], list[int]]) -> tuple[str | None, list[int]]:
    if isinstance(prompt, Mapping):
        if len(prompt) != 1 or not prompt.keys() <= {"prompt", "prompt_token_ids"}:
            raise ValueError(
                f"A prompt dict needs 'prompt' or 'prompt_token_ids' and nothing else, not {list(prompt)}."
            )
        return _read_prompt(next(iter(prompt.values())), encode)
    if isinstance(prompt, str):
        return prompt, encode(prompt)
    ids: list[object] = list(prompt) if isinstance(prompt, Sequence) else [None]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError("A prompt must be text or a list of token ids.")
    return None, cast(list[int], ids)
