"""What GuideLLM 0.8.1 needs to drive an engine in process: a backend and a tokenizer, both of the kind `twinmesh`.

Importing this registers them; GuideLLM finds no plug-ins by itself. It needs the package of the extra `guidellm`, and
only the script that hands over to GuideLLM imports it. GuideLLM runs a backend in a process that it spawns, another for
each strategy of a profile, which loads the engine at its start. Stamps are by `time.time()`, as GuideLLM's own backends
take them: when the event loop has a token.

Not here: chats and turns that go on with earlier ones, which are refused.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from guidellm.backends import Backend
from guidellm.data.tokenizers import TokenizerRegistry
from guidellm.schemas import GenerationRequest, GenerationResponse, RequestInfo, UsageMetrics
from guidellm.schemas.backends import BackendArgs
from guidellm.schemas.data import DataTokenizerArgs
from pydantic import Field
from transformers import PreTrainedTokenizerFast

from ...models.checkpoints.catalog import resolve_model
from ...models.checkpoints.open import open_checkpoint
from ..api.async_llm import AsyncLLM
from ..api.outputs import RequestOutput
from ..api.sampling_params import SamplingParams
from ..metrics.benchmark_file import About, Benchmark, Point, write_benchmark
from .engine_target import EngineTarget, Watch
from .streamed_run import StreamedRun

KIND: Final = "twinmesh"


@BackendArgs.register(KIND)
class TwinmeshBackendArgs(BackendArgs):
    """What the backend is made of."""

    kind: Literal["twinmesh"] = Field(default=KIND, description="Twinmesh, in process.")
    model: str = Field(description="A model as Twinmesh names it.")
    engine: dict[str, Any] = Field(default_factory=dict, description="Other options of the engine, by name.")
    reports: str | None = Field(default=None, description="A folder for Twinmesh's own report of each strategy.")


@DataTokenizerArgs.register(KIND)
class TwinmeshTokenizerArgs(DataTokenizerArgs):
    """The tokenizer of a model as Twinmesh names it."""

    kind: Literal["twinmesh"] = Field(default=KIND, description="The tokenizer of Twinmesh's model.")


@TokenizerRegistry.register(KIND)
class TwinmeshTokenizer:
    """Makes the tokenizer that synthetic prompts are measured with: the engine's own."""

    def __init__(self, config: TwinmeshTokenizerArgs) -> None:
        self._model = str(config.model)

    def __call__(self) -> PreTrainedTokenizerFast:
        """Return it in the form of the transformers library."""
        return PreTrainedTokenizerFast(tokenizer_object=open_checkpoint(resolve_model(self._model)).tokenizer().backend)


@Backend.register(KIND)
class TwinmeshBackend(Backend):
    """An engine in GuideLLM's one worker."""

    backend_defines_model: ClassVar[bool] = True

    def __init__(self, arguments: TwinmeshBackendArgs) -> None:
        super().__init__(arguments)
        self._arguments = arguments
        self._llm: AsyncLLM | None = None
        self._run: StreamedRun | None = None
        self._watch: Watch | None = None
        self._watching: ExitStack | None = None

    @property
    def processes_limit(self) -> int | None:
        """One process: it has the engine."""
        return 1

    async def process_startup(self) -> None:
        """Load the engine, in the worker."""
        arguments = self._arguments
        # JSON has lists for what options have as tuples.
        options: dict[str, Any] = {
            name: tuple(one) if isinstance(one, list) else one for name, one in arguments.engine.items()
        }
        self._llm = llm = await asyncio.to_thread(lambda: AsyncLLM(arguments.model, **options))
        self._run, self._watching = StreamedRun(llm), ExitStack()
        self._watch = self._watching.enter_context(EngineTarget(llm, arguments.model).watched())

    async def process_shutdown(self) -> None:
        """Write our own report, if anybody wants it, and close the engine."""
        if self._llm is None or self._run is None or self._watch is None or self._watching is None:
            raise RuntimeError("the backend has not been started in this process.")
        self._watching.close()
        driven = self._run.driven()
        if self._arguments.reports is not None and len(driven.records):
            self._write(Path(self._arguments.reports), self._watch, self._run)
        await self._llm.close()
        self._llm = self._run = self._watch = self._watching = None

    async def validate(self) -> None:
        """Raise an error unless the engine takes requests."""
        if self._llm is None:
            raise RuntimeError("the backend has not been started in this process.")
        self._llm.check_health()

    async def available_models(self) -> list[str]:
        """Return the one model."""
        return [self._arguments.model]

    async def default_model(self) -> str:
        """Return the one model."""
        return self._arguments.model

    async def resolve(
        self, request: GenerationRequest, request_info: RequestInfo, history: Any = None
    ) -> AsyncIterator[tuple[GenerationResponse | None, RequestInfo]]:
        """Answer a request, and stamp its tokens as they come: once at the first, and with the response at the end."""
        if self._run is None:
            raise RuntimeError("the backend has not been started in this process.")
        if history:
            raise NotImplementedError("Twinmesh's backend takes no turns that go on with earlier ones: give turns=1.")
        prompt = " ".join([*request.columns.get("prefix_column", []), *request.columns.get("text_column", [])])
        asked = request.output_metrics.text_tokens or None
        params = SamplingParams(temperature=0, max_tokens=asked, ignore_eos=asked is not None)
        output: RequestOutput | None = None
        request_info.timings.request_start = time.time()
        try:
            async with aclosing(self._run.answer(prompt, params)) as outputs:
                async for output in outputs:
                    if _stamp(request_info, output):
                        yield None, request_info
        except asyncio.CancelledError:
            if output is not None:
                yield _response(request, output), request_info
            raise
        request_info.timings.request_end = time.time()
        assert output is not None
        if output.error is not None:
            raise RuntimeError(output.error)
        yield _response(request, output), request_info

    @staticmethod
    def _write(folder: Path, watch: Watch, run: StreamedRun) -> None:
        number = sum(1 for _ in folder.glob("*.json")) + 1
        name = f"GuideLLM, strategy {number}"
        point = Point(name, watch.measured(name, run.driven()))
        write_benchmark(folder / f"{number}.json", Benchmark(About(shaped_like="GuideLLM 0.8.1"), (point,)))


def _stamp(info: RequestInfo, output: RequestOutput) -> bool:
    """Stamp what has come; return whether the first token is among it."""
    timings, now = info.timings, time.time()
    if timings.first_request_iteration is None:
        timings.first_request_iteration = now
    timings.last_request_iteration = now
    timings.request_iterations += 1
    count = len(output.outputs[0].token_ids)
    if count <= timings.token_iterations:
        return False
    is_first = timings.first_token_iteration is None
    if is_first:
        timings.first_token_iteration = timings.first_output_token_iteration = now
    timings.last_token_iteration, timings.token_iterations = now, count
    return is_first


def _response(request: GenerationRequest, output: RequestOutput) -> GenerationResponse:
    done = output.outputs[0]
    return GenerationResponse(
        request_id=request.request_id,
        response_id=output.request_id,
        request_args=None,
        text=done.text or None,
        input_metrics=UsageMetrics(text_tokens=len(output.prompt_token_ids), cached_tokens=output.num_cached_tokens),
        output_metrics=UsageMetrics(
            text_tokens=len(done.token_ids), text_words=len(done.text.split()), text_characters=len(done.text)
        ),
    )
