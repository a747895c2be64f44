"""Cuts logits down to the most likely tokens, by number (`top_k`) or by mass (`top_p`): what is cut becomes -inf.

The order of tokens is that of greedy sampling and of log-probability ranks: by logit, descending, and among equal
logits by id, ascending; -0.0 equals 0.0. What is kept is a prefix of that order, so top_k=k keeps exactly k tokens, and
top_p the shortest prefix whose share of the mass reaches top_p, at least one token.

Nothing is sorted. Floats are ordered like the integers that their bits make, so the least logit that stays is found bit
by bit, from the highest down: a bit is set where the tokens from there up still are, or weigh, enough. Each bit is one
pass over the logits of all rows, and there are 32 passes whatever the logits are: no branch for which a GPU would have
to ask the host.

Masses are added up as integers, in units of 2**-30 of a row's mass. So sums are exact in any order: fewer tokens never
weigh more, no token below the cut is let in by a rounded running sum, and CPUs add many at a time.

Invariant: a row's cut depends on its own logits and parameters only.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .request_state import DrawColumn, Float, Int, Scalars
from .sampler import weigh
from .sums import add_up, ids_of, nth, padded

_TOP_BIT = np.uint32(1 << 31)
_WHOLE = 1 << 30  # a row's mass; with each token's rounded up it still is an int32
_GOLDEN = np.uint32(2654435769)  # 2**32 over the golden ratio: multiples of it, modulo 2**32, lie evenly


def top_k(scalars: Scalars, rows: Array, logits: Array) -> Array:
    """Keep each row's `Int.TOP_K` most likely tokens, all where that is 0; a stage of sampling (`sampler.py`).

    Args:
        scalars: of all S slots.
        rows: [R, len(DrawColumn)] int32.
        logits: [R, V] float32.

    Returns:
        [R, V] float32.
    """
    with jax.named_scope("top_k"):
        count = scalars.at(rows[:, DrawColumn.SLOT]).ints[:, Int.TOP_K, None]
        whole = padded(logits, -jnp.inf)
        least = _least(lambda level: add_up(lambda x: x >= level, whole) >= count, len(logits))
        ties = count - add_up(lambda x: x > least, whole)
        return _cut(logits, least, ties, count > 0)


def top_p(scalars: Scalars, rows: Array, logits: Array) -> Array:
    """Keep the most likely tokens that hold `Float.TOP_P` of a row's mass, all where that is 1; a stage of sampling.

    The mass is that of the tokens that temperature, min_p and earlier cuts leave. Arguments and result are those of
    `top_k`.
    """
    with jax.named_scope("top_p"):
        own = scalars.at(rows[:, DrawColumn.SLOT])
        share, weights = own.floats[:, Float.TOP_P, None], weigh(logits, own)
        all_ = weights.of(logits)
        unit = _WHOLE / jnp.maximum(all_.sum(axis=-1, keepdims=True), 1.0)  # weights add up to 1 or more
        whole, masses = padded(logits, -jnp.inf), padded(_in_units(all_ * unit), 0)
        total = add_up(lambda mass: mass, masses).astype(jnp.float32)
        # A share that is too small to matter keeps the most likely token.
        target = jnp.maximum(jnp.ceil(share * total), 1.0).astype(jnp.int32)

        def mass(is_in: Callable[[Array, Array], Array], level: Array) -> Array:
            return add_up(lambda x, mass: jnp.where(is_in(x, level), mass, 0), whole, masses)

        least = _least(lambda level: mass(jnp.greater_equal, level) >= target, len(logits))
        lacking = (target - mass(jnp.greater, least)).astype(jnp.float32)
        # Where so many ties hold exactly what is lacking, rounding must not ask for one more.
        ties = jnp.ceil(lacking / (weights.of(least) * unit) * (1 - 2**-22))
        return _cut(logits, least, jnp.clip(ties, 1, logits.shape[1]).astype(jnp.int32), share < 1)


def _in_units(masses: Array) -> Array:
    """Make masses [R, V] in units whole, int32, without a bias: those of many small tokens would all be rounded alike,
    so what is added before the fraction is dropped differs by id. 0 stays 0."""
    ids = ids_of(masses).astype(jnp.uint32)
    added = (ids * _GOLDEN >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)
    return jnp.floor(masses + added).astype(jnp.int32)


def _least(reaches: Callable[[Array], Array], rows: int) -> Array:
    """Find the largest float32 `level` [R, 1] that reaches what is asked, NaN where none does.

    `reaches(level)` [R, 1] bool must hold below any level for which it holds, and not for NaN.
    """

    def bit(index: Array, found: Array) -> Array:
        tried = found | (_TOP_BIT >> index.astype(jnp.uint32))
        return jnp.where(reaches(_float(tried)), tried, found)

    return _float(lax.fori_loop(0, 32, bit, jnp.zeros((rows, 1), jnp.uint32)))


def _float(key: Array) -> Array:
    """Return the float32 at a place in the order of floats: -NaN, -inf, ..., -0.0, 0.0, ..., inf, NaN."""
    bits = jnp.where(key >= _TOP_BIT, key ^ _TOP_BIT, ~key)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _cut(logits: Array, least: Array, ties: Array, is_wanted: Array) -> Array:
    """Forbid what is below `least` [R, 1], and of the tokens that equal it all but the `ties` [R, 1] with the lowest
    ids; nothing where `least` is NaN or a row does not want it."""
    is_tied = logits == least
    is_kept = (logits > least) | (is_tied & (ids_of(logits) <= nth(is_tied, ties))) | jnp.isnan(least) | ~is_wanted
    return jnp.where(is_kept, logits, -jnp.inf)
