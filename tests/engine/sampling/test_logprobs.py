"""Scores against JAX's own log_softmax, and prompt scores against the whole logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.dense import processed
from helpers.sampling_stages import SCORE, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.protocol.results import TokenScores
from twinmesh.engine.protocol.sampling_plan import MAX_LOGPROBS, SamplingPlan
from twinmesh.engine.sampling import logprobs
from twinmesh.engine.sampling.request_rows import dense_row, scalars_of
from twinmesh.engine.sampling.request_state import Scalars

ROWS, VOCABULARY, EMBED = 16, 300, 24
score = jax.jit(logprobs.score)
rng = np.random.default_rng(0)
LOGITS = (4 * rng.standard_normal((ROWS, VOCABULARY))).astype(np.float32)
KERNEL = rng.standard_normal((EMBED, VOCABULARY)).astype(np.float32)


def head(hidden):
    return hidden @ KERNEL


def assert_scores(scores, logits, tokens):
    """Against log_softmax and a stable sort."""
    want, tokens = np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")
    top = order[:, :MAX_LOGPROBS]
    np.testing.assert_allclose(scores.logprob, np.take_along_axis(want, tokens[:, None], 1)[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores.rank, 1 + np.argmax(order == tokens[:, None], axis=1))
    np.testing.assert_array_equal(scores.top_ids, top)
    np.testing.assert_allclose(scores.top_logprobs, np.take_along_axis(want, top, 1), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=ROWS, max_size=ROWS), st.floats(0.1, 1e3), st.booleans())
def test_scores_are_those_of_log_softmax(tokens, scale, has_ties):
    logits = np.round(LOGITS) if has_ties else np.float32(scale) * LOGITS
    tokens = np.array(tokens, np.int32)
    assert_scores(score(logits, tokens), logits, tokens)


def test_the_token_ranked_first_is_the_argmax_and_ranks_index_the_most_likely():
    assert (score(LOGITS, LOGITS.argmax(-1).astype(np.int32)).rank == 1).all()
    tokens = np.asarray(score(LOGITS, np.zeros(ROWS, np.int32)).top_ids)[np.arange(ROWS), np.arange(ROWS)]
    np.testing.assert_array_equal(score(LOGITS, tokens).rank, 1 + np.arange(ROWS))


def test_a_forbidden_token_scores_minus_infinity_and_ranks_behind_all_others():
    logits = np.array(LOGITS)
    logits[:, 7] = -np.inf
    scores = score(logits, np.full(ROWS, 7, np.int32))
    assert np.isneginf(scores.logprob).all()
    assert (scores.rank == VOCABULARY).all()
    assert np.isfinite(scores.top_logprobs).all()


def test_a_small_vocabulary_is_filled_up():
    scores = score(LOGITS[:, :5], np.zeros(ROWS, np.int32))
    assert scores.top_ids.shape == scores.top_logprobs.shape == (ROWS, MAX_LOGPROBS)
    np.testing.assert_array_equal(scores.top_ids[:, :5], np.argsort(-LOGITS[:, :5], axis=-1))
    assert (scores.top_ids[:, 5:] == -1).all()
    assert np.isneginf(scores.top_logprobs[:, 5:]).all()
    np.testing.assert_allclose(np.exp(scores.top_logprobs).sum(-1), 1, rtol=1e-5)


def test_a_row_does_not_depend_on_its_index_or_its_neighbours():
    tokens = rng.integers(0, VOCABULARY, ROWS).astype(np.int32)
    want, order = score(LOGITS, tokens), rng.permutation(ROWS)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[order]), score(LOGITS[order], tokens[order]), want)
    for row in range(ROWS):
        others = np.array(LOGITS[::-1])
        others[row] = LOGITS[row]
        got = score(others, tokens)
        jax.tree.map(lambda x, y, row=row: np.testing.assert_array_equal(x[row], y[row]), got, want)


@pytest.mark.parametrize("count", [1, 64, 150])
def test_scored_rows_equal_their_whole_logits_scored(count):
    hidden = rng.standard_normal((150, EMBED)).astype(np.float32)
    rows, targets = (rng.integers(0, most, count).astype(np.int32) for most in (150, VOCABULARY))
    scores = jax.jit(lambda *a: logprobs.score_rows(head, *a))(hidden, rows, targets)
    assert scores.top_ids.shape == (count, MAX_LOGPROBS)
    assert_scores(scores, np.asarray(jax.jit(head)(hidden))[rows], targets)


def test_a_prompt_token_scores_the_same_wherever_it_lies():
    hidden = rng.standard_normal((150, EMBED)).astype(np.float32)
    targets = rng.integers(0, VOCABULARY, 64).astype(np.int32)
    scored = jax.jit(lambda *a: logprobs.score_rows(head, *a))
    rows, order, moved = np.arange(64, dtype=np.int32), rng.permutation(64), rng.permutation(150).astype(np.int32)
    want = scored(hidden, rows, targets)
    got = scored(hidden[moved], np.argsort(moved).astype(np.int32)[rows][order], targets[order])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[order]), got, want)


def test_a_prompt_s_logits_never_exist_all_at_once():
    rows = jax.ShapeDtypeStruct((64,), jnp.int32)
    shapes = jax.ShapeDtypeStruct((2048, EMBED), jnp.float32), rows, rows
    compiled = jax.jit(lambda *a: logprobs.score_rows(head, *a)).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * VOCABULARY * 4 / 2


def test_rows_on_the_host_are_a_slice_of_those_on_the_device():
    scores = score(LOGITS, np.zeros(ROWS, np.int32))
    host = jax.tree.map(lambda x: x[3:6], jax.device_get(scores))
    assert isinstance(host, TokenScores)
    assert isinstance(host.logprob, np.ndarray)
    np.testing.assert_array_equal(host.top_ids, np.asarray(scores.top_ids)[3:6])
    np.testing.assert_array_equal(host.rank, np.asarray(scores.rank)[3:6])


def test_it_traces_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        tokens = np.zeros(ROWS, np.int32)
        jax.jit(lambda *a: logprobs.score(*a)).trace(LOGITS, tokens)
        hidden = np.zeros((ROWS, EMBED), np.float32)
        jax.jit(lambda *a: logprobs.score_rows(head, *a)).trace(hidden, tokens, tokens)


# ---- of the distribution that tokens are drawn from

CUTS = {
    "temperature": dict(temperature=0.6),
    "greedy": dict(temperature=0.0),
    "top_k": dict(temperature=1.3, top_k=7),
    "top_p": dict(temperature=0.9, top_p=0.8),
    "min_p": dict(temperature=1.1, min_p=0.05),
    "all": dict(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01),
    "penalties": dict(
        temperature=0.7,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={5: 2.0, 9: -3.0},
    ),
    "all and penalties": dict(
        temperature=1.2,
        top_k=30,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=0.8,
        presence_penalty=-0.4,
        logit_bias={2: 1.0},
    ),
    "allowed": dict(temperature=1.0, allowed_token_ids=(3, 4, 50, 60), top_k=3),
}
PROMPT, GENERATED = (1, 2, 5, 5), (9, 5, 9)


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits"])
def test_processed_scores_are_those_of_a_calculation_in_float64(mode):
    plans = [SamplingPlan(seed=row, **fields) for row, fields in enumerate(CUTS.values())]
    logits = LOGITS[: len(plans)]
    host = [scalars_of(plan, len(PROMPT)) for plan in plans]
    scalars = Scalars(*map(np.stack, zip(*host, strict=True)))
    rows = [dense_row(plan, np.array(PROMPT), GENERATED, VOCABULARY) for plan in plans]
    dense = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    sampled = sample(logits, scalars, np.full(len(plans), 7), dense, mode=mode, most=VOCABULARY)
    for row, plan in enumerate(plans):
        want = processed(logits[row].astype(np.float64), plan, PROMPT, GENERATED, mode == "processed_logits")
        found = np.empty(VOCABULARY)
        found[sampled.scores.top_ids[row]] = sampled.scores.top_logprobs[row]
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(want), err_msg=list(CUTS)[row])
        np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5, err_msg=list(CUTS)[row])
        token = sampled.tokens[row]
        np.testing.assert_allclose(sampled.scores.logprob[row], want[token], rtol=2e-5, atol=2e-5)
        assert sampled.scores.rank[row] == 1 + (want > want[token]).sum()


def test_raw_logits_are_the_logits_themselves():
    scores = SCORE(LOGITS, np.arange(ROWS, dtype=np.int32), count=3, are_logits=True)
    np.testing.assert_array_equal(scores.logprob, LOGITS[np.arange(ROWS), np.arange(ROWS)])
    np.testing.assert_array_equal(scores.top_logprobs, -np.sort(-LOGITS)[:, :3])
