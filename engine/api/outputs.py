"""What a caller gets back, shaped as vLLM's outputs are. Control-plane module: no JAX here."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..protocol.actions import FinishReason
from ..protocol.timeline import Timeline


class Logprob(NamedTuple):
    """One token's natural log-probability, from the model's raw logits: before temperature, penalties and the like.

    `rank`: 1 for the most likely. `decoded_token`: the token alone as text; None with `detokenize=False`.
    """

    logprob: float
    rank: int
    decoded_token: str | None


# Of one position: the token that is there, first, and the most likely ones, by token id.
type LogprobsAt = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One completion, or what there is of it so far.

    `text` leaves special tokens and stop strings out unless told otherwise; `token_ids` holds every token, a final stop
    token included. `logprobs` has an entry per token, and `cumulative_logprob` is their sum for the tokens themselves;
    None where `logprobs` was not asked for. `finish_reason`: "stop", "length", "abort" or "error"; None: it goes on.
    `stop_reason`: the stop string or stop token that ended it; None for EOS and all else. `timeline`: its stamps, which
    go on changing until it ends.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[LogprobsAt] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    timeline: Timeline

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A request's result, or what there is of it so far; `outputs` holds `n` completions, in the order of `index`.

    `prompt_logprobs`: an entry per prompt token, None for the first; None where not asked for or not there yet.
    `num_cached_tokens`: prompt tokens that the prefix cache spared; None until the prompt began. `error` says in one
    sentence why a completion with finish_reason "error" failed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[LogprobsAt | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None
    error: str | None = None

    @property
    def timeline(self) -> Timeline:
        """That of the completion that ended last, so that E2E is the request's; while it runs, of one that does."""
        return max((output.timeline for output in self.outputs), key=_finish)


@dataclass(frozen=True)
class TextDelta:
    """What one step of a stream adds to completion `index`: new text (never taken back), its tokens, and why it ended
    (None: it goes on). Text may come later than its tokens."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    index: int = 0


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a continuation is: `logprobs` [n] float32, one for each of `token_ids`; `total`: their sum."""

    token_ids: list[int]
    logprobs: np.ndarray
    total: float


def _finish(timeline: Timeline) -> float:
    return math.inf if timeline.finish is None else timeline.finish
