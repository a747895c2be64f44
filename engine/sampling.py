"""Batched sampling on the device: one uniform number per row, keyed by (seed, position), inverted through the CDF.

Invariants:
- A row's token depends on its own logits, parameters and position only: not on its index, nor on the other rows.
  What the batch decides is only which regimes run at all; each row then takes its own regime's token.
- Sampling parameters are data: no value of theirs compiles anything.
- A token of probability 0 is never drawn.

Not here: validation (`sampling_params.py`, on the host), penalties, log-probabilities.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# A full sort of a vocabulary takes 40 times as long as finding this many of its largest.
_BOUND = 64
# The vocabulary is summed in blocks of this many tokens, so that only block sums and one block need running sums.
_BLOCK = 256


class SamplingInputs(NamedTuple):
    """The sampling parameters of R rows, on the device; meanings and ranges as in `SamplingParams`."""

    temperature: Array  # [R] float32; 0 is greedy
    top_p: Array  # [R] float32, in (0, 1]; 1 keeps all
    top_k: Array  # [R] int32; 0 keeps all
    seed: Array  # [R] uint32


class _Draw(NamedTuple):
    """What every regime needs of a row."""

    logits: Array  # [R, V] float32
    peak: Array  # [R, 1], the largest logit
    temperature: Array  # [R, 1], positive
    uniform: Array  # [R], in [0, 1)
    top_p: Array  # [R, 1]
    top_k: Array  # [R, 1]; V where all are kept

    def weights(self, logits: Array) -> Array:
        """exp((logit - peak) / temperature), [R, n]: probabilities but for their sum, which is between 1 and n."""
        return jnp.exp((logits - self.peak) / self.temperature)


def sample(logits: Array, inputs: SamplingInputs, position: Array) -> Array:
    """Draw the next token of every row.

    top_k applies first, then top_p to what it left, renormalised, as in vLLM: the smallest set of most likely tokens
    whose probabilities reach top_p, at least one. Of equal logits at the edge of a set, those of lower ids are in it.

    Args:
        logits: [R, V] float32; -inf forbids a token, at least one per row is finite.
        inputs: parameters, [R] each.
        position: [R] int32, the absolute position that the drawn token will have in its sequence.

    Returns:
        [R] int32 token ids.
    """
    with jax.named_scope("sample"):
        is_greedy = inputs.temperature <= 0
        greedy = _argmax(logits)

        def stochastic() -> Array:
            return jnp.where(is_greedy, greedy, _sample(logits, inputs, position, ~is_greedy))

        tokens: Array = lax.cond(jnp.all(is_greedy), lambda: greedy, stochastic)
        return tokens


def _sample(logits: Array, inputs: SamplingInputs, position: Array, wanted: Array) -> Array:
    """Tokens of the rows that are wanted [R]; others are arbitrary."""
    vocabulary = logits.shape[1]
    top_k = jnp.where(inputs.top_k == 0, vocabulary, jnp.minimum(inputs.top_k, vocabulary))
    draw = _Draw(
        logits=logits,
        peak=logits.max(axis=-1, keepdims=True),
        # Subnormal temperatures may be flushed to 0, and 0 / 0 is NaN.
        temperature=jnp.maximum(inputs.temperature, np.finfo(np.float32).tiny)[:, None],
        uniform=_uniform(inputs.seed, position),
        top_p=inputs.top_p[:, None],
        top_k=top_k[:, None],
    )
    is_restricted = (inputs.top_p < 1) | (top_k < vocabulary)
    anything = jnp.zeros(logits.shape[:1], jnp.int32)
    free = lax.cond(
        jnp.any(wanted & ~is_restricted),
        lambda: _inverse_cdf(draw.weights(logits), draw.uniform),
        lambda: anything,
    )
    restricted = lax.cond(
        jnp.any(wanted & is_restricted),
        lambda: _sample_restricted(draw, wanted & is_restricted),
        lambda: anything,
    )
    return jnp.where(is_restricted, restricted, free)


def _sample_restricted(draw: _Draw, wanted: Array) -> Array:
    """From the largest few where they hold all that a row may draw, else from the whole vocabulary, sorted."""
    bound = min(_BOUND, draw.logits.shape[1])
    total = draw.weights(draw.logits).sum(axis=-1, keepdims=True)
    values, ids = lax.top_k(draw.logits, bound)
    weights = draw.weights(values)
    reaches_top_p = weights.sum(axis=-1, keepdims=True) >= draw.top_p * total
    keeps_all = draw.top_k == draw.logits.shape[1]
    fits = ((draw.top_k <= bound) | (keeps_all & reaches_top_p))[:, 0]
    bounded = _sample_sorted(draw, weights, ids, total)

    # Row by row: only the rows that need it pay, and the sort's buffers, one row's, do not swell the step's memory.
    def row(index: Array) -> Array:
        def unbounded() -> Array:
            mine, mine_total = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index, 1), (draw, total))
            values, ids = lax.top_k(mine.logits, mine.logits.shape[1])
            return _sample_sorted(mine, mine.weights(values), ids, mine_total)[0]

        token: Array = lax.cond(wanted[index] & ~fits[index], unbounded, lambda: bounded[index])
        return token

    tokens: Array = lax.map(row, jnp.arange(wanted.shape[0], dtype=jnp.int32))
    return tokens


def _sample_sorted(draw: _Draw, weights: Array, ids: Array, total: Array) -> Array:
    """Apply top_k and top_p to descending weights [R, n], draw one of their ids; total [R, 1] is of the whole row."""
    rank = jnp.arange(weights.shape[1], dtype=jnp.int32)
    kept = jnp.where(rank < draw.top_k, weights, 0.0)
    mass = jnp.where(draw.top_k == draw.logits.shape[1], total, kept.sum(axis=-1, keepdims=True))
    before = jnp.pad(jnp.cumsum(kept, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    in_nucleus = (draw.top_p >= 1) | (before < draw.top_p * mass) | (rank == 0)
    index = _inverse_cdf(jnp.where(in_nucleus, kept, 0.0), draw.uniform)
    return jnp.take_along_axis(ids, index[:, None], axis=1)[:, 0]


def _uniform(seed: Array, position: Array) -> Array:
    """One number in [0, 1) per row, [R] float32, a function of the row's (seed, position) alone."""

    def one(seed: Array, position: Array) -> Array:
        return jax.random.uniform(
            jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position), dtype=jnp.float32
        )

    return jax.vmap(one)(seed, position)


def _argmax(logits: Array) -> Array:
    """The lowest index of the largest logit, [R] int32: 100 times as fast on the CPU as one argmax over [R, V]."""
    blocks = _in_blocks(logits, -jnp.inf)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1).astype(jnp.int32)
    return block * _BLOCK + jnp.argmax(_pick_block(blocks, block), axis=-1).astype(jnp.int32)


def _in_blocks(values: Array, fill: float) -> Array:
    """[R, n] -> [R, blocks, _BLOCK], the last one filled up."""
    rows, count = values.shape
    return jnp.pad(values, ((0, 0), (0, -count % _BLOCK)), constant_values=fill).reshape(rows, -1, _BLOCK)


def _pick_block(blocks: Array, index: Array) -> Array:
    """One block of every row: [R, blocks, _BLOCK], [R] -> [R, _BLOCK]."""
    return jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]


def _inverse_cdf(weights: Array, uniform: Array) -> Array:
    """The index, [R] int32, at which the running sum of weights [R, n] passes the given share [R] of their total."""
    blocks = _in_blocks(weights, 0.0)
    sums = blocks.sum(axis=-1)  # [R, blocks]
    block, rest = _first_above(sums, uniform * sums.sum(axis=-1))
    within, _ = _first_above(_pick_block(blocks, block), rest)
    return block * _BLOCK + within


def _first_above(weights: Array, target: Array) -> tuple[Array, Array]:
    """The first index whose running sum exceeds target, and how far target reaches into it; [R] each."""
    running = jnp.cumsum(weights, axis=-1)
    # Sums round: a running sum may grow by an ulp at weight 0, and the last may fall short of target.
    passed = (running > target[:, None]) & (weights > 0)
    index = jnp.where(passed.any(axis=-1), jnp.argmax(passed, axis=-1), jnp.argmax(weights, axis=-1))
    index = index.astype(jnp.int32)[:, None]
    start = jnp.take_along_axis(running, index, axis=1) - jnp.take_along_axis(weights, index, axis=1)
    return index[:, 0], jnp.maximum(target - start[:, 0], 0.0)
