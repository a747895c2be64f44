"""Requests that somebody else issues to an `AsyncLLM` by a clock of their own, with a record of each for our report.

It decides neither when requests come nor what is in them. Those that are taken back before their first token have no
record.
"""

import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..api.async_llm import AsyncLLM
from ..api.outputs import RequestOutput
from ..api.prompts import PromptLike
from ..api.sampling_params import SamplingParams
from ..errors import Overloaded
from .driver import Driven
from .tally import Tally


class StreamedRun:
    """One run on one event loop."""

    def __init__(self, llm: AsyncLLM) -> None:
        """Run on `llm`, which stays the caller's."""
        self._llm, self._tally, self._numbers = llm, Tally(), itertools.count()

    async def answer(self, prompt: PromptLike, params: SamplingParams) -> AsyncGenerator[RequestOutput, None]:
        """Answer one prompt, as `AsyncLLM.generate` does and with what it raises; one that it turns away is a record
        too."""
        number, arrival, last = next(self._numbers), self._llm.clock(), None
        try:
            async with aclosing(self._llm.generate(prompt, params)) as outputs:
                async for output in outputs:
                    last = output
                    yield output
        except (Overloaded, ValueError):
            self._tally.refuse(number, arrival, self._length(prompt), None)
            raise
        finally:
            if last is not None:
                self._count(number, last)

    def driven(self) -> Driven:
        """Return what has become of all requests so far."""
        return Driven(self._tally.records, self._tally.gaps, [], dict(self._tally.errors))

    def _count(self, number: int, last: RequestOutput) -> None:
        done = last.outputs[0]
        self._tally.end(
            number,
            len(last.prompt_token_ids),
            done.timeline,
            done.finish_reason or "abort",
            cached_len=last.num_cached_tokens or 0,
            error=last.error,
        )

    def _length(self, prompt: PromptLike) -> int:
        try:
            return len(self._llm.check_prompt(prompt).ids)
        except ValueError:
            return 0
