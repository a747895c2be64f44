"""Results of requests, shaped as vLLM's outputs are. No JAX here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..chat.answers import Parts, ToolCall
from ..protocol.actions import FinishReason
from ..protocol.cache_report import PrefixCacheReport
from ..protocol.timeline import Timeline
from .growing_text import GrowingAnswer, GrowingText


class Logprob(NamedTuple):
    """One token's natural log-probability, of the distribution that the engine's `logprobs_mode` names; by default from
    the model's raw logits: before temperature, penalties and the like."""

    logprob: float
    rank: int  # 1 for the most likely
    decoded_token: str | None  # the token alone as text; None with `detokenize=False`


# Of one position: the token that is there, first, and the most likely ones, by token id.
type LogprobsAt = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One completion, whole, so far, or what is new of it. It never changes.

    Of one that goes on `token_ids`, `logprobs` and the timeline's tokens may be views of lists that grow: they read as
    lists do, `list(...)` makes one. Of one that has ended they are lists.
    """

    index: int  # among the request's `n` completions
    text: str  # without special tokens and stop strings, unless the sampling parameters keep them
    token_ids: Sequence[int]  # every token, a final stop token included
    cumulative_logprob: float | None  # of all tokens so far; None: log-probabilities were not asked for
    logprobs: Sequence[LogprobsAt] | None  # an entry per token; None: not asked for
    finish_reason: FinishReason | None  # None: it goes on
    stop_reason: int | str | None  # the stop string or stop token that ended it; None for EOS and all else
    timeline: Timeline  # its stamps so far
    # The answer in parts, of a chat whose model writes them in a format that is known; all None: not read so.
    reasoning: str | None = None  # what the model thinks; "": nothing
    content: str | None = None  # what it says; "": nothing
    tool_calls: tuple[ToolCall, ...] | None = None  # what it asks for

    def finished(self) -> bool:
        """Return whether the completion has ended."""
        return self.finish_reason is not None


class CompletionSoFar(CompletionOutput):
    """A completion that goes on; what few ask for is put together when it is asked for, and is what it was then."""

    _text: tuple[GrowingText, int]  # the first so many pieces
    _stamps: tuple[Timeline, int]  # up to so many tokens
    _answer: tuple[GrowingAnswer, int] | None = None  # the first so many pieces; None: it is not read into parts

    @cached_property
    def text(self) -> str:
        """Without special tokens and stop strings, unless the sampling parameters keep them."""
        pieces, count = self._text
        return pieces.until(count)

    @cached_property
    def timeline(self) -> Timeline:
        """Its stamps so far."""
        line, tokens = self._stamps
        return line.so_far(tokens)

    @cached_property
    def reasoning(self) -> str | None:
        """What the model thinks."""
        return None if self._answer is None else self._parts(self._answer).reasoning

    @cached_property
    def content(self) -> str | None:
        """What it says."""
        return None if self._answer is None else self._parts(self._answer).content

    @cached_property
    def tool_calls(self) -> tuple[ToolCall, ...] | None:
        """What it asks for."""
        return None if self._answer is None else self._parts(self._answer).tool_calls

    def _parts(self, answer: tuple[GrowingAnswer, int]) -> Parts:
        pieces, count = answer
        return pieces.until(count)


def make[T](kind: type[T], fields: dict[str, Any]) -> T:
    """Make a frozen dataclass of all its fields. Its own constructor takes a microsecond for it, of the five that a
    token costs."""
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", fields)
    return made


@dataclass(frozen=True)
class RequestOutput:
    """A request's result, whole, so far, or what is new of it. It never changes."""

    request_id: str
    prompt: str | None  # None: it was given as token ids
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAt | None] | None  # one per token, None for the first; None: not asked for or not yet
    outputs: list[CompletionOutput]  # `n` completions, or those with something new, in the order of `index`
    finished: bool  # all completions have ended
    num_cached_tokens: int | None = None  # prompt tokens that the prefix cache spared; None until the prompt began
    error: str | None = None  # one sentence: why a completion with finish_reason "error" failed
    cache_report: PrefixCacheReport | None = None  # what was cached, and why the rest was not; None: likewise

    @property
    def timeline(self) -> Timeline:
        """Return the timeline of the completion that ended last, so that its E2E is that of the request.

        While completions run, it is the timeline of one of them.
        """
        return max((output.timeline for output in self.outputs), key=_finish)

    @property
    def metrics(self) -> "RequestStateStats":
        """Return its times by the names that vLLM has for them; `timeline` has more."""
        line = self.timeline
        return RequestStateStats(
            arrival_time=line.arrival,
            queued_ts=line.arrival,
            scheduled_ts=line.prefill_start or 0.0,
            first_token_ts=line.first_token or 0.0,
            last_token_ts=line.tokens[-1] if line.tokens else 0.0,
            first_token_latency=line.ttft or 0.0,
            num_generation_tokens=sum(len(output.token_ids) for output in self.outputs),
        )


@dataclass(frozen=True)
class RequestStateStats:
    """A request's times by vLLM's names, in seconds on the engine's clock; 0.0 until it happens."""

    arrival_time: float
    queued_ts: float  # when it arrived
    scheduled_ts: float  # when its first chunk was dispatched
    first_token_ts: float
    last_token_ts: float
    first_token_latency: float  # from arrival
    num_generation_tokens: int  # of all completions


@dataclass(frozen=True)
class TextDelta:
    """One step of a stream. Text may come later than its tokens, and is never taken back."""

    text: str  # new since the last step
    token_ids: list[int]  # likewise
    finish_reason: FinishReason | None  # None: the completion goes on
    index: int = 0  # of the completion
    # What is new of the answer's parts, as in `CompletionOutput`; parts of one tool call have its id.
    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a continuation is."""

    token_ids: list[int]
    logprobs: np.ndarray  # [n] float32, one for each token
    total: float  # their sum
    ranks: np.ndarray  # [n] int32, of each token in its distribution; 1 for the most likely

    @property
    def is_greedy(self) -> bool:
        """Return whether greedy decoding after the prompt would have given these very tokens."""
        return bool((self.ranks == 1).all())


def _finish(timeline: Timeline) -> float:
    return math.inf if timeline.finish is None else timeline.finish
