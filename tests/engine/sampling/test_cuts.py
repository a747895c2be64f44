"""What `top_k` and `top_p` keep, against an order and a running sum in float64, on vocabularies of 150,000 tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling_stages import TOP_K, TOP_P, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.sampling import cuts
from twinmesh.engine.sampling.request_rows import Stage
from twinmesh.engine.sampling.request_state import Float, Int, Scalars

ROWS, VOCABULARY = 4, 150_000
NEAR = 1e-5  # of the mass: whether a token this near the cut is kept is a matter of rounding


def scalars(count, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """Numbers, or one for each row."""
    floats, ints = np.zeros((count, len(Float)), np.float32), np.zeros((count, len(Int)), np.int32)
    floats[:, Float.TEMPERATURE], floats[:, Float.TOP_P], floats[:, Float.MIN_P] = temperature, top_p, min_p
    ints[:, Int.TOP_K] = top_k
    return Scalars(floats, ints)


def kept(stage, logits, parameters):
    """Which tokens the stage leaves as they are, [R, V]; the others are -inf."""
    rows = np.stack([np.arange(len(logits))] * 3, axis=1).astype(np.int32)
    cut = np.asarray(stage(parameters, rows, jnp.asarray(logits)))
    stays = cut > -np.inf
    np.testing.assert_array_equal(cut[stays], logits[stays])
    return stays


def by_likelihood(logits):
    """Ids in order: by logit, and among equal ones, 0.0 and -0.0 included, by id."""
    return np.lexsort((np.arange(len(logits)), -logits.astype(np.float64)))


def assert_nucleus(row, stays, temperature, top_p, min_p=0.0):
    """What stays is a prefix of the order, and ends where float64 says, give or take tokens that are `NEAR`."""
    order = by_likelihood(row)
    temperature, top_p, min_p = (float(np.float32(x)) for x in (temperature, top_p, min_p))
    weights = np.exp((row.astype(np.float64) - float(row.max())) / temperature)[order]
    weights = np.where(weights >= min_p, weights, 0)
    before = np.concatenate([[0], np.cumsum(weights / weights.sum())[:-1]])
    count = np.count_nonzero(stays)
    assert set(order[:count]) == set(np.flatnonzero(stays))
    assert count >= 1
    # The first token beyond what must stay, and the last that may.
    possible = np.flatnonzero((weights > 0) | (np.arange(len(row)) == 0))
    must = np.count_nonzero(before[possible] < top_p - NEAR)
    may = max(1, np.count_nonzero(before[possible] < top_p + NEAR))
    assert must <= count <= max(may, must)


def rows_of(kind, rng):
    """A row of logits of some kind."""
    logits = rng.standard_normal(VOCABULARY).astype(np.float32) * np.float32(rng.choice([0.1, 1, 3, 10]))
    match kind:
        case "ties":
            return np.round(logits)
        case "zeros":
            return np.where(logits > 1, np.float32(0), np.where(logits < -1, np.float32(-0.0), np.float32(-3)))
        case "forbidden":
            return np.where(rng.random(VOCABULARY) < 0.99, np.float32(-np.inf), logits)
        case "flat":
            return np.full(VOCABULARY, logits[0])
        case "one":
            return np.where(np.arange(VOCABULARY) == rng.integers(VOCABULARY), logits, np.float32(-np.inf))
        case "tail":
            tail = np.full(VOCABULARY, np.float32(-rng.uniform(11, 23)))
            tail[rng.integers(VOCABULARY)] = 0
            return tail
        case "tiny":
            return logits * np.float32(1e-30)
    return logits


KINDS = ["plain", "ties", "zeros", "forbidden", "flat", "one", "tail", "tiny"]
shares = st.one_of(st.sampled_from([1e-30, 0.1, 0.5, 0.9, 0.95, 0.99, 0.99998]), st.floats(1e-6, 1 - 1e-6))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.sampled_from(KINDS), min_size=ROWS, max_size=ROWS), shares,
    st.sampled_from([0.01, 0.7, 1.0, 2.0, 100.0, 1e30]), st.sampled_from([0.0, 0.0, 0.05]),
)  # fmt: skip
def test_top_p_keeps_the_nucleus_of_float64(seed, kinds, top_p, temperature, min_p):
    rng = np.random.default_rng(seed)
    logits = np.stack([rows_of(kind, rng) for kind in kinds])
    stays = kept(TOP_P, logits, scalars(ROWS, temperature, top_p, 0, min_p))
    for row, found in zip(logits, stays, strict=True):
        assert_nucleus(row, found, temperature, top_p, min_p)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.lists(st.sampled_from(KINDS), min_size=ROWS, max_size=ROWS),
    st.lists(st.one_of(st.integers(1, 100), st.integers(1, VOCABULARY)), min_size=ROWS, max_size=ROWS),
)  # fmt: skip
def test_top_k_keeps_exactly_k_tokens_in_the_order(seed, kinds, top_k):
    rng = np.random.default_rng(seed)
    logits = np.stack([rows_of(kind, rng) for kind in kinds])
    stays = kept(TOP_K, logits, scalars(ROWS, top_k=top_k))
    for row, found, count in zip(logits, stays, top_k, strict=True):
        want = np.zeros(VOCABULARY, bool)
        want[by_likelihood(row)[:count]] = True
        np.testing.assert_array_equal(found, want & (row > -np.inf))


def test_subnormal_logits_may_count_as_zeros_and_still_k_are_kept():
    """As XLA has it on CPUs."""
    logits = np.random.default_rng(0).standard_normal((1, VOCABULARY)).astype(np.float32) * np.float32(1e-39)
    assert kept(TOP_K, logits, scalars(1, top_k=700)).sum() == 700


def test_a_row_that_does_not_ask_is_left_as_it_is():
    logits = np.random.default_rng(0).standard_normal((ROWS, VOCABULARY)).astype(np.float32)
    stays = kept(TOP_P, logits, scalars(ROWS, top_p=[1, 0.5, 1, 0.5]))
    assert stays.all(axis=-1).tolist() == [True, False, True, False]
    stays = kept(TOP_K, logits, scalars(ROWS, top_k=[0, 3, 0, 3]))
    assert stays.sum(axis=-1).tolist() == [VOCABULARY, 3, VOCABULARY, 3]


def test_a_row_without_any_possible_token_stays_so():
    logits = np.full((2, VOCABULARY), -np.inf, np.float32)
    for stage in TOP_P, TOP_K:
        assert not kept(stage, logits, scalars(2, top_p=0.5, top_k=5)).any()


def test_a_running_sum_that_steps_down_lets_nothing_in():
    """XLA's running sum of float32 is not monotone; at its steps a cut by that sum would go wrong."""
    logits = np.sort(3 * np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32))[::-1]
    running = np.asarray(jnp.cumsum(jax.nn.softmax(jnp.asarray(logits))))
    steps = np.flatnonzero(np.diff(running) < 0)
    assert len(steps)
    chosen = steps[:: max(1, len(steps) // 16)]
    for top_p in running[chosen].tolist():
        (stays,) = kept(TOP_P, logits[None], scalars(1, top_p=top_p))
        assert_nucleus(logits, stays, 1.0, top_p)


@pytest.mark.parametrize("vocabulary", [1, 2, 8, 257, 2049])
def test_vocabularies_of_any_size(vocabulary):
    logits = np.round(np.random.default_rng(0).standard_normal((ROWS, vocabulary)) * 2).astype(np.float32)
    counts = np.minimum([1, 2, 5, 300], vocabulary)
    stays = kept(TOP_K, logits, scalars(ROWS, top_k=counts))
    assert stays.sum(axis=-1).tolist() == counts.tolist()
    shares = [0.1, 0.5, 0.9, 0.999]
    for row, found, top_p in zip(logits, kept(TOP_P, logits, scalars(ROWS, top_p=shares)), shares, strict=True):
        assert_nucleus(row, found, 1.0, top_p)


TIED = {  # logits, top_k, top_p: what is kept
    "two tied tokens, k 1": ([3, 3, 0], 1, 1.0, [0]),
    "signed zeros, k 1": ([-0.0, 0.0, -5], 1, 1.0, [0]),
    "signed zeros the other way round": ([0.0, -0.0, -5], 1, 1.0, [0]),
    "three tied, k 2": ([1, 2, 2, 2, 0], 2, 1.0, [1, 2]),
    "a tie behind the first, k 3": ([2, 1, 1, 1, 0], 3, 1.0, [0, 1, 2]),
    "all equal, half the mass": ([7, 7, 7, 7], 0, 0.5, [0, 1]),
    "all equal, a little more": ([7, 7, 7, 7], 0, 0.51, [0, 1, 2]),
    "two tied, half the mass": ([5, 5], 0, 0.5, [0]),
    "signed zeros, half the mass": ([-0.0, 0.0], 0, 0.5, [0]),
    "forbidden tokens tie and stay forbidden": ([-np.inf, 1, -np.inf], 2, 1.0, [1]),
}


@pytest.mark.parametrize(("logits", "top_k", "top_p", "want"), TIED.values(), ids=TIED.keys())
def test_every_path_agrees_on_tied_tokens(logits, top_k, top_p, want):
    """Cuts, greedy sampling, draws, and the ranks of log-probabilities; of one vocabulary, so as to compile once."""
    logits = np.array([logits + [-np.inf] * (5 - len(logits))], np.float32)
    parameters = scalars(1, top_k=top_k, top_p=top_p)
    name, stage = (Stage.TOP_K, TOP_K) if top_k else (Stage.TOP_P, TOP_P)
    assert np.flatnonzero(kept(stage, logits, parameters)[0]).tolist() == want
    most_likely = sample(logits, scalars(1, temperature=0.0), [0], stages={Stage.SCORE})
    assert most_likely.tokens[0] == want[0]
    assert most_likely.scores.rank[0] == 1
    assert most_likely.scores.top_ids[0, : len(want)].tolist() == want
    many = np.repeat(logits, 256, axis=0)
    drawn = scalars(256, top_k=top_k, top_p=top_p)
    drawn.ints[:, Int.SEED] = np.arange(256)
    assert set(sample(many, drawn, np.zeros(256), stages={name, Stage.DRAW}).tokens.tolist()) == set(want)


def test_a_cut_depends_on_its_own_row_only():
    rng = np.random.default_rng(3)
    logits = np.stack([rows_of(kind, rng) for kind in KINDS])
    shares, counts = np.linspace(0.1, 0.99, len(KINDS)), np.arange(1, 80, 10)
    order = rng.permutation(len(KINDS))
    for stage in TOP_P, TOP_K:
        want = kept(stage, logits, scalars(len(KINDS), top_p=shares, top_k=counts))
        got = kept(stage, logits[order], scalars(len(KINDS), top_p=shares[order], top_k=counts[order]))
        np.testing.assert_array_equal(got, want[order])


@pytest.mark.parametrize("stage", [cuts.top_k, cuts.top_p])
def test_a_cut_sorts_nothing_and_its_only_loop_has_a_known_length(stage):
    rows = jax.ShapeDtypeStruct((ROWS, 3), jnp.int32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), scalars(ROWS))
    text = jax.jit(stage).lower(shapes, rows, jax.ShapeDtypeStruct((ROWS, 2048), jnp.float32)).compile().as_text()
    assert "conditional(" not in text
    assert "sort(" not in text
    loops = [line for line in text.splitlines() if " while(" in line]
    assert len(loops) == 1
    assert '"known_trip_count":{"n":"32"}' in loops[0]


def test_it_traces_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        for stage in cuts.top_k, cuts.top_p:
            rows = np.zeros((2, 3), np.int32)
            jax.jit(lambda *a, stage=stage: stage(*a)).trace(scalars(2), rows, np.zeros((2, 50), np.float32))
