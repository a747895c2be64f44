"""Prompts in every form that callers hold them in: taken as what they are, or refused in one sentence."""

from collections import deque
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fake_core import FakeCore, make_fake
from hypothesis import given
from hypothesis import strategies as st
from twinmesh import LLM, SamplingParams
from twinmesh.engine.api.prompt_forms import split_prompts
from twinmesh.engine.api.prompts import as_list, check_prompt

TOKENIZER = SimpleNamespace(vocab_size=100, encode=lambda text, at_most=None: [ord(c) % 100 for c in text])


class Series:
    """As pandas has it: `[0]` is a label, which may not be there, and the elements are reached by iterating."""

    def __init__(self, values, dtype=None):
        self._values = np.array(values, dtype)

    def __array__(self, dtype=None, copy=None):
        return self._values

    def __getitem__(self, label):
        raise KeyError(label)

    def __len__(self):
        return len(self._values)

    def __iter__(self):
        return iter(self._values.tolist())


class GpuTensor:
    """As torch has it on a GPU."""

    def __init__(self, values):
        self._values = values

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    def tolist(self):
        return self._values


def read(prompts):
    return [check_prompt(prompt, TOKENIZER, 64).token_ids for prompt in as_list(prompts)]


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6],
        (5, 6),
        range(5, 7),
        deque([5, 6]),
        np.array([5, 6]),
        np.array([5, 6], np.uint8),
        np.array([5, 6], object),
        [np.int64(5), np.int32(6)],
        jnp.array([5, 6]),
        [jnp.int32(5), jnp.int32(6)],
        list(jnp.array([5, 6])),
        Series([5, 6]),
        GpuTensor([5, 6]),
        np.ma.array([5, 6]),
        memoryview(np.array([5, 6])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whole_numbers_in_one_dimension_are_one_prompt(prompt):
    assert read(prompt) == [[5, 6]]
    assert read([prompt]) == [[5, 6]]
    assert read({"prompt_token_ids": prompt}) == [[5, 6]]


def test_generators_of_whole_numbers_are_one_prompt():
    assert read(i for i in (5, 6)) == [[5, 6]]
    assert read([map(int, "56")]) == [[5, 6]]
    assert read({"prompt_token_ids": iter([5, 6])}) == [[5, 6]]


@pytest.mark.parametrize(
    "prompts",
    [
        [[5, 6], [7, 8]],
        ([5, 6], (7, 8)),
        np.array([[5, 6], [7, 8]]),
        jnp.array([[5, 6], [7, 8]]),
        GpuTensor([[5, 6], [7, 8]]),
        [np.array([5, 6]), jnp.array([7, 8])],
        np.array([None, [5, 6], [7, 8]], object)[1:],
        [{"prompt_token_ids": jnp.array([5, 6])}, Series([7, 8])],
        deque([[5, 6], range(7, 9)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rows_and_elements_that_are_no_numbers_are_prompts(prompts):
    assert read(prompts) == [[5, 6], [7, 8]]
    assert read(prompt for prompt in list(as_list(prompts))) == [[5, 6], [7, 8]]


@pytest.mark.parametrize(
    "prompts",
    [["ab", "c"], ("ab", "c"), np.array(["ab", "c"]), Series(["ab", "c"], object), {"ab": 1, "c": 2}.keys(),
     np.array(["ab", "c"], np.dtypes.StringDType()), deque(["ab", "c"]), (text for text in ("ab", "c"))],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_texts_in_anything_with_an_order_are_prompts(prompts):
    assert read(prompts) == [TOKENIZER.encode("ab"), TOKENIZER.encode("c")]


@pytest.mark.parametrize(
    "prompts",
    [
        None, 5, 5.5, True, b"ab", bytearray(b"ab"), [bytearray(b"ab")], {"ab", "c"}, frozenset({5}), object(),
        np.int64(5), np.array(5), jnp.int32(5),
        [5.0, 6.0], np.array([5.0, 6.0]), jnp.array([True, False]), [[True]], [5, None], [5, "a"], ["a", 5], [None],
        np.zeros((2, 2, 2), np.int32), [np.zeros((2, 2), np.int32)], Series([float("nan"), "a"], object), [[[5]]],
        np.ma.array([5, 6, 7], mask=[0, 1, 0]), [np.ma.array([5, 6], mask=True)],
        jax.random.key(0), [jax.random.key(0)], jax.random.split(jax.random.key(0)),
        {"prompt_token_ids": jax.random.key(0)},
        {"prompt_token_ids": "ab"}, {"prompt_token_ids": None}, {"prompt_token_ids": {5: 6}}, lambda: [5],
    ],
)  # fmt: skip
def test_all_else_is_refused_in_the_documented_sentence(prompts):
    with pytest.raises(ValueError, match=r"^A prompt must be text or a list of token ids\.$"):
        read(prompts)


@pytest.mark.parametrize("nothing", [[], (), iter(()), np.zeros((0, 3), np.int32), Series([], object)])
def test_no_prompts_are_no_prompts(nothing):
    assert read(nothing) == []


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), max_size=5))
def test_lists_tuples_generators_and_arrays_mean_the_same(prompts):
    forms = (prompts, tuple(map(tuple, prompts)), (np.array(ids) for ids in prompts), deque(map(iter, prompts)))
    for form in forms:
        assert read(form) == prompts


def test_one_prompt_is_not_taken_apart():
    array = jnp.array([5, 6])
    (only,) = split_prompts(array)
    assert only.tolist() == [5, 6]


@pytest.mark.parametrize("many", [iter, tuple, list, lambda values: np.array([*values, None], object)[:-1]])
def test_parameters_come_in_anything_with_an_order(many):
    core = FakeCore()
    llm = make_fake(LLM, core)
    params = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)]
    with pytest.raises(ValueError, match="There are 1 prompts and 2 sampling_params: give one, or one for each"):
        llm.generate([[5]], many(params))


STARTS = {
    "generate": lambda llm, bad: llm.generate([[5]], bad),
    "generate, one each": lambda llm, bad: llm.generate([[5], [6]], [SamplingParams(), bad]),
    "chat": lambda llm, bad: llm.chat([{"role": "user", "content": "a"}], bad),
    "stream": lambda llm, bad: llm.stream([5], bad),
    "add_request": lambda llm, bad: llm.add_request("x", [5], bad),
    "as_completed": lambda llm, bad: list(llm.as_completed([([5], bad)])),
    "check_request": lambda llm, bad: llm.check_request([5], bad),
    "check_sampling_params": lambda llm, bad: llm.check_sampling_params(bad),
}


@pytest.mark.parametrize("bad", ["greedy", 3, {"temperature": 0}, SamplingParams, SimpleNamespace(temperature=0)])
@pytest.mark.parametrize("start", STARTS)
def test_parameters_that_are_none_are_refused(start, bad):
    with pytest.raises(ValueError, match=r"sampling_params of type \w+ are not usable: give SamplingParams\."):
        STARTS[start](make_fake(LLM, FakeCore()), bad)
