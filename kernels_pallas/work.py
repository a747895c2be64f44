"""Lists of the work that a kernel call has, made on the device from lengths: small arrays, the same for all layers.

Everything is cut at absolute positions, so that how a request is computed does not depend on the others.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Splits(NamedTuple):
    """The splits of all requests, one after the other.

    `start` [R + 1]: request r has splits start[r] to start[r + 1] - 1. `items` [U, 4]: each split's request, first
    visible token, the token after its last, and nothing; U is the most there can be, rows from start[R] on mean nothing.
    """

    start: Array
    items: Array


def split_work(kv_len: Array, window: int | None, split: int, capacity: int) -> Splits:
    """Cut each request's visible tokens at multiples of `split`; `capacity` is the most tokens a request can have."""
    requests = kv_len.shape[0]
    most = -(-capacity // split) if window is None else min(-(-capacity // split), (window - 2 + split) // split + 1)
    first = jnp.zeros_like(kv_len) if window is None else jnp.maximum(kv_len - window, 0)
    count = jnp.where(kv_len > 0, (kv_len + split - 1) // split - first // split, 0)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count, dtype=jnp.int32)])
    index = jnp.arange(requests * most, dtype=jnp.int32)
    request = jnp.sum(index[:, None] >= start[None, 1:], axis=1, dtype=jnp.int32)
    request = jnp.minimum(request, requests - 1)
    cut = (first[request] // split + index - start[request]) * split
    begin, end = jnp.maximum(cut, first[request]), jnp.minimum(cut + split, kv_len[request])
    return Splits(start, jnp.stack([request, begin, end, jnp.zeros_like(begin)], axis=1))
