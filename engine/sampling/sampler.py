"""Batched sampling on the device: one uniform number per row, keyed by (seed, position), inverted through the CDF.

The steps follow vLLM's order: adjust logits (`logits_processors.py`), temperature, min_p, top_k, top_p.
Log-probabilities are those of the raw logits.

Invariants:
- A row's token depends on its own logits, parameters and position only: not on its index, nor on the other rows. The
  batch decides only which regimes (greedy, unrestricted, restricted) run at all; each row takes its own regime's token.
- Sampling parameters are data: none of their values needs another program.
- A token of probability 0 is never drawn, except where a row has no other: then it is token 0.

Not here: validation, which the host does (`sampling_params.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..protocol.results import TokenScores
from .logits_processors import adjust
from .logprobs import no_scores, score
from .request_state import DenseRows, Flag, Float, Int, Scalars

# A full sort of a vocabulary takes 40 times as long as finding this many of its largest.
BOUND = 64
# The vocabulary is summed in blocks of this many tokens, so that only block sums and one block need running sums.
_BLOCK = 256


class Sampled(NamedTuple):
    """The tokens drawn for R rows, and their scores."""

    tokens: Array  # [R] int32
    scores: TokenScores[Array]  # of rows with `Flag.LOGPROBS`, zeros elsewhere; see `logprobs.py`


class _Draw(NamedTuple):
    """The inputs of every regime, for R rows."""

    logits: Array  # [R, V] float32
    peak: Array  # [R, 1], the largest logit
    temperature: Array  # [R, 1], positive
    uniform: Array  # [R], in [0, 1)
    min_p: Array  # [R, 1]
    top_p: Array  # [R, 1]
    top_k: Array  # [R, 1]; V where all are kept

    def weights(self, logits: Array) -> Array:
        """Compute exp((logit - peak) / temperature), or 0 where that is below min_p, [R, n].

        These are unnormalised probabilities, whose sum is between 1 and n.
        """
        weights = jnp.exp((logits - self.peak) / self.temperature)
        # Also false for NaN, where all logits are -inf.
        return jnp.where(weights >= self.min_p, weights, 0.0)


def sample(logits: Array, scalars: Scalars, dense: DenseRows, slot: Array, position: Array) -> Sampled:
    """Draw the next token of every row.

    As in vLLM, min_p applies first, then top_k, then top_p to the renormalised rest: it keeps the smallest set of most
    likely tokens whose probabilities reach top_p, at least one token. Among equal logits at the edge of a set, the
    lower ids are kept.

    Args:
        logits: [R, V] float32, as the model computes them; -inf forbids a token.
        scalars: parameters of the R rows.
        dense: the dense rows of all S slots; read where a row has `Flag.DENSE`.
        slot: [R] int32, the rows' slots; S for rows without one.
        position: [R] int32, the absolute position that the drawn token will have in its sequence.
    """
    with jax.named_scope("sample"):
        adjusted: Array = lax.cond(
            jnp.any(scalars.has(Flag.DENSE)),
            lambda: adjust(logits, scalars, _take(dense, slot), position),
            lambda: logits,
        )
        tokens = _tokens(adjusted, scalars, position)
        wanted = scalars.has(Flag.LOGPROBS)
        scores: TokenScores[Array] = lax.cond(
            jnp.any(wanted),
            lambda: _where(wanted, score(logits, tokens), no_scores(len(tokens))),
            lambda: no_scores(len(tokens)),
        )
        return Sampled(tokens, scores)


def _take(dense: DenseRows, slot: Array) -> DenseRows:
    rows: DenseRows = jax.tree.map(lambda x: x.at[slot].get(mode="clip"), dense)
    return rows


def _where(wanted: Array, yes: TokenScores[Array], no: TokenScores[Array]) -> TokenScores[Array]:
    chosen: TokenScores[Array] = jax.tree.map(
        lambda x, y: jnp.where(wanted.reshape(-1, *(1,) * (x.ndim - 1)), x, y), yes, no
    )
    return chosen


def _tokens(logits: Array, scalars: Scalars, position: Array) -> Array:
    """Draw a token per row of adjusted logits [R, V], [R] int32."""
    is_greedy = scalars.floats[:, Float.TEMPERATURE] <= 0
    greedy = _argmax(logits)

    def stochastic() -> Array:
        return jnp.where(is_greedy, greedy, _sample(logits, scalars, position, ~is_greedy))

    tokens: Array = lax.cond(jnp.all(is_greedy), lambda: greedy, stochastic)
    return tokens


def _sample(logits: Array, scalars: Scalars, position: Array, wanted: Array) -> Array:
    """Draw the tokens of the rows where `wanted` [R] is true; the others are arbitrary."""
    draw = _draw(logits, scalars, position)
    weights = draw.weights(logits)
    is_restricted = ((draw.top_p < 1) | (draw.top_k < logits.shape[1]))[:, 0] & wanted
    kept = lax.cond(
        jnp.any(is_restricted),
        lambda: jnp.where(is_kept(draw, weights, is_restricted), weights, 0.0),
        lambda: weights,
    )
    return _inverse_cdf(kept, draw.uniform)


def _draw(logits: Array, scalars: Scalars, position: Array) -> _Draw:
    vocabulary = logits.shape[1]
    top_k = scalars.ints[:, Int.TOP_K, None]
    return _Draw(
        logits=logits,
        peak=logits.max(axis=-1, keepdims=True),
        # Subnormal temperatures may be flushed to 0, and 0 / 0 is NaN.
        temperature=jnp.maximum(scalars.floats[:, Float.TEMPERATURE, None], np.finfo(np.float32).tiny),
        uniform=_uniform(lax.bitcast_convert_type(scalars.ints[:, Int.SEED], jnp.uint32), position),
        min_p=scalars.floats[:, Float.MIN_P, None],
        top_p=scalars.floats[:, Float.TOP_P, None],
        top_k=jnp.where(top_k == 0, vocabulary, jnp.minimum(top_k, vocabulary)),
    )


class _Cut(NamedTuple):
    """The least likely token that each row may draw; among equal logits the one with the highest id."""

    logit: Array  # [R, 1]
    id: Array  # [R, 1]


def is_kept(draw: _Draw, weights: Array, wanted: Array) -> Array:
    """Mark the tokens that top_k and top_p keep, [R, V]: all of them in rows that are not wanted.

    The cut is found among the `BOUND` largest logits where these hold every token that the row may draw, else among
    all logits, sorted.
    """
    vocabulary = draw.logits.shape[1]
    bound = min(BOUND, vocabulary)
    total = weights.sum(axis=-1, keepdims=True)
    values, ids = lax.top_k(draw.logits, bound)
    few = draw.weights(values)
    reaches_top_p = few.sum(axis=-1, keepdims=True) >= draw.top_p * total
    keeps_all = draw.top_k == vocabulary
    # min_p removes the tail: if the smallest of the largest few has no weight, no smaller logit has any.
    fits = ((draw.top_k <= bound) | (keeps_all & reaches_top_p) | (few[:, -1:] == 0))[:, 0]
    bounded = _cut(draw, values, ids, total)

    # Row by row: only the rows that need the sort pay for it, and its buffers take the memory of one row only.
    def row(index: Array) -> _Cut:
        def unbounded() -> _Cut:
            mine, mine_total = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index, 1), (draw, total))
            cut = _cut(mine, *lax.top_k(mine.logits, vocabulary), mine_total)
            return _Cut(*(x[0] for x in cut))

        cut: _Cut = lax.cond(wanted[index] & ~fits[index], unbounded, lambda: _Cut(*(x[index] for x in bounded)))
        return cut

    cut: _Cut = lax.map(row, jnp.arange(wanted.shape[0], dtype=jnp.int32))
    is_tied = (draw.logits == cut.logit) & (_ids(draw.logits) <= cut.id)
    return (draw.logits > cut.logit) | is_tied | ~wanted[:, None]


def _cut(draw: _Draw, values: Array, ids: Array, total: Array) -> _Cut:
    """Find where top_k and top_p cut descending logits [R, n] of tokens `ids`; `total` [R, 1] sums all V weights."""
    weights, rank = draw.weights(values), _ids(values)
    kept = jnp.where(rank < draw.top_k, weights, 0.0)
    mass = jnp.where(draw.top_k == draw.logits.shape[1], total, kept.sum(axis=-1, keepdims=True))
    before = jnp.pad(jnp.cumsum(kept, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    in_nucleus = (kept > 0) & ((draw.top_p >= 1) | (before < draw.top_p * mass)) | (rank == 0)
    last = jnp.where(in_nucleus, rank, 0).max(axis=-1, keepdims=True)
    return _Cut(*(jnp.take_along_axis(x, last, axis=1) for x in (values, ids)))


def _uniform(seed: Array, position: Array) -> Array:
    """Draw one number in [0, 1) per row, [R] float32, a function of the row's (seed, position) alone."""

    def one(seed: Array, position: Array) -> Array:
        # The data of `jax.random.key(seed)`, to which a setting of the process may add an offset.
        words = jnp.stack([jnp.zeros_like(seed, jnp.uint32), seed.astype(jnp.uint32)])
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=jnp.float32)

    return jax.vmap(one)(seed, position)


def _argmax(logits: Array) -> Array:
    """Find the lowest index of the largest logit, [R] int32.

    Going by blocks is 100 times as fast on the CPU as one argmax over [R, V].
    """
    blocks = _in_blocks(logits, -jnp.inf)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1).astype(jnp.int32)
    return block * _BLOCK + jnp.argmax(_pick_block(blocks, block), axis=-1).astype(jnp.int32)


def _ids(values: Array) -> Array:
    """Number the last axis of [R, n] from 0 to n - 1, [1, n] int32."""
    return jnp.arange(values.shape[1], dtype=jnp.int32)[None]


def _in_blocks(values: Array, fill: float) -> Array:
    """Reshape [R, n] to [R, blocks, _BLOCK], padding the last block with `fill`."""
    rows, count = values.shape
    return jnp.pad(values, ((0, 0), (0, -count % _BLOCK)), constant_values=fill).reshape(rows, -1, _BLOCK)


def _pick_block(blocks: Array, index: Array) -> Array:
    """Pick one block of every row: [R, blocks, _BLOCK], [R] -> [R, _BLOCK]."""
    return jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]


def _inverse_cdf(weights: Array, uniform: Array) -> Array:
    """Find the index [R] int32 where the running sum of weights [R, n] passes the share `uniform` [R] of their sum."""
    blocks = _in_blocks(weights, 0.0)
    sums = blocks.sum(axis=-1)  # [R, blocks]
    block, rest = _first_above(sums, uniform * sums.sum(axis=-1))
    within, _ = _first_above(_pick_block(blocks, block), rest)
    return block * _BLOCK + within


def _first_above(weights: Array, target: Array) -> tuple[Array, Array]:
    """Find the first index whose running sum exceeds `target`, and how far `target` reaches into it; [R] each."""
    running = jnp.cumsum(weights, axis=-1)
    # Sums are rounded: a running sum may grow by an ulp at weight 0, and the last one may fall short of the target.
    is_possible = weights > 0
    passed = (running > target[:, None]) & is_possible
    last = jnp.where(is_possible, _ids(weights), 0).max(axis=-1)
    index = jnp.where(passed, _ids(weights), last[:, None]).min(axis=-1)
    start = jnp.where(_ids(weights) == index[:, None], running - weights, 0.0).sum(axis=-1)
    return index, jnp.maximum(target - start, 0.0)
