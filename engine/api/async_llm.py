"""`AsyncLLM`: the engine for asyncio. The same engine, options and outputs as `LLM`; only the waiting differs.

Any number of event loops and threads may use one engine: each request belongs to the loop that iterates over it, and
its updates reach that loop with `call_soon_threadsafe`. Making the engine blocks, as vLLM's does: make it before the
loop starts, or in `asyncio.to_thread`.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from types import TracebackType

import jax
import numpy as np

from ..core.submission import Update
from .active_requests import Post
from .base import BaseLLM
from .collector import RequestCollector
from .outputs import RequestOutput
from .prompts import PromptLike
from .sampling_params import SamplingParams


class AsyncLLM(BaseLLM):
    """A model on its meshes, ready to generate for coroutines. Use `async with`, or await `close`.

    The options are those of `EngineOptions`. Making an engine loads the model and compiles every program, which takes
    seconds to minutes; nothing compiles afterwards. An option, a model's file, devices or memory that cannot be used is
    a ValueError that says what to change.

    Methods that are not coroutines return at once and may be called from anywhere.
    """

    async def generate(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt; yield the result so far, whenever it has grown, until `finished` is set.

        The request starts with the first iteration. Cancelling the task, or leaving the iteration, aborts it; use
        `contextlib.aclosing` where it must be aborted at once. With n > 1 each output holds all completions.

        Args:
            prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: None: the defaults.
            request_id: a name for `abort`; None: the engine's choice.

        Raises:
            ValueError: a prompt or parameters that the engine cannot run, or a name in use.
            EngineError: the engine is closed or has failed.
        """
        # A long text takes a while to tokenise; the tokenizer releases the GIL.
        job = await asyncio.to_thread(self._client.check, prompt, sampling_params or SamplingParams())
        updates: asyncio.Queue[Update] = asyncio.Queue()
        ticket = self._client.ticket(job, _post_to(asyncio.get_running_loop(), updates), request_id)
        collector = ticket.collector
        self._client.start(ticket)
        try:
            while not collector.is_finished:
                collector.take(await updates.get())
                while not updates.empty():
                    collector.take(updates.get_nowait())
                yield collector.output()
        finally:
            if not collector.is_finished:
                self._client.withdraw(collector)

    async def abort(self, request_id: str) -> None:
        """End all completions of a request early; its iteration ends with finish_reason "abort".

        Unknown and finished requests are ignored.
        """
        self._client.abort(request_id)

    async def update_params(self, params: Mapping[str, jax.Array | np.ndarray]) -> None:
        """Replace parameters of the model as `LLM.update_params` does, without holding up the event loop."""
        await asyncio.to_thread(self.engine.core.update_params, params)

    async def close(self) -> None:
        """Abort running requests, join the threads and free the device memory. Calling it again does nothing."""
        await asyncio.to_thread(self.engine.core.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _post_to(loop: asyncio.AbstractEventLoop, updates: "asyncio.Queue[Update]") -> Post:
    def post(_: RequestCollector, update: Update) -> None:
        # A loop that was closed with the request still running takes no updates.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(updates.put_nowait, update)

    return post
