"""Computes log-probabilities of given tokens and of the most likely ones, from a model's raw logits.

Raw means before temperature, penalties and every other step of sampling, which is vLLM's default ("raw_logprobs"). A
row's scores depend on its own logits only. There are always K = `MAX_LOGPROBS` most likely tokens, because every other
number would need a program of its own; the host takes as many as a request asked for. Among equally likely tokens the
lower ids come first in `rank` and `top_ids`; a vocabulary smaller than K is padded with id -1 at log-probability -inf.

`TokenScores` is the protocol's type. Here its fields are arrays on a device with one row per scored token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..protocol.results import TokenScores
from ..protocol.sampling_plan import MAX_LOGPROBS

# Rows per call of the LM head: enough for an efficient GEMM, and 64 rows of 150,000 logits take only 40 MB.
_HEAD_ROWS = 64


def score(logits: Array, tokens: Array) -> TokenScores[Array]:
    """Score tokens [R] int32 against raw logits [R, V] float32."""
    vocabulary = logits.shape[1]
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")  # [R, 1]
    id_ = jnp.arange(vocabulary, dtype=jnp.int32)
    ahead = (logits > own) | ((logits == own) & (id_ < tokens[:, None]))
    peak = logits.max(axis=-1, keepdims=True)
    log_total = jnp.log(jnp.exp(logits - peak).sum(axis=-1, keepdims=True))
    top, top_ids = lax.top_k(logits, min(MAX_LOGPROBS, vocabulary))
    fill = ((0, 0), (0, MAX_LOGPROBS - top.shape[1]))
    return TokenScores(
        logprob=(own - peak - log_total)[:, 0],
        rank=1 + ahead.sum(axis=-1, dtype=jnp.int32),
        top_ids=jnp.pad(top_ids, fill, constant_values=-1),
        top_logprobs=jnp.pad(top - peak - log_total, fill, constant_values=-jnp.inf),
    )


def no_scores(rows: int) -> TokenScores[Array]:
    """Make the zeros that stand for the scores of R rows without log-probabilities."""
    top = (rows, MAX_LOGPROBS)
    return TokenScores(
        jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32)
    )


def score_tokens(head: Callable[[Array], Array], hidden: Array, targets: Array) -> TokenScores[Array]:
    """Score one target token per hidden state, without ever holding the logits of all rows.

    Args:
        head: the LM head, [n, E] -> [n, V] float32.
        hidden: [T, E]; row i of a prompt gives the distribution of its token i + 1.
        targets: [T] int32.

    Returns:
        Scores of the T rows.
    """
    count = targets.shape[0]
    padding = -count % _HEAD_ROWS
    blocks = (
        jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, _HEAD_ROWS, hidden.shape[1]),
        jnp.pad(targets, (0, padding)).reshape(-1, _HEAD_ROWS),
    )

    def block(inputs: tuple[Array, Array]) -> TokenScores[Array]:
        hidden, targets = inputs
        return score(head(hidden), targets)

    with jax.named_scope("score_tokens"):
        scores: TokenScores[Array] = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], lax.map(block, blocks))
        return scores
