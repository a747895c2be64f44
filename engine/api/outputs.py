"""Results of requests, shaped as vLLM's outputs are. No JAX here."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..protocol.actions import FinishReason
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
    """One completion, whole or so far."""

    index: int  # among the request's `n` completions
    text: str  # without special tokens and stop strings, unless the sampling parameters keep them
    token_ids: list[int]  # every token, a final stop token included
    cumulative_logprob: float | None  # of the tokens themselves; None: log-probabilities were not asked for
    logprobs: list[LogprobsAt] | None  # an entry per token; None: not asked for
    finish_reason: FinishReason | None  # None: it goes on
    stop_reason: int | str | None  # the stop string or stop token that ended it; None for EOS and all else
    timeline: Timeline  # its stamps, which go on changing until it ends

    def finished(self) -> bool:
        """Return whether the completion has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A request's result, whole or so far."""

    request_id: str
    prompt: str | None  # None: it was given as token ids
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAt | None] | None  # one per token, None for the first; None: not asked for or not yet
    outputs: list[CompletionOutput]  # `n` completions, in the order of `index`
    finished: bool  # all completions have ended
    num_cached_tokens: int | None = None  # prompt tokens that the prefix cache spared; None until the prompt began
    error: str | None = None  # one sentence: why a completion with finish_reason "error" failed

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
