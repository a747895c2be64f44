"""`AsyncLLM`: the engine for asyncio. The same engine, options and outputs as `LLM`; only the waiting differs.

Any number of event loops and threads may use one engine: each request belongs to the loop that iterates over it, and
its updates reach that loop with `call_soon_threadsafe`. Making the engine blocks, as vLLM's does: make it before the
loop starts, or in `asyncio.to_thread`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Unpack
from weakref import WeakValueDictionary

from ...models.text.chat import ChatOptions, ReasoningEffort
from ...models.text.chat_messages import Message, Tool
from ..chat.tool_use import ToolChoice
from .base import DRAIN_TIMEOUT, BaseLLM
from .job import Job
from .loop_outlet import Consumer, LoopOutlet
from .new_params import named_params
from .outputs import RequestOutput
from .prompts import PromptLike
from .sampling_params import RequestOutputKind, SamplingParams
from .service_options import ServiceOptions, service_of
from .vllm_names import names_what_is_missing
from .vllm_tables import GENERATE


class AsyncLLM(BaseLLM):
    """A model on its meshes, ready to generate for coroutines. Use `async with`, or await `close`.

    The options are those of `EngineOptions`. Making an engine loads the model and compiles every program, which takes
    seconds to minutes; nothing compiles afterwards. An option, a model's file, devices or memory that cannot be used is
    a ValueError that says what to change.

    Methods that are not coroutines return at once and may be called from anywhere.
    """

    def _prepare(self) -> None:
        self._outlets = WeakValueDictionary[int, LoopOutlet]()
        self._is_paused = False

    @names_what_is_missing("AsyncLLM.generate", GENERATE, ServiceOptions)
    def generate(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **service: Unpack[ServiceOptions],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt; yield the result so far, whenever it has grown, until `finished` is set; or what
        `output_kind` of the sampling parameters says. A slow consumer misses nothing: it gets more at once.

        The request starts with the first iteration. Cancelling the task, or leaving the iteration, aborts it; use
        `contextlib.aclosing` where it must be aborted at once. With n > 1 each output holds all completions, with
        `RequestOutputKind.DELTA` those that have something new.

        Args:
            prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
            sampling_params: None: the defaults.
            request_id: a name for `abort`; None: the engine's choice.
            service: how it is to be served, see `ServiceOptions`.

        Raises:
            ValueError: a prompt or parameters that the engine cannot run, or a name in use.
            EngineError: the engine is closed or has failed.
            Overloaded: as many requests wait as may; its `retry_after` says in how many seconds to try again.
        """
        return self._follow(
            lambda arrival: self._client.check(prompt, sampling_params, arrival, service_of(service)), request_id
        )

    @names_what_is_missing("AsyncLLM.chat", GENERATE, ServiceOptions)
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
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
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation as `generate` completes a prompt; outputs have the answer's parts as well.

        The other arguments are those of `chat_prompt` and, of tools, `LLM.chat`. Raises as those and `generate` do.
        """
        options: ChatOptions = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs,
            "reasoning_effort": reasoning_effort,
        }

        def check(arrival: float) -> Job:
            return self.check_chat(
                messages,
                sampling_params,
                tools,
                arrival=arrival,
                options=options,
                service=service,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
            )

        return self._follow(check, request_id)

    async def _follow(
        self, check: Callable[[float], Job], request_id: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Make a job by `check`, which is told when it arrived, start it, and yield its outputs as they are due.

        Leaving the iteration ends it.
        """
        # A long text takes a while to tokenise; the tokenizer releases the GIL.
        job = await asyncio.to_thread(check, self._client.clock())
        loop, only_final = asyncio.get_running_loop(), job.params.output_kind is RequestOutputKind.FINAL_ONLY
        outlet = self._outlet(loop)
        consumer: Consumer
        ticket = self._client.ticket(job, lambda _, update: outlet.put(consumer, update), request_id)
        collector = ticket.collector
        consumer = Consumer(collector, loop, only_final=only_final)
        self._client.start(ticket, may_refuse=True)
        try:
            is_over = False
            while not is_over:
                if not consumer.has_update:
                    await consumer.next_update()
                output, is_over = consumer.output(), collector.is_finished
                if output is not None:
                    yield output
        finally:
            if not collector.is_finished:
                self._client.withdraw(collector)

    def _outlet(self, loop: asyncio.AbstractEventLoop) -> LoopOutlet:
        """Find the way to a loop, which stays as long as requests use it."""
        outlet = self._outlets.get(id(loop))
        if outlet is None:
            outlet = self._outlets[id(loop)] = LoopOutlet(loop)
        return outlet

    async def abort(self, request_id: str) -> None:
        """End all completions of a request early; its iteration ends with finish_reason "abort".

        Unknown and finished requests are ignored.
        """
        self._client.abort(request_id)

    async def pause_generation(
        self, *, mode: Literal["abort", "wait", "keep"] = "abort", clear_cache: bool = True
    ) -> None:
        """Begin nothing from here on until `resume_generation`; requests that arrive wait. Return when nothing runs.

        Args:
            mode: what becomes of requests that run: "abort" ends them with what they have, "wait" waits for their end,
                "keep" lets them stand where they are and go on later.
            clear_cache: "abort" and "wait" drop cached prefixes in any case, "keep" never does.

        Raises:
            ValueError: another mode.
            EngineError: the engine is closed or has failed.
        """
        if mode not in ("abort", "wait", "keep"):
            raise ValueError(f"mode={mode!r} is not usable: it must be 'abort', 'wait' or 'keep'.")
        self._is_paused = True
        if mode == "abort":
            self._client.abort_all()
        core = self.engine.core
        await asyncio.to_thread(core.freeze if mode == "keep" else core.drain)
        await asyncio.sleep(0)  # who waits for the last outputs has them before this returns

    async def resume_generation(self) -> None:
        """Go on after `pause_generation`; does nothing where nothing is paused.

        Raises:
            EngineError: the engine is closed or has failed.
        """
        await asyncio.to_thread(self.engine.core.restart)
        self._is_paused = False

    async def is_paused(self) -> bool:
        """Return whether `pause_generation` was called last."""
        return self._is_paused

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Drop every cached prefix as `LLM.reset_prefix_cache` does, without holding up the event loop."""
        await asyncio.to_thread(self.engine.core.update_params, {})
        return True

    def shutdown(self, timeout: float | None = None) -> None:
        """Close the engine as `close` does, for callers that cannot await; `timeout` is vLLM's, and not needed."""
        self.engine.core.close()

    async def update_params(self, params: Mapping[str, Any]) -> None:
        """Replace parameters of the model as `LLM.update_params` does, without holding up the event loop."""
        core = self.engine.core
        await asyncio.to_thread(lambda: core.update_params(named_params(params, core)))

    async def set_roles(
        self, roles: str | Mapping[int, str], *, drain_timeout: float = DRAIN_TIMEOUT
    ) -> Literal["reached", "superseded"]:
        """Change what the meshes of a pool are for as `LLM.set_roles` does, without holding up the event loop."""
        return await asyncio.to_thread(self.engine.core.set_roles, roles, drain_timeout)

    async def close(self) -> None:
        """Abort running requests, join the threads and free the device memory. Calling it again does nothing."""
        await asyncio.to_thread(self.engine.core.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


AsyncLLMEngine = AsyncLLM  # as vLLM calls it, too
