"""What `LLM` and `AsyncLLM` have in common: how an engine is made of its options, and methods that do not wait.

The options are described in `options.py`, once; they are in the signature and the docstring of both classes.
"""

import inspect
import weakref
from collections.abc import Sequence
from typing import Self

from ...models.text.chat import Message, Tool
from ..config import EngineConfig
from ..metrics.metrics import Metrics
from ..options import EngineOptions, as_text, with_options
from ..startup.build import Engine, start_engine
from .client import EngineClient
from .prompts import Prompt, PromptLike, check_prompt
from .resolve_sampling import resolve
from .sampling_params import SamplingParams


class BaseLLM:
    """An engine made from its options: the base of `LLM` and `AsyncLLM`. Methods may be called from any thread.

    An engine that is dropped or still open when the program ends is closed then.
    """

    @with_options(EngineOptions)
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
        self.tokenizer, self._chat_template = engine.tokenizer, engine.chat_template
        self._client = EngineClient(engine, seed)
        self._prepare()
        # At exit too: threads that still wait for a device when Python ends would take the process down with them.
        weakref.finalize(self, engine.core.close)

    def __init_subclass__(cls) -> None:
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{as_text()}"

    def _prepare(self) -> None:
        """Set up what a subclass needs besides."""

    def chat_prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """Turn a conversation into token ids with the model's chat template, the assistant's turn opened.

        `tools` are JSON schemas of functions that the model may call.

        Raises:
            ValueError: no template, messages or tools that it refuses, or far more tokens than max_model_len.
        """
        return self._chat_template.encode(messages, tools=tools, at_most=self.config.max_model_len)

    def check_prompt(self, prompt: PromptLike) -> Prompt:
        """Turn a prompt into token ids that this engine can run.

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
        """Check that the engine takes requests, as vLLM's method of this name does.

        Raises:
            EngineError: it is closed or has failed.
        """
        self.engine.core.check_health()

    def metrics(self) -> Metrics:
        """Return counts and latencies so far."""
        return self.engine.core.metrics()

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
