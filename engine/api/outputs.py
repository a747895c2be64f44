"""Results of requests, shaped as vLLM's outputs are. No JAX here."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..protocol.actions import FinishReason
from ..protocol.cache_report import PrefixCacheReport
from ..protocol.timeline import Timeline


class Logprob(NamedTuple):
    """One token's natural log-probability, from the model's raw logits: before temperature, penalties and the like."""

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

    def finished(self) -> bool:
        """Return whether the completion has ended."""
        return self.finish_reason is not None


class GrowingText:
    """Text that comes in pieces, and what it was after each of them; `count` pieces so far.

    It stands in buffers, not in a list: the garbage collector would walk that, a million pieces for 256 long answers.
    """

    __slots__ = ("_ends", "_joined", "_utf8")

    def __init__(self) -> None:
        self._utf8 = bytearray()
        self._ends = array("q", [0])  # where each piece ends, in bytes, behind the start of the first
        self._joined = 0, ""  # the last that was asked for: pieces, and those joined

    @property
    def count(self) -> int:
        """Pieces so far."""
        return len(self._ends) - 1

    def add(self, piece: str) -> None:
        """Take the next piece."""
        self._utf8 += piece.encode()
        self._ends.append(len(self._utf8))

    def between(self, start: int, stop: int) -> str:
        """Join the pieces `start` to `stop` - 1."""
        return self._utf8[self._ends[start] : self._ends[stop]].decode()

    def until(self, count: int) -> str:
        """Join the first `count` pieces: what was joined before is not looked at again."""
        known, text = self._joined
        if count < known:
            return self.between(0, count)
        text += self.between(known, count)
        self._joined = count, text
        return text


class CompletionSoFar(CompletionOutput):
    """A completion that goes on; what few ask for is put together when it is asked for, and is what it was then."""

    _text: tuple[GrowingText, int]  # the first so many pieces
    _stamps: tuple[Timeline, int]  # up to so many tokens

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


@dataclass(frozen=True)
class TextDelta:
    """One step of a stream. Text may come later than its tokens, and is never taken back."""

    text: str  # new since the last step
    token_ids: list[int]  # likewise
    finish_reason: FinishReason | None  # None: the completion goes on
    index: int = 0  # of the completion


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a continuation is."""

    token_ids: list[int]
    logprobs: np.ndarray  # [n] float32, one for each token
    total: float  # their sum


def _finish(timeline: Timeline) -> float:
    return math.inf if timeline.finish is None else timeline.finish
