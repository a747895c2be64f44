"""Forbids tokens by masks that the host sends with a step: what keeps answers to a grammar (structured output).

A mask is a bit for each token, which is what crosses to the device: an eighth of a byte a token. The stage comes first,
before biases and penalties, so that these choose among what the grammar allows, and takes the most likely token that
is left itself: a greedy answer needs no other stage.

Invariant: a row whose bits are all set keeps its logits, and its token, to the last bit.
"""

import jax
import jax.numpy as jnp
from jax import Array

from .request_state import DrawColumn, Scalars
from .sampler import store
from .sums import argmax

_BITS = 32


def words_for(vocabulary: int) -> int:
    """Return how many int32 a mask over so many tokens takes."""
    return -(-vocabulary // _BITS)


def allow(scalars: Scalars, rows: Array, masks: Array, logits: Array) -> tuple[Scalars, Array, Array]:
    """Forbid tokens, and take the most likely one of the others for every row; a stage of sampling (`sampler.py`).

    Args:
        scalars: of all S slots; updated in place where they are donated.
        rows: [R, len(DrawColumn)] int32.
        masks: [R, words_for(V)] int32, token t as bit t % 32 of word t // 32; all bits set: every token may come.
        logits: [R, V] float32, as the model computes them.

    Returns:
        The scalars with the tokens stored in their slots, logits [R, V] that are -inf where the bit is 0, and the
        tokens [R] int32.
    """
    with jax.named_scope("allow"):
        allowed = jnp.where(spread(masks, logits.shape[1]), logits, -jnp.inf)
        tokens = argmax(allowed)
        return store(scalars, rows[:, DrawColumn.SLOT], tokens), allowed, tokens


def spread(masks: Array, vocabulary: int) -> Array:
    """Spread masks [R, words_for(V)] int32 over the vocabulary, [R, V] bool."""
    bits = masks[:, :, None] >> jnp.arange(_BITS, dtype=jnp.int32) & 1
    return bits.reshape(len(masks), -1)[:, :vocabulary] > 0
