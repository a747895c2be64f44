"""Adjusts logits before temperature is applied: allowed tokens, bad words, minimum length, logit bias, penalties.

Order and meaning are vLLM's. The repetition penalty covers prompt and generated tokens, the presence and frequency
penalties cover generated tokens only; a bad word may begin in the generated text, not in the prompt.

Invariants:
- A row's logits depend on its own logits, parameters, dense row and position only. Rows without `Flag.DENSE` keep
  their logits, whatever their dense row holds.
- No NaN: a forbidden token stays at -inf, and no logit becomes +inf.
- `allowed_token_ids` takes precedence: where bad words and the minimum length would leave a row no token to draw, they
  are not applied to that row at that step.

A generated token is counted when it is fed (`count_fed`), so every token counts before the next one is drawn.
Not here: `top_k` and `top_p` (`cuts.py`), `min_p` and the draw (`sampler.py`); validation, which the host does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...kernels_pallas.scatter import add_to_rows, write_rows
from ..protocol.sampling_plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from .request_state import DenseRows, DrawColumn, Flag, Float, Int, Scalars, Seen


def adjust(dense: DenseRows, scalars: Scalars, rows: Array, logits: Array) -> tuple[DenseRows, Array]:
    """Count the tokens that a step fed, then adjust its logits; a stage of sampling (`sampler.py`).

    Args:
        dense: the dense rows of all S slots; updated in place where they are donated.
        scalars: of all S slots.
        rows: [R, len(DrawColumn)] int32.
        logits: [R, V] float32, as the model computes them.

    Returns:
        The dense rows, and logits [R, V]: the given ones where a row's request has no `Flag.DENSE`.
    """
    with jax.named_scope("adjust"):
        slot, position, fed = (rows[:, column] for column in DrawColumn)
        own = scalars.at(slot)
        dense = count_fed(dense, slot, fed, own.ints[:, Int.FLAGS])
        taken: DenseRows = jax.tree.map(lambda x: x.at[slot].get(mode="clip"), dense)
        return dense, adjust_rows(logits, own, taken, position)


def adjust_rows(logits: Array, scalars: Scalars, rows: DenseRows, position: Array) -> Array:
    """Apply biases, prohibitions and penalties to the rows that use them.

    Args:
        logits: [R, V] float32, as the model computes them.
        scalars: parameters of the R rows.
        rows: dense rows of the same R rows.
        position: [R] int32, the absolute position that the drawn token will have in its sequence.

    Returns:
        [R, V] float32.
    """
    biased = logits + rows.bias
    is_short = position < scalars.ints[:, Int.MIN_LEN]
    forbidden = is_short[:, None] & ((rows.seen & int(Seen.IS_STOP)) > 0) | _completes_bad_word(rows)
    allowed = jnp.where(forbidden, -jnp.inf, biased)
    leaves_some = jnp.any(allowed > -jnp.inf, axis=-1)
    adjusted = _penalise(jnp.where(leaves_some[:, None], allowed, biased), scalars, rows.seen)
    return jnp.where(scalars.has(Flag.DENSE)[:, None], adjusted, logits)


def _completes_bad_word(rows: DenseRows) -> Array:
    """Mark the tokens that would complete a bad word, [R, V] bool."""
    count, vocabulary = rows.seen.shape
    start, last = rows.bad_words[..., :-1], rows.bad_words[..., -1]  # [R, W, N - 1], [R, W]
    matches = jnp.all((start < 0) | (start == rows.recent[:, None]), axis=-1) & (last >= 0)
    token = jnp.where(matches, last, vocabulary)
    row = jnp.arange(count, dtype=jnp.int32)[:, None]
    return jnp.zeros((count, vocabulary), bool).at[row, token].set(True, mode="drop")


def _penalise(logits: Array, scalars: Scalars, seen: Array) -> Array:
    """Apply repetition, frequency and presence penalties, in this order, to logits [R, V]."""
    repetition, presence, frequency = (
        scalars.floats[:, column, None]
        for column in (Float.REPETITION_PENALTY, Float.PRESENCE_PENALTY, Float.FREQUENCY_PENALTY)
    )
    generated = (seen // int(Seen.GENERATED)).astype(jnp.float32)
    occurs = (generated > 0) | ((seen & int(Seen.IN_PROMPT)) > 0)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    penalised = jnp.where(occurs, repeated, logits)
    penalised -= frequency * generated
    penalised -= presence * (generated > 0).astype(jnp.float32)
    # A tiny repetition penalty overflows, and inf - inf would follow.
    return jnp.minimum(penalised, np.finfo(np.float32).max)


def count_fed(dense: DenseRows, slot: Array, tokens: Array, flags: Array) -> DenseRows:
    """Count the tokens that a decode step feeds, in place where `dense` is donated.

    Args:
        dense: the dense rows of all S slots.
        slot: [B] int32, distinct; S or more counts nothing.
        tokens: [B] int32, one per slot; negative ones are not counted.
        flags: [B] int32, `Int.FLAGS` of the rows; rows without `Flag.DENSE` are not counted.
    """
    slot = jnp.where(((flags & int(Flag.DENSE)) > 0) & (tokens >= 0), slot, dense.seen.shape[0])
    before = dense.recent.at[slot].get(mode="clip")  # [B, N - 1]
    recent = jnp.concatenate([before[:, 1:], tokens[:, None]], axis=1)
    return dense._replace(
        seen=add_to_rows(dense.seen, (slot, tokens), jnp.full_like(tokens, int(Seen.GENERATED))),
        recent=write_rows(dense.recent, slot, recent),
    )


def load_dense(dense: DenseRows, slot: Array, row: DenseRows) -> DenseRows:
    """Write one request's dense row, which has no leading axis, into `slot` []; in place if `dense` is donated."""
    loaded: DenseRows = jax.tree.map(lambda x, new: lax.dynamic_update_index_in_dim(x, new, slot, axis=0), dense, row)
    return loaded


def empty_dense(rows: int, vocabulary: int) -> DenseRows:
    """Describe the dense rows of `rows` slots by shape and dtype, without allocating them."""

    def array(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    return DenseRows(
        seen=array(vocabulary),
        bias=array(vocabulary, dtype=jnp.float32),
        bad_words=array(MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
        recent=array(MAX_BAD_WORD_TOKENS - 1),
    )
