"""What an executor reports back: tokens and scores of a step, or why it failed."""

from dataclasses import dataclass, field

import numpy as np

from .actions import Chunk, DecodeRow


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of some tokens in a row, from the model's raw logits, as host arrays.

    `logprob` [n] float32 of each token and `rank` [n] int32, 1 for the most likely; `top_ids` and `top_logprobs`
    [n, MAX_LOGPROBS] hold the most likely tokens in descending order.
    """

    logprob: np.ndarray
    rank: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True)
class StepResult:
    """What a step sampled, on the host.

    `rows`: the action's, chunks before decode rows. `tokens` [k, rows] int32, k = `Decode.steps`, else 1; a chunk's
    means something if it is its request's last. `scores` of the tokens, with leading axes [k, rows]; None unless one of
    the rows wants them. `prompt_scores`, by row: of the prompt tokens that follow those of a chunk, for requests that
    want them and have generated nothing yet; the prompt's first token has none.
    """

    t: float
    mesh: int
    step: int
    rows: tuple[Chunk | DecodeRow, ...]
    tokens: np.ndarray
    scores: TokenScores | None = None
    prompt_scores: dict[int, TokenScores] = field(default_factory=dict)

    def score_of(self, step: int, row: int) -> TokenScores:
        """The scores, n = 1, of tokens[step, row]; there must be any."""
        scores = self.scores
        if scores is None:
            raise ValueError(f"step {self.step} of mesh {self.mesh} has no scores: none of its rows wants any.")
        one = (step, slice(row, row + 1))
        return TokenScores(scores.logprob[one], scores.rank[one], scores.top_ids[one], scores.top_logprobs[one])


@dataclass(frozen=True)
class StepFailed:
    """A step raised after it was dispatched; whatever follows it on its mesh will raise too."""

    t: float
    mesh: int
    step: int
    reason: str


def describe(error: Exception) -> str:
    """One line: the kind of error and what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
