"""Sampling on the device, in stages: each is a function of [R, V] logits and a program of its own.

| stage | takes | gives |
|---|---|---|
| `logits_processors.adjust` | the model's logits | logits with biases and penalties |
| `cuts.top_k`, then `cuts.top_p` | logits | logits, -inf where they are cut |
| `draw` | logits | a token per row |
| `logprobs.score` | the model's logits, tokens | log-probabilities |

The step that computes the logits takes the most likely token of every row itself (`greedy`), which is all that a greedy
batch needs. The host knows what the rows of a step use (`request_rows.stages_of`) and dispatches those stages and no
others; inside a stage, rows that do not use it keep what they have, by masks. No program has a branch: a GPU would have
to ask the host which way to go.

The steps follow vLLM's order: adjusted logits, temperature, min_p, top_k, top_p. The draw is one uniform number per
row, keyed by (seed, position), inverted through the CDF.

Invariants:
- A row's token depends on its own logits, parameters and position only: not on its index, nor on the other rows. A
  stage that runs for the sake of another row changes nothing in this one, to the last bit.
- Sampling parameters are data: none of their values needs another program.
- A token of probability 0 is never drawn, except where a row has no other: then it is token 0.

Not here: validation, which the host does (`sampling_params.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...kernels_pallas.scatter import write_rows
from .request_state import DrawColumn, Float, Int, Scalars
from .sums import argmax, where_sum_passes


class Weights(NamedTuple):
    """Unnormalised probabilities of R rows of logits, whose sum is between 1 and V, and what they are made with."""

    peak: Array  # [R, 1], the largest logit
    temperature: Array  # [R, 1], positive
    min_p: Array  # [R, 1]

    def of(self, logits: Array) -> Array:
        """Compute exp((logit - peak) / temperature), or 0 where that is below min_p, [R, n]."""
        weights = jnp.exp((logits - self.peak) / self.temperature)
        # Also false for NaN, where all logits are -inf.
        return jnp.where(weights >= self.min_p, weights, 0.0)


def weigh(logits: Array, scalars: Scalars) -> Weights:
    """Say how logits [R, V] are weighed with the R rows' temperature and min_p."""
    temperature = scalars.floats[:, Float.TEMPERATURE, None]
    return Weights(
        peak=logits.max(axis=-1, keepdims=True),
        # Subnormal temperatures may be flushed to 0, and 0 / 0 is NaN.
        temperature=jnp.maximum(temperature, np.finfo(np.float32).tiny),
        min_p=scalars.floats[:, Float.MIN_P, None],
    )


def greedy(logits: Array) -> Array:
    """Take the most likely token of each row of logits [R, V], the lowest id among equals, [R] int32."""
    with jax.named_scope("greedy"):
        return argmax(logits)


def draw(scalars: Scalars, rows: Array, logits: Array) -> tuple[Scalars, Array]:
    """Draw the next token of every row, the most likely one where the temperature is 0, and store it in its slot.

    Args:
        scalars: of all S slots; updated in place where they are donated.
        rows: [R, len(DrawColumn)] int32.
        logits: [R, V] float32, adjusted and cut; -inf forbids a token.

    Returns:
        The scalars, and the tokens [R] int32.
    """
    with jax.named_scope("draw"):
        slot, position = rows[:, DrawColumn.SLOT], rows[:, DrawColumn.POSITION]
        own = scalars.at(slot)
        uniform = _uniform(lax.bitcast_convert_type(own.ints[:, Int.SEED], jnp.uint32), position)
        drawn = where_sum_passes(weigh(logits, own).of(logits), uniform)
        tokens = jnp.where(own.floats[:, Float.TEMPERATURE] > 0, drawn, argmax(logits))
        return store(scalars, slot, tokens), tokens


def store(scalars: Scalars, slot: Array, tokens: Array) -> Scalars:
    """Store the tokens [R] that were sampled for slots [R], to be fed next; those of slots past the last nowhere."""
    column = jnp.full_like(slot, int(Int.LAST_TOKEN))
    return scalars._replace(ints=write_rows(scalars.ints, (slot, column), tokens))


def _uniform(seed: Array, position: Array) -> Array:
    """Draw one number in [0, 1) per row, [R] float32, a function of the row's (seed, position) alone."""

    def one(seed: Array, position: Array) -> Array:
        # The data of `jax.random.key(seed)`, to which a setting of the process may add an offset.
        words = jnp.stack([jnp.zeros_like(seed, jnp.uint32), seed.astype(jnp.uint32)])
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

    return jax.vmap(one)(seed, position)
