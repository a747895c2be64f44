"""The stages of sampling put together, as a mesh worker does it, without a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from twinmesh.engine.sampling import cuts, logits_processors, logprobs, sampler
from twinmesh.engine.sampling.logits_processors import empty_dense
from twinmesh.engine.sampling.request_rows import Stage

ADJUST, TOP_K, TOP_P = (jax.jit(f) for f in (logits_processors.adjust, cuts.top_k, cuts.top_p))
DRAW = jax.jit(sampler.draw)
SCORE, SCORE_PROCESSED = (
    jax.jit(f, static_argnames=("count", "are_logits")) for f in (logprobs.score, logprobs.score_processed)
)
GREEDY = jax.jit(sampler.greedy)
ALL = frozenset(Stage)


class Sampled(NamedTuple):
    """What comes of R rows."""

    tokens: Any  # [R]
    scores: Any  # None unless asked for


def sample(logits, scalars, position, dense=None, slot=None, stages=ALL, mode="raw_logprobs", most=20):
    """Run stages on logits [R, V]; scalars and dense rows are those of slots, by default as many as there are rows."""
    count = len(logits)
    slot = np.arange(count) if slot is None else slot
    rows = np.stack([slot, position, np.full(count, -1)], axis=1).astype(np.int32)
    raw = logits = jnp.asarray(logits)
    tokens = GREEDY(logits)
    if dense is None:
        dense = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty_dense(count, logits.shape[1]))
    if Stage.ADJUST in stages:
        dense, logits = ADJUST(dense, scalars, rows, logits)
    if Stage.TOP_K in stages:
        logits = TOP_K(scalars, rows, logits)
    if Stage.TOP_P in stages:
        logits = TOP_P(scalars, rows, logits)
    if Stage.DRAW in stages:
        scalars, tokens = DRAW(scalars, rows, logits)
    if Stage.SCORE not in stages:
        return Sampled(np.asarray(tokens), None)
    shown = {"count": most, "are_logits": mode.endswith("logits")}
    is_raw = mode.startswith("raw")
    scores = SCORE(raw, tokens, **shown) if is_raw else SCORE_PROCESSED(scalars, rows, logits, tokens, **shown)
    return Sampled(np.asarray(tokens), jax.tree.map(np.asarray, scores))
