"""An engine and its options: what `LLM` and `AsyncLLM` are made of, and what they do alike."""

import weakref
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.typing import DTypeLike

from ...models.text.chat import Message, Tool
from ..config import EngineConfig, check_whole_number
from ..metrics.metrics import Metrics
from ..startup.build import Options, start_engine
from ..topology import Topology
from .client import EngineClient
from .prompts import Prompt, PromptLike, check_prompt
from .resolve_sampling import resolve
from .sampling_params import SamplingParams


class EngineOwner:
    """Makes an engine from its options. Use `LLM` or `AsyncLLM`; methods may be called from any thread.

    An engine that is dropped or still open when the program ends is closed then.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        topology: str | Topology = "both=1",
        dtype: DTypeLike = "auto",
        max_model_len: int | None = None,
        page_size: int = 64,
        max_num_seqs: int = 32,
        prefill_buckets: tuple[int, ...] | None = None,
        decode_buckets: tuple[int, ...] | None = None,
        decode_steps: int = 1,
        kv_cache_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        deterministic: bool = False,
        max_retries: int = 2,
        decision_log: str | Path | None = None,
        seed: int = 0,
        devices: Sequence[jax.Device] | None = None,
        progress: bool = False,
    ) -> None:
        """Load the model and compile every program, which takes seconds to minutes; nothing compiles afterwards.

        Args:
            model: the name of a model that `twinmesh fetch` has fetched, a GGUF file, a directory in Hugging Face's
                format or written by `twinmesh convert`, or a hub id (docs/api.md, Models).
            topology: the meshes, such as "both=1" or "prefill=1,decode=1".
            dtype: of weights, activations and KV: float32, bfloat16 or float16, by name or as JAX's; "auto": on a GPU
                the checkpoint's own if that has 16 bits, else bfloat16; on a CPU float32, or bfloat16 where it is
                clearly faster for max_num_seqs rows and not `deterministic`.
            max_model_len: prompt and completion together, in tokens; None: the model's context, or what memory allows.
            page_size: tokens per KV page.
            max_num_seqs: requests that a mesh holds at once.
            prefill_buckets: token counts that prefill steps are padded to, ascending; the last is the chunk size.
                None: a few of them, and one where `deterministic`.
            decode_buckets: row counts that decode steps are padded to, ascending up to max_num_seqs; None: likewise.
            decode_steps: the most decode steps that run on the device before the host looks.
            kv_cache_bytes: the most memory per mesh for KV pages and hand-offs; None: nine tenths of what is free on a
                GPU, and on CPU a quarter of what the machine has available for all meshes together, at most 2 GiB each.
            enable_prefix_caching: keep the KV of finished prompts, and use it for prompts that start alike.
            deterministic: the same tokens bit for bit, whatever else runs and however a request was scheduled.
            max_retries: how often a request that lost its mesh starts again before it fails.
            decision_log: a file to write the scheduler's events and actions to; None: none.
            seed: of the engine; requests without a seed of their own draw theirs from it and from their number.
            devices: what to run on, one per mesh in the topology's order; None: JAX's. The same device may be named
                twice.
            progress: show bars on stderr while weights load and programs compile.

        Raises:
            ValueError: an option, the model's files, the devices or the memory do not do; one sentence says what to
                change.
        """
        check_whole_number("seed", seed, 0)
        options = Options(
            topology=Topology.parse(topology) if isinstance(topology, str) else topology,
            dtype=dtype,
            max_model_len=max_model_len,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            prefill_buckets=prefill_buckets,
            decode_buckets=decode_buckets,
            decode_steps=decode_steps,
            kv_cache_bytes=kv_cache_bytes,
            prefix_cache=enable_prefix_caching,
            deterministic=deterministic,
            max_retries=max_retries,
            decision_log=decision_log,
            devices=devices,
            progress=progress,
        )
        engine = start_engine(model, options)
        self.config: EngineConfig = engine.config
        self.tokenizer, self._chat_template = engine.tokenizer, engine.chat_template
        self._core, self._frontend = engine.core, EngineClient(engine, seed)
        self._prepare()
        # At exit too: threads that still wait for a device when Python ends would take the process down with them.
        weakref.finalize(self, engine.core.close)

    def _prepare(self) -> None:
        """What one kind of owner needs besides."""

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """The token ids of a conversation through the model's chat template, the assistant's turn opened.

        `tools` are JSON schemas of functions that the model may call.

        Raises:
            ValueError: no template, messages or tools it does not take, or far more tokens than max_model_len.
        """
        return self._chat_template.encode(messages, tools=tools, at_most=self.config.max_model_len)

    def check_prompt(self, prompt: PromptLike) -> Prompt:
        """Token ids of a prompt that this engine can run.

        Raises:
            ValueError: empty, too long, ids outside the vocabulary, or of another form.
        """
        return check_prompt(prompt, self.tokenizer, self.config.max_model_len)

    def check_sampling_params(self, sampling_params: SamplingParams) -> None:
        """Refuse parameters that do not go with this model's vocabulary.

        Raises:
            ValueError: token ids outside it, bad words that are too many or too long, or no token left to choose.
        """
        resolve(sampling_params, self.tokenizer, seed=0)

    def check_health(self) -> None:
        """Nothing where the engine takes requests, as vLLM's method of this name.

        Raises:
            EngineError: it is closed or has failed.
        """
        self._core.check_health()

    def metrics(self) -> Metrics:
        """Counts and latencies so far."""
        return self._core.metrics()

    def preempt(self, request_id: str) -> None:
        """Give up a request's KV and compute it again later, with the tokens it has; it may wait for its turn.

        For experiments: the engine preempts by itself where memory asks for it. Unknown and finished requests are
        ignored, and so is one that has not begun.
        """
        self._frontend.preempt(request_id)

    def migrate(self, request_id: str, destination: int | None = None) -> None:
        """Move a decoding request's KV to another decoding mesh, counted from 0 in the topology's order; None: any.

        Ignored where the request is not decoding, or where there is no room.
        """
        self._frontend.migrate(request_id, destination)
