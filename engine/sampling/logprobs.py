"""Computes log-probabilities of given tokens and of the most likely ones, from a model's logits.

Raw ones are of the logits before temperature, penalties and every other step of sampling, which is vLLM's default
("raw_logprobs"); processed ones (`score_processed`) of what all of these leave, from which the token was drawn. A row's
scores depend on its own logits and parameters only. There are always K (`EngineConfig.max_logprobs`) most likely
tokens, because every other number would need a program of its own; the host takes as many as a request asked for. Among
equally likely tokens the lower ids come first in `rank` and `top_ids`, as in greedy sampling and in cuts (`cuts.py`); a
vocabulary smaller than K is padded with id -1 at log-probability -inf.

`TokenScores` is the protocol's type. Here its fields are arrays on a device with one row per scored token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..protocol.results import TokenScores
from ..protocol.sampling_plan import MAX_LOGPROBS
from .request_state import DrawColumn, Float, Scalars
from .sampler import weigh


def score(logits: Array, tokens: Array, *, count: int = MAX_LOGPROBS, are_logits: bool = False) -> TokenScores[Array]:
    """Score tokens [R] int32 against logits [R, V] float32; also a stage of sampling (`sampler.py`).

    `count` is K; `are_logits` reports the logits themselves in place of log-probabilities.
    """
    vocabulary = logits.shape[1]
    logits = jnp.where(logits == 0, 0.0, logits)  # `top_k` would put -0.0 behind 0.0
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")  # [R, 1]
    id_ = jnp.arange(vocabulary, dtype=jnp.int32)
    ahead = (logits > own) | ((logits == own) & (id_ < tokens[:, None]))
    top, top_ids = lax.top_k(logits, min(count, vocabulary))
    fill = ((0, 0), (0, count - top.shape[1]))
    peak = logits.max(axis=-1, keepdims=True)
    log_total = jnp.log(jnp.exp(logits - peak).sum(axis=-1, keepdims=True))
    if are_logits:
        peak, log_total = jnp.zeros_like(peak), jnp.zeros_like(peak)
    return TokenScores(
        logprob=(own - peak - log_total)[:, 0],
        rank=1 + ahead.sum(axis=-1, dtype=jnp.int32),
        top_ids=jnp.pad(top_ids, fill, constant_values=-1),
        top_logprobs=jnp.pad(top - peak - log_total, fill, constant_values=-jnp.inf),
    )


def score_processed(
    scalars: Scalars, rows: Array, logits: Array, tokens: Array, *, count: int, are_logits: bool
) -> TokenScores[Array]:
    """Score tokens against the distribution that they were drawn from; a stage of sampling (`sampler.py`).

    Args:
        scalars: of all S slots.
        rows: [R, len(DrawColumn)] int32.
        logits: [R, V] float32, adjusted and cut, as `draw` takes them; here the temperature is applied, and min_p. A
            greedy row, which draws from nothing, is scored at temperature 1, as in vLLM.
        tokens: [R] int32.
        count: K.
        are_logits: report logits, as for `score`.
    """
    own = scalars.at(rows[:, DrawColumn.SLOT])
    is_drawn = own.floats[:, Float.TEMPERATURE, None] > 0
    weights = weigh(logits, own)
    # Divided after the peak is taken off: at a tiny temperature the quotients themselves have no digits left.
    base = jnp.zeros_like(weights.peak) if are_logits else weights.peak
    drawn = jnp.where(weights.of(logits) > 0, (logits - base) / weights.temperature, -jnp.inf)
    return score(jnp.where(is_drawn, drawn, logits), tokens, count=count, are_logits=are_logits)


def score_rows(
    head: Callable[[Array], Array],
    hidden: Array,
    rows: Array,
    targets: Array,
    *,
    count: int = MAX_LOGPROBS,
    are_logits: bool = False,
) -> TokenScores[Array]:
    """Score a target token after each of some rows; logits exist for these rows alone.

    Args:
        head: the LM head, [n, E] -> [n, V] float32.
        hidden: [T, E]; row i of a prompt gives the distribution of its token i + 1.
        rows: [R] int32, which of the T.
        targets: [R] int32.
        count: K.
        are_logits: as for `score`.

    Returns:
        Scores of the R rows.
    """
    with jax.named_scope("score_rows"):
        return score(head(hidden.at[rows].get(mode="clip")), targets, count=count, are_logits=are_logits)
