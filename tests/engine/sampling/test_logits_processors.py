"""What is done to logits, against vLLM's rules written out for one row at a time; and the counts kept for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plans import Case, greedy, stack
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from twinmesh.engine.protocol.sampling_plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingPlan
from twinmesh.engine.sampling import logits_processors as module
from twinmesh.engine.sampling.logits_processors import count_fed, empty_dense, load_dense
from twinmesh.engine.sampling.request_rows import dense_row, is_dense, scalars_of
from twinmesh.engine.sampling.request_state import DenseRows, Flag, Float, Int, RequestState, Scalars, Seen

ROWS, VOCABULARY = 6, 12
NOBODY = ROWS
adjust, count = jax.jit(module.adjust), jax.jit(count_fed)
INF = np.inf


def expected(logits, case):
    """One row, in vLLM's order. [V] float32."""
    plan, result = case.plan, np.array(logits, np.float32)
    if plan.allowed_token_ids is not None:
        result[[t for t in range(len(result)) if t not in plan.allowed_token_ids]] = -INF
    without_prohibitions = result.copy()
    for *start, last in plan.bad_words:
        if tuple(start) == case.outputs[len(case.outputs) - len(start) :] and len(start) <= len(case.outputs):
            result[last] = -INF
    if len(case.outputs) < plan.min_tokens:
        result[list(plan.stop_ids)] = -INF
    if np.isneginf(result).all():
        result = without_prohibitions
    for token, bias in plan.logit_bias.items():
        result[token] += np.float32(bias)
    for token in {*case.prompt, *case.outputs}:
        penalty = np.float32(plan.repetition_penalty)
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token in set(case.outputs):
        result[token] -= np.float32(plan.frequency_penalty) * np.float32(case.outputs.count(token))
        result[token] -= np.float32(plan.presence_penalty)
    return result


tokens = st.integers(0, VOCABULARY - 1)
words = st.lists(tokens, min_size=1, max_size=3).map(tuple)
penalty = st.sampled_from([0.0, 0.5, -0.7, 1.9])
plans = st.builds(
    SamplingPlan,
    temperature=st.just(0.0),
    seed=st.just(0),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=penalty,
    frequency_penalty=penalty,
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=3),
    allowed_token_ids=st.none() | st.lists(tokens, min_size=1, max_size=6, unique=True).map(tuple),
    bad_words=st.lists(words, max_size=4).map(tuple),
    stop_ids=st.frozensets(tokens, max_size=3),
    min_tokens=st.integers(0, 6),
)
sequences = st.lists(tokens, max_size=8).map(tuple)
cases = st.builds(Case, plans, sequences, sequences)


def gaussian(rows=ROWS, seed=0):
    logits = 3 * np.random.default_rng(seed).standard_normal((rows, VOCABULARY)).astype(np.float32)
    logits[:, -1] = -INF
    return logits


@settings(deadline=None, max_examples=200)
@given(st.lists(cases, min_size=ROWS, max_size=ROWS))
def test_any_plan_does_what_its_parts_do_in_order(drawn):
    scalars, rows, position = stack(drawn, VOCABULARY)
    logits = gaussian()
    got = np.asarray(adjust(logits, scalars, rows, position))
    np.testing.assert_allclose(got, [expected(*x) for x in zip(logits, drawn, strict=True)], rtol=1e-6, atol=1e-5)


def alone(case, logits=None):
    """The adjusted logits of one case, [V]; all logits are 1 unless given."""
    logits = np.ones(VOCABULARY, np.float32) if logits is None else np.asarray(logits, np.float32)
    scalars, rows, position = stack([case] * ROWS, VOCABULARY)
    return np.asarray(adjust(np.stack([logits] * ROWS), scalars, rows, position)[0])


def forbidden(case):
    return set(np.flatnonzero(np.isneginf(alone(case))).tolist())


def test_repetition_shrinks_positive_logits_and_lowers_negative_ones_of_prompt_and_output():
    logits = np.linspace(-5, 6, VOCABULARY)
    got = alone(Case(greedy(repetition_penalty=2.0), prompt=(0, 9), outputs=(1, 11, 11)), logits)
    want = logits.astype(np.float32)
    want[[0, 1]] *= 2
    want[[9, 11]] /= 2
    np.testing.assert_array_equal(got, want)


def test_presence_and_frequency_count_generated_tokens_only():
    case = Case(greedy(presence_penalty=0.5, frequency_penalty=0.25), prompt=(1, 2, 2), outputs=(2, 3, 3, 3))
    got = alone(case, np.zeros(VOCABULARY))
    assert got[[1, 2, 3, 4]].tolist() == [0, -0.75, -1.25, 0]


def test_penalties_apply_after_the_bias():
    assert alone(Case(greedy(repetition_penalty=2.0, logit_bias={3: 5.0}), prompt=(3,)))[3] == 3.0


def test_only_allowed_tokens_are_left_and_a_bias_adds_to_them():
    got = alone(Case(greedy(allowed_token_ids=(2, 5), logit_bias={5: -3.0, 6: 100.0})))
    assert got[[2, 5]].tolist() == [1, -2]
    assert np.isneginf(np.delete(got, [2, 5])).all()


@pytest.mark.parametrize(
    ("outputs", "want"),
    [
        ((), {9}),
        ((1,), {9, 2}),
        ((3, 1), {9, 2}),
        ((1, 2), {9}),
        ((4, 5), {9, 6}),
        ((5,), {9}),
        ((7, 4, 5), {9, 6}),
        ((4, 5, 5), {9}),
        ((0,) * 7, {9, 8}),
        ((0,) * 6, {9}),
    ],
)
def test_a_bad_word_may_not_be_completed(outputs, want):
    bad_words = ((9,), (1, 2), (4, 5, 6), (*(0,) * 7, 8))
    assert forbidden(Case(greedy(bad_words=bad_words), prompt=(1, 4, 5, 1), outputs=outputs)) == want


def test_as_many_and_as_long_bad_words_as_there_may_be():
    bad_words = tuple((*np.roll(range(MAX_BAD_WORD_TOKENS - 1), i).tolist(), 11) for i in range(MAX_BAD_WORDS))
    assert forbidden(Case(greedy(bad_words=bad_words), outputs=bad_words[5][:-1])) == {11}
    assert forbidden(Case(greedy(bad_words=bad_words), outputs=(7, *range(MAX_BAD_WORD_TOKENS - 2)))) == set()


def test_stop_tokens_are_forbidden_until_the_minimum_is_generated():
    plan = greedy(stop_ids=frozenset({3, 4}), min_tokens=2)
    assert [forbidden(Case(plan, (7, 8, 9), (1,) * n)) for n in range(4)] == [{3, 4}, {3, 4}, set(), set()]


def test_where_bad_words_and_the_minimum_leave_nothing_only_allowed_tokens_come():
    plan = greedy(allowed_token_ids=(3, 4), stop_ids=frozenset({3}), min_tokens=5, bad_words=((4,),))
    assert forbidden(Case(plan)) == set(range(VOCABULARY)) - {3, 4}


def test_forbidden_stays_forbidden_and_nothing_becomes_nan_or_inf():
    plan = greedy(repetition_penalty=1e-30, presence_penalty=-2.0, frequency_penalty=-2.0, logit_bias={0: 100.0})
    logits = np.full(VOCABULARY, -INF)
    logits[3:6] = [1e20, -1e20, 0.0]
    got = alone(Case(plan, (0, 1, 3), (0, 2, 3, 4, 5)), logits)
    assert np.isneginf(got[:3]).all()
    assert np.isneginf(got[6:]).all()
    assert np.isfinite(got[3:6]).all()


def test_rows_without_the_flag_keep_their_logits_whatever_their_dense_row_holds():
    scalars, rows, position = stack([Case(greedy())] * ROWS, VOCABULARY)
    garbage = DenseRows(rows.seen - 7, np.full_like(rows.bias, np.nan), rows.bad_words + 3, rows.recent + 4)
    np.testing.assert_array_equal(adjust(gaussian(), scalars, garbage, position), gaussian())


def test_a_row_does_not_depend_on_its_index_or_its_neighbours():
    rng = np.random.default_rng(3)
    mixed = [
        Case(
            greedy(repetition_penalty=1.1 + i, presence_penalty=0.3 * i, bad_words=((i,), (2, i)), logit_bias={i: 0.7}),
            tuple(rng.integers(0, VOCABULARY, 5).tolist()),
            tuple(rng.integers(0, VOCABULARY, i).tolist()),
        )
        for i in range(ROWS)
    ]
    want = np.asarray(adjust(gaussian(), *stack(mixed, VOCABULARY)))
    order = rng.permutation(ROWS)
    moved = adjust(gaussian()[order], *stack([mixed[i] for i in order], VOCABULARY))
    np.testing.assert_array_equal(moved, want[order])
    for row in range(ROWS):
        others = [mixed[i] if i == row else Case(greedy()) for i in range(ROWS)]
        np.testing.assert_array_equal(adjust(gaussian(), *stack(others, VOCABULARY))[row], want[row])


@settings(deadline=None, max_examples=50)
@given(st.lists(cases, min_size=ROWS, max_size=ROWS), st.lists(tokens, min_size=ROWS, max_size=ROWS))
def test_feeding_a_token_gives_the_row_of_one_more_output(drawn, fed):
    _, rows, _ = stack(drawn, VOCABULARY)
    flags = np.full(ROWS, Flag.DENSE, np.int32)
    got = count(rows, np.arange(ROWS, dtype=np.int32), np.array(fed, np.int32), flags)
    longer = [c._replace(outputs=(*c.outputs, token)) for c, token in zip(drawn, fed, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, got, stack(longer, VOCABULARY)[1])


def test_only_the_slots_of_rows_with_the_flag_are_counted():
    _, rows, _ = stack([Case(greedy(), (1,), (2,))] * ROWS, VOCABULARY)
    flags = np.array([Flag.DENSE, Flag.LOGPROBS, Flag.DENSE | Flag.LOGPROBS, Flag.DENSE], np.int32)
    got = count(rows, np.array([4, 1, 2, NOBODY], np.int32), np.array([2, 3, 5, 7], np.int32), flags)
    changed = np.argwhere(np.asarray(got.seen) != rows.seen).tolist()
    assert changed == [[2, 5], [4, 2]]
    assert got.seen[4, 2] == 2 * Seen.GENERATED
    assert np.asarray(got.recent)[:, -1].tolist() == [2, 2, 5, 2, 2, 2]


@pytest.mark.parametrize("flag", [0, Flag.DENSE])
def test_a_single_row_is_counted_too(flag):
    _, rows, _ = stack([Case(greedy())] * ROWS, VOCABULARY)
    got = count(rows, np.array([3], np.int32), np.array([5], np.int32), np.array([flag], np.int32))
    assert int(np.asarray(got.seen).sum()) == (Seen.GENERATED if flag else 0)
    assert got.recent[3, -1] == (5 if flag else -1)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("rows", [1, 8])
def test_counting_is_in_place(rows):
    dense = empty_dense(32, 50_000)
    memory = jax.jit(count_fed, donate_argnums=0).lower(dense, ints(rows), ints(rows), ints(rows)).compile()
    assert memory.memory_analysis().alias_size_in_bytes == size(dense)
    assert memory.memory_analysis().temp_size_in_bytes < 10_000


def test_loading_a_dense_row_writes_one_slot_in_place():
    _, rows, _ = stack([Case(greedy(), (1,), (2,))] * ROWS, VOCABULARY)
    scalars = Scalars(np.zeros((ROWS, len(Float)), np.float32), np.zeros((ROWS, len(Int)), np.int32))
    plan = greedy(bad_words=((1, 2),), allowed_token_ids=(3,))
    row = dense_row(plan, np.array([4], np.int32), (5,), VOCABULARY)
    loaded = jax.jit(load_dense)(RequestState(scalars, rows), np.int32(2), row)
    for got, before, new in zip(loaded.dense, rows, row, strict=True):
        np.testing.assert_array_equal(got[2], new)
        np.testing.assert_array_equal(np.delete(got, 2, axis=0), np.delete(before, 2, axis=0))
    shapes = RequestState(scalars, empty_dense(32, 50_000))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes.dense)
    memory = jax.jit(load_dense, donate_argnums=0).lower(shapes, ints(), one).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size(shapes.dense)
    assert memory.temp_size_in_bytes < 10_000


def test_shapes_of_the_dense_rows_are_those_of_the_rows_loaded():
    _, rows, _ = stack([Case(greedy())] * ROWS, VOCABULARY)
    for shape, array in zip(empty_dense(ROWS, VOCABULARY), rows, strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


def test_stop_tokens_outside_the_vocabulary_are_passed_over():
    row = dense_row(greedy(stop_ids=frozenset({2, 500}), min_tokens=3), np.array([], np.int32), (), VOCABULARY)
    assert np.flatnonzero(row.seen).tolist() == [2]


FEATURES = [
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.1},
    {"frequency_penalty": -0.1},
    {"logit_bias": {1: 1.0}},
    {"allowed_token_ids": (1,)},
    {"bad_words": ((1,),)},
    {"min_tokens": 1, "stop_ids": frozenset({1})},
]


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: next(iter(feature)))
def test_each_feature_alone_needs_the_dense_row(feature):
    assert is_dense(greedy(**feature))
    assert scalars_of(greedy(**feature), 3)[1][Int.FLAGS] == Flag.DENSE
    assert scalars_of(greedy(**feature, logprobs=0), 3)[1][Int.FLAGS] == Flag.DENSE | Flag.LOGPROBS


@pytest.mark.parametrize("plan", [greedy(), greedy(min_tokens=4), greedy(stop_ids=frozenset({1}))])
def test_plain_sampling_needs_no_dense_row(plan):
    plan = replace(plan, temperature=0.9, top_k=3, top_p=0.5, min_p=0.1)
    assert not is_dense(plan)
    assert scalars_of(plan, 3)[1][Int.FLAGS] == 0


def test_scalars_hold_the_plan():
    plan = SamplingPlan(
        temperature=0.5, seed=2**32 - 1, top_p=0.25, top_k=7, min_p=0.125, repetition_penalty=1.5,
        presence_penalty=-1.0, frequency_penalty=2.0, min_tokens=4, logprobs=2,
    )  # fmt: skip
    floats, numbers = scalars_of(plan, prompt_len=10)
    assert (floats.dtype, numbers.dtype) == (np.float32, np.int32)
    assert dict(zip(Float, floats.tolist(), strict=True)) == {
        Float.TEMPERATURE: 0.5, Float.TOP_P: 0.25, Float.MIN_P: 0.125, Float.REPETITION_PENALTY: 1.5,
        Float.PRESENCE_PENALTY: -1.0, Float.FREQUENCY_PENALTY: 2.0,
    }  # fmt: skip
    assert dict(zip(Int, numbers.tolist(), strict=True)) == {
        Int.LAST_TOKEN: 0, Int.TOP_K: 7, Int.SEED: -1, Int.MIN_LEN: 14, Int.FLAGS: Flag.DENSE | Flag.LOGPROBS,
    }  # fmt: skip


def test_it_traces_under_strict_promotion():
    scalars, rows, position = stack([Case(greedy())] * ROWS, VOCABULARY)
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(lambda *a: module.adjust(*a)).trace(gaussian(), scalars, rows, position)
        jax.jit(lambda *a: count_fed(*a)).trace(rows, position, position, position)
