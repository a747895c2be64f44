"""Computes log-probabilities of given tokens and of the most likely ones, from a model's raw logits.

Raw means before temperature, penalties and every other step of sampling, which is vLLM's default ("raw_logprobs"). A
row's scores depend on its own logits only. There are always K = `MAX_LOGPROBS` most likely tokens, because every other
number would need a program of its own; the host takes as many as a request asked for. Among equally likely tokens the
lower ids come first in `rank` and `top_ids`, as in greedy sampling and in cuts (`cuts.py`); a vocabulary smaller than K
is padded with id -1 at log-probability -inf.

`TokenScores` is the protocol's type. Here its fields are arrays on a device with one row per scored token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..protocol.results import TokenScores
from ..protocol.sampling_plan import MAX_LOGPROBS


def score(logits: Array, tokens: Array) -> TokenScores[Array]:
    """Score tokens [R] int32 against raw logits [R, V] float32; also a stage of sampling (`sampler.py`)."""
    vocabulary = logits.shape[1]
    logits = jnp.where(logits == 0, 0.0, logits)  # `top_k` would put -0.0 behind 0.0
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


def score_rows(head: Callable[[Array], Array], hidden: Array, rows: Array, targets: Array) -> TokenScores[Array]:
    """Score a target token after each of some rows; logits exist for these rows alone.

    Args:
        head: the LM head, [n, E] -> [n, V] float32.
        hidden: [T, E]; row i of a prompt gives the distribution of its token i + 1.
        rows: [R] int32, which of the T.
        targets: [R] int32.

    Returns:
        Scores of the R rows.
    """
    with jax.named_scope("score_rows"):
        return score(head(hidden.at[rows].get(mode="clip")), targets)
