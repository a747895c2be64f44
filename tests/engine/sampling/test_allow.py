"""Masks over tokens: what they forbid is never drawn, and rows without one keep their bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling_stages import ADJUST, DRAW, TOP_K, TOP_P
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.sampling.allow import allow, spread, words_for
from twinmesh.engine.sampling.request_rows import dense_row, scalars_of
from twinmesh.engine.sampling.request_state import Int, Scalars
from twinmesh.engine.structured.vocabulary import bits

ALLOW = jax.jit(allow)
V, R = 101, 4


def logits(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((R, V)).astype(np.float32) * 3)


def scalars(*plans):
    floats, ints = zip(*(scalars_of(plan, 5) for plan in plans), strict=True)
    return Scalars(jnp.stack(floats), jnp.stack(ints))


def rows(position=9):
    return np.stack([np.arange(R), np.full(R, position), np.full(R, -1)], axis=1).astype(np.int32)


def masks(*allowed):
    """A mask for each row; None: every token."""
    width = words_for(V)
    return np.stack([np.full(width, -1, np.int32) if one is None else bits(one, width) for one in allowed])


GREEDY = SamplingPlan(temperature=0.0, seed=0)
HOT = SamplingPlan(temperature=5.0, seed=3)


def test_a_mask_is_spread_over_the_vocabulary():
    spreading = np.asarray(spread(masks([0, 31, 32, 100], None, [], [5]), V))
    assert [np.flatnonzero(row).tolist() for row in spreading] == [[0, 31, 32, 100], list(range(V)), [], [5]]


def test_the_most_likely_allowed_token_is_taken_and_stored():
    given = logits()
    changed, allowed, tokens = ALLOW(scalars(*[GREEDY] * R), rows(), masks([7, 50], None, [100], [0, 1]), given)
    best = [7 if given[0, 7] >= given[0, 50] else 50, int(given[1].argmax()), 100, int(given[3, :2].argmax())]
    assert tokens.tolist() == best
    assert changed.ints[:, Int.LAST_TOKEN].tolist() == best
    assert np.isneginf(np.asarray(allowed)[2]).sum() == V - 1


def test_a_row_without_a_mask_keeps_its_logits_to_the_last_bit():
    given = logits()
    _, allowed, tokens = ALLOW(scalars(*[GREEDY] * R), rows(), masks([3], None, None, [4]), given)
    assert np.asarray(allowed)[1:3].tobytes() == np.asarray(given)[1:3].tobytes()
    assert tokens[1:3].tolist() == given[1:3].argmax(-1).tolist()


@pytest.mark.parametrize(
    "plan",
    [
        HOT,
        SamplingPlan(temperature=3.0, seed=1, top_k=50, top_p=0.9),
        SamplingPlan(temperature=2.0, seed=2, min_p=0.001),
        SamplingPlan(temperature=2.0, seed=2, repetition_penalty=0.5, presence_penalty=-2.0, frequency_penalty=-2.0),
        SamplingPlan(temperature=2.0, seed=2, logit_bias={60: 1e6}),
        SamplingPlan(temperature=2.0, seed=2, bad_words=((7,),)),
    ],
)
def test_what_a_mask_forbids_has_no_probability_whatever_follows(plan):
    """The processed distribution, from which is drawn, gives forbidden tokens exactly 0."""
    only = [7, 8, 9]
    for position in range(20):
        state = scalars(*[plan] * R)
        _, left, _ = ALLOW(state, rows(position), masks(only, only, only, only), logits(position))
        dense = dense_row(plan, np.array([60, 61], np.int32), [60, 7], V)
        stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * R), dense)
        _, left = ADJUST(stacked, state, rows(position), left)
        left = TOP_P(state, rows(position), TOP_K(state, rows(position), left))
        shares = np.asarray(jax.nn.softmax(left / plan.temperature))
        assert (np.delete(shares, only, axis=1) == 0).all()
        assert set(np.asarray(DRAW(state, rows(position), left)[1]).tolist()) <= {*only}


@pytest.mark.parametrize(
    "plan",
    [
        SamplingPlan(temperature=1.0, seed=1, bad_words=((2,),)),
        SamplingPlan(temperature=1.0, seed=1, min_tokens=50, stop_ids=frozenset({2})),
    ],
)
def test_the_only_allowed_token_comes_although_it_is_a_bad_word_or_too_early_an_end(plan):
    state, only = scalars(*[plan] * R), masks([2], [2], [2], [2])
    _, left, _ = ALLOW(state, rows(), only, logits())
    dense = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * R), dense_row(plan, np.array([1]), [1], V))
    _, left = ADJUST(dense, state, rows(), left)
    assert DRAW(state, rows(), left)[1].tolist() == [2] * R


def test_rows_that_draw_are_drawn_as_without_the_stage():
    state, given = scalars(*[HOT] * R), logits()
    _, left, _ = ALLOW(state, rows(), masks(None, [1], None, [2]), given)
    plain, masked = DRAW(state, rows(), given)[1], DRAW(state, rows(), left)[1]
    assert (plain[0], plain[2]) == (masked[0], masked[2])
    assert (int(masked[1]), int(masked[3])) == (1, 2)
