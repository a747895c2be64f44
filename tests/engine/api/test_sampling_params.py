"""Sampling parameters are refused when they are made, with the field, the value and the range; `resolve` knows the
model's vocabulary."""

import math

import pytest
from helpers.tiny_gguf import TOKENIZER
from twinmesh import SamplingParams
from twinmesh.engine.api.resolve_sampling import eos_ids, resolve
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

TOKENIZE = tokenizer_from_gguf(TOKENIZER)
EOS = TOKENIZE.eos_token_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 2.0),
        ("n", 16385),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", True),
        ("temperature", 10**400),
        ("temperature", 1.1e6),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2.5),
        ("top_k", 2**31),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", math.inf),
        ("max_tokens", 0),
        ("max_tokens", "3"),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("seed", -2),
        ("seed", 2**63),
        ("logprobs", -2),
        ("logprobs", True),
        ("prompt_logprobs", -2),
        ("stop", ""),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("stop_token_ids", "ab"),
        ("stop_token_ids", [1, -1]),
        ("stop_token_ids", [None]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [1.0]),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"1": 0.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: "much"}),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", "no"),
    ],
)
def test_values_out_of_range_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}=.* is not usable: it must .*\\.$"):
        SamplingParams(**{field: value})


def test_stop_strings_without_text_are_refused():
    with pytest.raises(ValueError, match="leave detokenize on"):
        SamplingParams(stop="a", detokenize=False)


def test_a_field_that_is_not_there_is_a_type_error():
    with pytest.raises(TypeError):
        SamplingParams(best_of=2)


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert (params.seed, params.logprobs, params.skip_special_tokens) == (None, None, True)


def test_whole_numbers_do_for_real_ones_and_lists_for_tuples():
    lists = dict(stop_token_ids=[1, 2, 1], stop=["a"], allowed_token_ids=[3], bad_words=["x", "y", "x"])
    params = SamplingParams(temperature=0, top_p=1, **lists)
    assert (params.stop_token_ids, params.stop, params.bad_words) == ((1, 2), ("a",), ("x", "y"))
    assert hash(params) == hash(SamplingParams(temperature=0, top_p=1, **lists))
    assert SamplingParams(stop="ab") == SamplingParams(stop=["ab"])
    assert SamplingParams(logit_bias={1: 2}) != SamplingParams()


def test_a_seed_of_minus_one_is_none():
    assert SamplingParams(seed=-1).seed is None


# ---- with a vocabulary


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize(("count", "most"), [(21, 20), (-1, 20), (6, 5)])
def test_more_logprobs_than_the_engine_has_are_refused_with_what_to_write(name, count, most):
    with pytest.raises(ValueError, match=rf"^{name}={count} .* max_logprobs={most}: .* with max_logprobs={count}\.$"):
        resolve(SamplingParams(**{name: count}), TOKENIZE, 0, most)


def test_as_many_logprobs_as_the_engine_has_are_taken():
    for count, most in ((20, 20), (-1, TOKENIZE.vocab_size), (0, 0)):
        assert resolve(SamplingParams(logprobs=count), TOKENIZE, 0, most).logprobs == count


def plan(seed=7, **fields):
    return resolve(SamplingParams(**fields), TOKENIZE, seed)


def test_defaults_resolve_to_a_plan_that_leaves_the_logits_alone():
    default = plan()
    assert (default.temperature, default.top_p, default.top_k, default.min_p, default.seed) == (1.0, 1.0, 0, 0.0, 7)
    assert default.logit_bias == {}
    assert default.allowed_token_ids is None
    assert default.bad_words == ()
    assert default.stop_ids == EOS


@pytest.mark.parametrize(("top_k", "kept"), [(0, 0), (-1, 0), (5, 5), (TOKENIZE.vocab_size, 0), (10**6, 0)])
def test_a_top_k_that_keeps_all_becomes_0(top_k, kept):
    assert plan(top_k=top_k).top_k == kept


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_greedy_needs_no_filters(temperature):
    greedy = plan(temperature=temperature, top_k=5, top_p=0.5, min_p=0.1)
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.min_p) == (0.0, 0, 1.0, 0.0)


def test_eos_stops_unless_it_is_ignored_and_has_no_stop_reason():
    params = SamplingParams(stop_token_ids=[5])
    assert resolve(params, TOKENIZE, 0).stop_ids == EOS | {5}
    assert eos_ids(params, TOKENIZE) == EOS
    ignoring = SamplingParams(stop_token_ids=[5, *EOS], ignore_eos=True)
    assert resolve(ignoring, TOKENIZE, 0).stop_ids == EOS | {5}
    assert eos_ids(ignoring, TOKENIZE) == frozenset()


def test_bad_words_are_spelled_with_and_without_a_space():
    (the,), (a_the,) = TOKENIZE.encode("he"), TOKENIZE.encode(" the")
    assert plan(bad_words=["he"]).bad_words == ((the,),)  # " he" takes two tokens
    assert plan(bad_words=[" a"]).bad_words == (tuple(TOKENIZE.encode("a")), tuple(TOKENIZE.encode(" a")))
    # "the" takes two tokens and " the" one.
    assert plan(bad_words=["the"]).bad_words == (tuple(TOKENIZE.encode("the")),)
    assert len(TOKENIZE.encode("the")) == 2
    assert a_the != the


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stop_token_ids": [5000]}, "stop_token_ids holds token id 5000"),
        ({"allowed_token_ids": [5, 5000]}, "allowed_token_ids holds token id 5000"),
        ({"logit_bias": {5000: 1}}, "logit_bias holds token id 5000"),
        ({"bad_words": [" "]}, "has no tokens"),
        ({"bad_words": ["supercalifragilistic"]}, "8 is the most"),
        ({"bad_words": [f"{chr(i)}q" for i in range(0x30, 0x71)]}, "64 is the most"),
        ({"allowed_token_ids": [5], "logit_bias": {5: -math.inf}}, "no token to choose"),
        ({"allowed_token_ids": sorted(EOS), "min_tokens": 1}, "no token to choose"),
        ({"allowed_token_ids": [TOKENIZE.encode("he")[0]], "bad_words": ["he"]}, "no token to choose"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        plan(**fields)
