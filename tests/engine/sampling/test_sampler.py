"""Distribution, exact sets, and independence of rows from each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plans import Case, greedy, stack
from helpers.sampling_stages import ALL, sample
from twinmesh.engine.protocol.sampling_plan import MAX_LOGPROBS, SamplingPlan
from twinmesh.engine.sampling import sampler
from twinmesh.engine.sampling.request_rows import Stage, stages_of
from twinmesh.engine.sampling.request_state import DenseRows, Flag, Float, Int, Scalars

VOCABULARY = 1000


def inputs(rows, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=None, flags=0):
    """Scalars of so many rows, of numbers or of [rows] each."""
    floats, ints = np.zeros((rows, len(Float)), np.float32), np.zeros((rows, len(Int)), np.int32)
    floats[:, Float.TEMPERATURE], floats[:, Float.TOP_P], floats[:, Float.MIN_P] = temperature, top_p, min_p
    ints[:, Int.TOP_K], ints[:, Int.FLAGS] = top_k, flags
    ints[:, Int.SEED] = np.asarray(np.arange(rows) if seed is None else seed).astype(np.uint32).view(np.int32)
    return Scalars(floats, ints)


def draws(logits, count=2048, first=0, **parameters):
    """Tokens of `count` rows with the same logits and parameters, seeds 0, 1, ..."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return sample(rows, inputs(count, **parameters), np.full(count, first)).tokens


def tokens_of(logits, scalars, position=None):
    return sample(logits, scalars, np.zeros(len(logits)) if position is None else position).tokens


def gaussian_logits(rows, scale=3.0, seed=0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal((rows, VOCABULARY)), jnp.float32)


def nucleus(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """The allowed ids and their probabilities, in float64."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)[order]
    kept = int(np.sum(weights >= min_p))
    kept = min(kept, top_k) if top_k else kept
    order, weights = order[:kept], weights[:kept]
    probabilities = weights / weights.sum()
    kept = 1 + int(np.sum(np.cumsum(probabilities) < top_p)) if top_p < 1 else len(order)
    return order[:kept], probabilities[:kept] / probabilities[:kept].sum()


def assert_distribution(tokens, ids, probabilities):
    """Chi-square over the expected counts of at least 5, within 5 standard deviations; nothing outside `ids`."""
    assert np.isin(tokens, ids).all()
    expected = len(tokens) * probabilities
    often = expected >= 5
    counts = np.array([np.sum(tokens == i) for i in ids[often]])
    statistic = np.sum((counts - expected[often]) ** 2 / expected[often])
    assert statistic < often.sum() + 5 * np.sqrt(2 * often.sum())


REGIMES = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "top_k then top_p": {"top_k": 20, "top_p": 0.7},
    "top_k over the bound": {"top_k": 100, "temperature": 4.0},
    "top_k over the bound then top_p": {"top_k": 300, "top_p": 0.9, "temperature": 4.0},
    "top_p over the bound": {"top_p": 0.8, "temperature": 4.0},
    "min_p": {"min_p": 0.02},
    "min_p after temperature": {"min_p": 0.02, "temperature": 3.0},
    "min_p then top_k": {"min_p": 0.02, "top_k": 9},
    "min_p then a wide top_k": {"min_p": 0.1, "top_k": 500, "temperature": 2.0},
    "min_p then top_p": {"min_p": 0.1, "top_p": 0.7},
    "min_p then top_k then top_p": {"min_p": 0.05, "top_k": 10, "top_p": 0.8},
    "min_p then top_p over the bound": {"min_p": 0.05, "top_p": 0.9, "temperature": 4.0},
}


@pytest.mark.parametrize("parameters", REGIMES.values(), ids=REGIMES.keys())
def test_draws_follow_the_distribution(parameters):
    logits = np.asarray(gaussian_logits(1)[0])
    assert_distribution(draws(logits, **parameters), *nucleus(logits, **parameters))


@pytest.mark.parametrize(
    "parameters", [REGIMES["top_k"], REGIMES["top_p"], REGIMES["top_k then top_p"], {"min_p": 0.6}], ids=str
)
def test_every_allowed_token_can_be_drawn(parameters):
    logits = np.asarray(gaussian_logits(1, scale=2.0)[0])
    logits = np.where(np.argsort(np.argsort(-logits)) < 12, 0.1 * logits, -20.0)
    ids, _ = nucleus(logits, **parameters)
    assert set(draws(logits, **parameters)) == set(ids)


def test_greedy_is_argmax_and_takes_the_lowest_of_equals():
    logits = np.array(gaussian_logits(32))
    logits[3, [900, 17, 400]] = 50.0
    np.testing.assert_array_equal(tokens_of(logits, inputs(32, temperature=0.0)), logits.argmax(-1))
    mixed = tokens_of(logits, inputs(32, temperature=np.arange(32) % 2))
    np.testing.assert_array_equal(mixed[::2], logits.argmax(-1)[::2])


def test_a_row_of_zeros_is_greedy_even_among_others():
    logits, zeros = gaussian_logits(32), Scalars(*(np.zeros_like(x) for x in inputs(32)))
    np.testing.assert_array_equal(tokens_of(logits, zeros), logits.argmax(-1))
    is_zero = np.arange(32)[:, None] % 2 == 0
    for others in inputs(32, top_p=0.9), inputs(32, min_p=0.1), inputs(32, flags=Flag.DENSE):
        mixed = Scalars(*(np.where(is_zero, x, y) for x, y in zip(zeros, others, strict=True)))
        np.testing.assert_array_equal(tokens_of(logits, mixed)[::2], logits.argmax(-1)[::2])


@pytest.mark.parametrize(
    "parameters",
    [{"top_p": 1e-6}, {"top_k": 1}, {"temperature": 1e-6}, {"temperature": 1e-42}, {"min_p": 1.0}],
)
def test_the_narrowest_sampling_is_argmax(parameters):
    logits = gaussian_logits(32)
    np.testing.assert_array_equal(tokens_of(logits, inputs(32, **parameters)), logits.argmax(-1))


@pytest.mark.parametrize("parameters", [{}, {"top_k": 999}, {"top_k": 5000}, {"top_p": 0.999999}])
def test_a_huge_temperature_is_uniform(parameters):
    tokens = draws(np.asarray(gaussian_logits(1)[0]), temperature=1e30, **parameters)
    counts, _ = np.histogram(tokens, bins=8, range=(0, VOCABULARY))
    assert len(set(tokens)) > 800
    assert np.abs(counts - 256).max() < 5 * 16


@pytest.mark.parametrize(
    "parameters", [{}, {"top_p": 0.99}, {"top_k": 40}, {"temperature": 1e30, "top_p": 0.99}, {"min_p": 0.1}]
)
def test_forbidden_tokens_are_never_drawn(parameters):
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[[5, 300, 999]] = [1.0, 0.5, 0.0]
    assert set(draws(logits, **parameters)) == {5, 300, 999}


@pytest.mark.parametrize("parameters", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 300}, {"min_p": 0.1}])
def test_a_row_without_any_possible_token_gets_token_0(parameters):
    assert set(draws(np.full(VOCABULARY, -np.inf), count=32, **parameters)) == {0}


def everything(rows, rng):
    """Cases that mix all regimes and features, and where each stands."""

    def ids(count):
        return tuple(rng.integers(0, VOCABULARY, count).tolist())

    def plan():
        return SamplingPlan(
            temperature=rng.choice([0.0, 0.7, 1.0, 5.0]),
            seed=int(rng.integers(0, 2**32)),
            top_p=rng.choice([0.3, 0.95, 1.0]),
            top_k=int(rng.choice([0, 5, 64, 200])),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.4]),
            presence_penalty=rng.choice([0.0, 0.0, 0.4]),
            logit_bias={} if rng.random() < 0.7 else {int(rng.integers(VOCABULARY)): 3.0},
            bad_words=() if rng.random() < 0.7 else (ids(1), ids(2)),
            logprobs=None if rng.random() < 0.5 else 3,
        )

    return [Case(plan(), ids(rng.integers(1, 99)), ids(rng.integers(0, 99))) for _ in range(rows)]


def sample_cases(logits, cases, slot=None, stages=ALL):
    """Tokens and scores, on the host; the cases' rows lie in the given slots."""
    scalars, rows, position = stack(cases, VOCABULARY)
    slot = np.arange(len(cases)) if slot is None else slot
    stored = Scalars(*map(np.empty_like, scalars)), DenseRows(*map(np.empty_like, rows))
    for arrays, given in zip(stored, (scalars, rows), strict=True):
        for array, row in zip(arrays, given, strict=True):
            array[slot] = row
    return sample(logits, stored[0], position, stored[1], slot, stages)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_row_does_not_depend_on_its_neighbours_its_index_or_its_slot():
    rng = np.random.default_rng(1)
    logits, cases = gaussian_logits(32), everything(32, rng)
    want = sample_cases(logits, cases)
    assert_same(sample_cases(logits, cases, slot=rng.permutation(32)), want)
    order = rng.permutation(32)
    assert_same(sample_cases(logits[order], [cases[i] for i in order]), jax.tree.map(lambda x: x[order], want))
    for row in range(0, 32, 3):
        others, neighbours = everything(32, rng), np.array(gaussian_logits(32, seed=row + 2))
        others[row], neighbours[row] = cases[row], logits[row]
        got = sample_cases(neighbours, others, slot=rng.permutation(32))
        assert_same(jax.tree.map(lambda x, row=row: x[row], got), jax.tree.map(lambda x, row=row: x[row], want))


def test_a_row_alone_with_the_stages_that_it_needs_equals_the_row_among_all():
    """Stages that run for the sake of other rows change nothing, to the last bit of the scores."""
    cases, logits = everything(32, np.random.default_rng(1)), gaussian_logits(32)
    want = sample_cases(logits, cases)
    for row in range(32):
        alone = [case if i == row else Case(greedy()) for i, case in enumerate(cases)]
        got = sample_cases(logits, alone, stages=stages_of(cases[row].plan) | {Stage.SCORE})
        assert_same(jax.tree.map(lambda x, row=row: x[row], got), jax.tree.map(lambda x, row=row: x[row], want))


def test_greedy_rows_take_the_most_likely_token_that_is_left():
    logits = np.asarray(gaussian_logits(8))
    best = [tuple(x) for x in np.argsort(-logits, axis=-1)[:, :3].tolist()]
    cases = [
        Case(greedy()),
        Case(greedy(bad_words=((best[1][0],),))),
        Case(greedy(repetition_penalty=100.0), prompt=(best[2][0],), outputs=(best[2][1],)),
        Case(greedy(presence_penalty=2.0, frequency_penalty=2.0), outputs=(best[3][0],) * 20),
        Case(greedy(stop_ids=frozenset(best[4][:2]), min_tokens=1)),
        Case(greedy(allowed_token_ids=(7, 8, 9))),
        Case(greedy(logit_bias={3: 100.0})),
        Case(greedy(bad_words=((5, 6, best[7][0]),)), outputs=(5, 6)),
    ]
    want = [
        best[0][0],
        best[1][1],
        best[2][2],
        best[3][1],
        best[4][2],
        7 + int(logits[5, 7:10].argmax()),
        3,
        best[7][1],
    ]
    assert sample_cases(logits, cases).tokens.tolist() == want


def test_rows_of_no_slot_read_nothing_that_matters():
    logits, cases = gaussian_logits(8), [Case(greedy(bad_words=((1,),)))] * 8
    scalars, rows, position = stack(cases, VOCABULARY)
    slot = np.minimum(np.arange(8), 4)
    scalars = Scalars(*(x[:4] for x in scalars))  # of the four slots; the last four rows have none
    tokens = sample(logits, scalars, position, DenseRows(*(x[:4] for x in rows)), slot).tokens
    assert ((tokens >= 0) & (tokens < VOCABULARY)).all()
    np.testing.assert_array_equal(tokens[:4], logits.argmax(-1)[:4])


def test_scores_are_of_the_raw_logits():
    logits = gaussian_logits(8)
    plans = [SamplingPlan(2.0, i, repetition_penalty=9.0, logit_bias={4: 20.0}, top_k=3) for i in range(8)]
    sampled, raw = sample_cases(logits, [Case(plan, (1, 2)) for plan in plans]), np.asarray(jax.nn.log_softmax(logits))
    own = np.take_along_axis(raw, sampled.tokens[:, None], 1)[:, 0]
    np.testing.assert_allclose(sampled.scores.logprob, own, rtol=1e-5)
    np.testing.assert_array_equal(sampled.scores.rank, 1 + np.sum(raw > own[:, None], axis=1))
    np.testing.assert_array_equal(sampled.scores.top_ids, np.argsort(-raw)[:, :MAX_LOGPROBS])


def test_seed_and_position_are_the_whole_key():
    logits = jnp.zeros((32, VOCABULARY))
    first = tokens_of(logits, inputs(32, seed=np.full(32, 7)), jnp.full(32, 3, jnp.int32))
    by_position = tokens_of(logits, inputs(32, seed=np.full(32, 7)), jnp.arange(32, dtype=jnp.int32))
    by_seed = tokens_of(logits, inputs(32, seed=2**32 - 32 + np.arange(32)), jnp.full(32, 3, jnp.int32))
    assert len(set(first.tolist())) == 1
    assert by_position[3] == first[0]
    assert len(set(by_position.tolist())) > 25
    assert len(set(by_seed.tolist())) > 25


@pytest.mark.parametrize("vocabulary", [3, 257])
def test_small_and_odd_vocabularies(vocabulary):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((32, vocabulary)), jnp.float32)
    mixed = inputs(32, top_p=np.resize([0.5, 1.0], 32), top_k=np.resize([0, 2, 400], 32), flags=0)
    tokens = tokens_of(logits, mixed)
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    np.testing.assert_array_equal(tokens_of(logits, inputs(32, temperature=0.0)), logits.argmax(-1))


@pytest.mark.parametrize(
    ("plan", "stages"),
    [
        (greedy(), ""),
        (greedy(top_p=0.5, top_k=4, min_p=0.1), ""),
        (greedy(logprobs=0), "score"),
        (greedy(bad_words=((1,),)), "adjust draw"),
        (SamplingPlan(1.0, 0), "draw"),
        (SamplingPlan(1.0, 0, min_p=0.2), "draw"),
        (SamplingPlan(1.0, 0, top_p=0.9), "top_p draw"),
        (SamplingPlan(1.0, 0, top_k=9, logprobs=2), "top_k draw score"),
        (SamplingPlan(1.0, 0, top_k=9, top_p=0.9, presence_penalty=1.0), "adjust top_k top_p draw"),
    ],
)
def test_a_request_needs_the_stages_of_what_it_uses(plan, stages):
    assert stages_of(plan) == set(stages.split())


def test_a_drawn_token_is_stored_in_its_slot_and_nothing_else_changes():
    scalars = inputs(5, flags=Flag.DENSE)
    rows = np.array([[3, 0, -1], [5, 0, -1], [0, 0, -1]], np.int32)
    stored, tokens = jax.jit(sampler.draw)(scalars, rows, gaussian_logits(3))
    want = scalars.ints.copy()
    want[[3, 0], Int.LAST_TOKEN] = np.asarray(tokens)[[0, 2]]
    np.testing.assert_array_equal(stored.ints, want)
    np.testing.assert_array_equal(stored.floats, scalars.floats)


def test_it_traces_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        rows = np.zeros((2, 3), np.int32)
        jax.jit(lambda *a: sampler.draw(*a)).trace(inputs(2), rows, gaussian_logits(2))
        jax.jit(lambda *a: sampler.greedy(*a)).trace(gaussian_logits(2))
