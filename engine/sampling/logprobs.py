"""Log-probabilities of given tokens and of the most likely ones, from a model's raw logits.

Raw: before temperature, penalties and everything else that sampling does, vLLM's default ("raw_logprobs"). A row's
scores depend on its own logits only. How many of the most likely tokens a request asked for is the host's business:
there are always `MAX_LOGPROBS` of them, because a number that varied would compile.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..protocol.results import HostScores, TokenScores
from ..protocol.sampling_plan import MAX_LOGPROBS

# Rows that the LM head takes at a time: enough for a GEMM, and 64 rows of 150,000 logits are 40 MB.
_HEAD_ROWS = 64


class Scores(NamedTuple):
    """Log-probabilities of one token per row, and each row's most likely tokens, K = MAX_LOGPROBS.

    `rank` is 1 for the most likely; of equally likely tokens those of lower ids come first, in `rank` and `top_ids`.
    A vocabulary smaller than K is filled up with id -1 at log-probability -inf.
    """

    logprob: Array  # [R] float32
    rank: Array  # [R] int32
    top_ids: Array  # [R, K] int32
    top_logprobs: Array  # [R, K] float32

    def to_host(self, rows: slice) -> HostScores:
        """Some rows as host arrays; waits for them. On arrays that are on the host already, a mere slice."""
        return TokenScores(*(np.asarray(x)[rows] for x in self))


def score(logits: Array, tokens: Array) -> Scores:
    """Score tokens [R] int32 against raw logits [R, V] float32."""
    vocabulary = logits.shape[1]
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")  # [R, 1]
    id_ = jnp.arange(vocabulary, dtype=jnp.int32)
    ahead = (logits > own) | ((logits == own) & (id_ < tokens[:, None]))
    peak = logits.max(axis=-1, keepdims=True)
    log_total = jnp.log(jnp.exp(logits - peak).sum(axis=-1, keepdims=True))
    top, top_ids = lax.top_k(logits, min(MAX_LOGPROBS, vocabulary))
    fill = ((0, 0), (0, MAX_LOGPROBS - top.shape[1]))
    return Scores(
        logprob=(own - peak - log_total)[:, 0],
        rank=1 + ahead.sum(axis=-1, dtype=jnp.int32),
        top_ids=jnp.pad(top_ids, fill, constant_values=-1),
        top_logprobs=jnp.pad(top - peak - log_total, fill, constant_values=-jnp.inf),
    )


def no_scores(rows: int) -> Scores:
    """Zeros, for R rows that want no log-probabilities."""
    top = (rows, MAX_LOGPROBS)
    return Scores(
        jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32)
    )


def score_tokens(head: Callable[[Array], Array], hidden: Array, targets: Array) -> Scores:
    """Score a target per hidden row, without ever holding the logits of all rows.

    Args:
        head: the LM head, [n, E] -> [n, V] float32.
        hidden: [T, E]; of a prompt, row i gives the distribution of token i + 1.
        targets: [T] int32.

    Returns:
        Scores of T rows.
    """
    count = targets.shape[0]
    padding = -count % _HEAD_ROWS
    blocks = (
        jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, _HEAD_ROWS, hidden.shape[1]),
        jnp.pad(targets, (0, padding)).reshape(-1, _HEAD_ROWS),
    )

    def block(inputs: tuple[Array, Array]) -> Scores:
        hidden, targets = inputs
        return score(head(hidden), targets)

    with jax.named_scope("score_tokens"):
        scores: Scores = lax.map(block, blocks)
        return Scores(*(x.reshape(-1, *x.shape[2:])[:count] for x in scores))
