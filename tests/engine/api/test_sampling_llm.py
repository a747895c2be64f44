"""What sampling parameters do in the engine, against dense attention and plain numpy. Requests cross a hand-off."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from helpers.dense import DenseModel, adjuster, processed
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from twinmesh import LLM, AsyncLLM, SamplingParams
from twinmesh.engine.api.resolve_sampling import resolve

PROMPT = "the sea and the land"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
HOT = SamplingParams(temperature=1.5, seed=5, max_tokens=8, ignore_eos=True)
OPTIONS = dict(
    topology="prefill=1,decode=1", max_model_len=128, page_size=16, max_num_seqs=4, prefill_buckets=(16, 64),
    decode_buckets=(1, 4), kv_cache_bytes=4 << 20,
)  # fmt: skip


@pytest.fixture(scope="module")
def llm(tiny_path):
    with LLM(tiny_path, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def dense(tiny_path):
    return DenseModel(tiny_path)


@pytest.fixture(scope="module")
def plain(llm):
    """What greedy sampling says to the prompt."""
    return one(llm, GREEDY).token_ids


def one(llm, params, prompt=PROMPT):
    return llm.generate(prompt, params)[0].outputs[0]


# ---- logits


def cases(plain):
    """Parameters, and what the reference makes of them; all of them change what plain greedy sampling says."""
    bad = [plain[1]], plain[3:5]
    return {
        "repetition": (dict(repetition_penalty=1.8), dict(repetition=1.8)),
        "reward of repetition": (dict(repetition_penalty=0.3), dict(repetition=0.3)),
        "presence": (dict(presence_penalty=2.0), dict(presence=2.0)),
        "frequency": (dict(frequency_penalty=2.0), dict(frequency=2.0)),
        "bias": (dict(logit_bias={plain[0]: -50.0, 40: 3.0}), dict(bias={plain[0]: -50.0, 40: 3.0})),
        "allowed": (dict(allowed_token_ids=range(40, 60)), dict(allowed=list(range(40, 60)))),
        "bad": (dict(), dict(bad=bad)),
        "minimum": (
            dict(stop_token_ids=[plain[2]], min_tokens=10, max_tokens=10),
            dict(stop=[plain[2]], min_tokens=10),
        ),
        "all": (
            dict(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4, logit_bias={41: 2.0}),
            dict(repetition=1.3, presence=0.7, frequency=0.4, bias={41: 2.0}),
        ),
    }


@pytest.mark.parametrize(
    "case", ["repetition", "reward of repetition", "presence", "frequency", "bias", "allowed", "minimum", "all"]
)
def test_greedy_tokens_are_those_of_a_numpy_reference(llm, dense, plain, case):
    fields, reference = cases(plain)[case]
    params = replace(GREEDY, **fields)
    prompt = llm.tokenizer.encode(PROMPT)
    tokens = one(llm, params).token_ids
    assert tokens == dense.greedy(prompt, params.max_tokens, adjuster(**reference))
    assert tokens != plain[: len(tokens)] or case == "minimum"


def test_bad_words_are_not_completed(llm, dense, plain):
    # Words that the answer holds as they are spelled: one token, and two in a row.
    text = llm.tokenizer.decode
    word = next(text([i]) for i in plain if text([i]).strip() and llm.tokenizer.encode(text([i]).lstrip()) == [i])
    completion = one(llm, replace(GREEDY, bad_words=[word]))
    bad = resolve(replace(GREEDY, bad_words=[word]), llm.tokenizer, 0).bad_words
    assert completion.token_ids == dense.greedy(llm.tokenizer.encode(PROMPT), 12, adjuster(bad=bad))
    assert completion.token_ids != plain


def test_requests_with_and_without_penalties_share_a_batch(llm, plain):
    params = [GREEDY, replace(GREEDY, repetition_penalty=1.8), GREEDY, replace(GREEDY, frequency_penalty=2.0)]
    alone = [one(llm, each).token_ids for each in params]
    together = [output.outputs[0].token_ids for output in llm.generate([PROMPT] * 4, params)]
    assert together == alone
    assert alone[0] == alone[2] == plain


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_that_leave_one_token_are_greedy(llm, plain, fields):
    assert one(llm, replace(HOT, max_tokens=12, **fields)).token_ids == plain


# ---- stopping


def test_a_stop_string_cuts_the_text_and_not_the_tokens(llm, plain):
    text = llm.tokenizer.decode(plain)
    stop = text[3:5]
    completion = one(llm, replace(GREEDY, stop=[stop, "never in there"]))
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == plain[: len(completion.token_ids)]
    assert stop in llm.tokenizer.decode(completion.token_ids)
    shown = one(llm, replace(GREEDY, stop=stop, include_stop_str_in_output=True))
    assert shown.text == text[: text.index(stop) + len(stop)]
    stream = llm.stream(PROMPT, replace(GREEDY, stop=stop))
    assert "".join(delta.text for delta in stream) == completion.text == stream.result().outputs[0].text


def test_eos_ends_without_a_reason_and_a_stop_token_with_its_id(llm):
    eos = min(llm.tokenizer.eos_token_ids)
    wanted = SamplingParams(temperature=0, max_tokens=4, logit_bias={eos: 1e4})
    completion = one(llm, wanted)
    assert (completion.token_ids, completion.text) == ([eos], "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    ignoring = replace(wanted, ignore_eos=True)
    assert one(llm, ignoring).token_ids == [eos] * 4
    stopping = one(llm, replace(ignoring, stop_token_ids=[eos]))
    assert (stopping.token_ids, stopping.stop_reason) == ([eos], eos)


def test_min_tokens_keeps_eos_and_stop_strings_away(llm, plain):
    eos = min(llm.tokenizer.eos_token_ids)
    completion = one(llm, SamplingParams(temperature=0, max_tokens=8, min_tokens=3, logit_bias={eos: 1e4}))
    assert len(completion.token_ids) == 4
    assert completion.token_ids.index(eos) == 3
    first = llm.tokenizer.decode(plain[:1])
    late = one(llm, replace(GREEDY, stop=first, min_tokens=12))
    assert late.token_ids == plain


# ---- n completions


def test_completions_of_a_request_draw_with_seeds_in_a_row(llm):
    alone = [one(llm, replace(HOT, seed=5 + i)).token_ids for i in range(3)]
    (output,) = llm.generate(PROMPT, replace(HOT, n=3))
    assert [completion.token_ids for completion in output.outputs] == alone
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(ids) for ids in alone}) == 3


def test_more_completions_than_slots_are_all_made(llm, plain):
    (output,) = llm.generate(PROMPT, replace(GREEDY, n=7))
    assert [completion.token_ids for completion in output.outputs] == [plain] * 7
    assert output.finished


def test_aborting_a_request_aborts_all_its_completions(llm):
    stream = llm.stream(PROMPT, SamplingParams(n=3, max_tokens=100, ignore_eos=True))
    next(iter(stream))
    llm.abort(stream.request_id)
    assert [completion.finish_reason for completion in stream.result().outputs] == ["abort"] * 3
    assert llm.metrics().running == 0


# ---- log-probabilities


def check_logprobs(found, expected, token, count):
    """One position's dict against the reference's row [V]."""
    order = np.argsort(-expected)[:count].tolist()
    assert next(iter(found)) == token
    assert set(found) == {token, *order}
    for i, logprob in found.items():
        assert logprob.logprob == pytest.approx(expected[i], abs=2e-3)
        assert logprob.rank == int((expected > expected[i]).sum()) + 1


@pytest.mark.parametrize("params", [GREEDY, HOT, replace(GREEDY, repetition_penalty=1.5)])
def test_logprobs_are_those_of_the_raw_logits(llm, dense, params):
    completion = one(llm, replace(params, logprobs=3))
    assert completion.token_ids == one(llm, params).token_ids
    prompt = llm.tokenizer.encode(PROMPT)
    rows = dense.logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 :]
    for at, token, row in zip(completion.logprobs, completion.token_ids, rows, strict=False):
        check_logprobs(at, row, token, 3)
    own = [at[token].logprob for at, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(own))


@pytest.mark.parametrize("prompt", [PROMPT, "the sea and the land " * 4, "a"])
def test_prompt_logprobs_are_those_of_the_prompts_tokens(llm, dense, prompt):
    llm.generate(prompt, GREEDY)  # now it is in the prefix cache, which must not shorten the list
    (output,) = llm.generate(prompt, replace(GREEDY, prompt_logprobs=2, n=2))
    ids = output.prompt_token_ids
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(ids)
    for at, token, row in zip(output.prompt_logprobs[1:], ids[1:], dense.logprobs(ids), strict=False):
        check_logprobs(at, row, token, 2)


def test_scores_are_the_continuations_log_probabilities(llm, dense):
    ends = [" and the land", " or a long way off, " * 2, [40, 41]]
    prompt = llm.tokenizer.encode("the sea")
    for end, score in zip(ends, llm.score("the sea", ends), strict=True):
        ids = end if isinstance(end, list) else llm.tokenizer.encode(end, add_special=False)
        rows = dense.logprobs([*prompt, *ids])[len(prompt) - 1 : -1]
        expected = rows[np.arange(len(ids)), ids]
        assert score.token_ids == ids
        np.testing.assert_allclose(score.logprobs, expected, atol=2e-3)
        assert score.total == pytest.approx(expected.sum(), abs=0.02)
        ahead = (rows > expected[:, None] + 1e-2).sum(-1)  # surely
        at_most = (rows > expected[:, None] - 1e-2).sum(-1)
        assert (score.ranks >= 1 + ahead).all()
        assert (score.ranks <= at_most).all()


def test_a_score_says_whether_greedy_decoding_gives_the_continuation(llm, plain):
    other = [*plain[:-1], plain[-1] ^ 1]
    right, wrong = llm.score(PROMPT, [plain, other])
    assert right.is_greedy
    assert not wrong.is_greedy
    assert wrong.ranks[-1] > 1
    np.testing.assert_array_equal(wrong.ranks[:-1], 1)


def test_scores_behind_a_common_prompt_compute_it_once(llm):
    prompt = np.random.RandomState(5).randint(5, 200, 40).tolist()  # two full pages of 16 and a part
    ends = [[40, 41], [42], [43, 44, 45]]
    before = llm.metrics().cached_tokens
    together = llm.score([prompt], ends)
    assert llm.metrics().cached_tokens - before >= 2 * 32
    ends += [[46], [40, 47], [42]]  # which share a request with one before
    requests = len(llm.metrics().recent)
    together = llm.score([prompt], ends)
    assert len(llm.metrics().recent) - requests == 3
    llm.update_params({})  # drops cached prefixes
    for end, score in zip(ends, together, strict=True):
        (alone,) = llm.score([prompt], [end])
        np.testing.assert_allclose(score.logprobs, alone.logprobs, atol=1e-5)
        np.testing.assert_array_equal(score.ranks, alone.ranks)


# ---- other ways in


def test_requests_driven_by_hand_end_as_generated_ones(llm):
    params = {"x": GREEDY, "y": replace(HOT, n=2), "z": replace(GREEDY, stop="e")}
    expected = {name: llm.generate(PROMPT, each)[0] for name, each in params.items()}
    for name, each in params.items():
        llm.add_request(name, PROMPT, each)
    lengths, ended = dict.fromkeys(params, 0), {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            length = sum(len(completion.token_ids) for completion in output.outputs)
            assert length >= lengths[output.request_id]
            lengths[output.request_id] = length
            if output.finished:
                ended[output.request_id] = output
    for name, output in ended.items():
        assert [c.text for c in output.outputs] == [c.text for c in expected[name].outputs]
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected[name].outputs]
    assert ended.keys() == params.keys()


def test_coroutines_get_what_threads_get(llm, tiny_path):
    async def last(engine, params):
        async for output in engine.generate(PROMPT, params):
            final = output
        return [completion.token_ids for completion in final.outputs]

    async def run(params):
        async with AsyncLLM(tiny_path, **OPTIONS) as engine:
            results = await asyncio.gather(*(last(engine, each) for each in params))
            reasons = []
            async for output in engine.generate(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True), "long"):
                await engine.abort("long")
                reasons.append(output.outputs[0].finish_reason)
            assert reasons[-1] == "abort"
            assert engine.metrics().running == 0
            return results

    params = [GREEDY, HOT, replace(HOT, n=2), replace(GREEDY, stop="e")] * 2
    expected = [[c.token_ids for c in llm.generate(PROMPT, each)[0].outputs] for each in params]
    assert asyncio.run(run(params)) == expected


# ---- prefix cache and parameters


def test_a_prompt_seen_before_is_read_from_the_cache_and_gives_the_same_tokens(tiny_path):
    prompt = "a long way from the sea there was a land " * 2
    with LLM(tiny_path, **OPTIONS) as llm:
        first, second = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
        (whole,) = llm.generate(prompt, replace(GREEDY, prompt_logprobs=0))
    with LLM(tiny_path, **OPTIONS, enable_prefix_caching=False) as llm:
        (uncached,) = (llm.generate(prompt, GREEDY) for _ in range(1))
        (again,) = llm.generate(prompt, GREEDY)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens >= 48
    assert (whole.num_cached_tokens, again.num_cached_tokens) == (0, 0)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids == uncached[0].outputs[0].token_ids


def test_new_parameters_change_what_is_said_and_nothing_compiles(tiny_path, tmp_path, dense):
    other = DenseModel(write_tiny_gguf(tmp_path / "other.gguf", TinyLlama(seed=1)))
    prompt = other.tokenizer.encode(PROMPT)
    with LLM(tiny_path, **OPTIONS) as llm:
        before = one(llm, GREEDY).token_ids
        compiles = llm.metrics().compiles
        llm.update_params({path: np.asarray(array) for path, array in other.params.items()})
        changed = one(llm, GREEDY).token_ids
        llm.update_params(dense.params)
        restored = one(llm, GREEDY).token_ids
        llm.update_params(TinyLlama(seed=1).weights())  # by Hugging Face's names
        changed_again = one(llm, GREEDY).token_ids
        assert llm.metrics().compiles == compiles
        with pytest.raises(ValueError, match=r"no\.such"):
            llm.update_params({"no.such": np.zeros(3)})
    assert before == restored == dense.greedy(prompt, 12)
    assert changed == changed_again == other.greedy(prompt, 12) != before


# ---- of which distribution log-probabilities are

DRAWN = SamplingParams(
    temperature=0.8, top_k=60, top_p=0.9, min_p=0.01, repetition_penalty=1.3, presence_penalty=0.2,
    logit_bias={40: 1.5}, seed=3, max_tokens=6, ignore_eos=True, logprobs=-1,
)  # fmt: skip


@pytest.fixture(scope="module", params=["processed_logprobs", "processed_logits"])
def whole(request, tiny_path):
    """An engine that reports every token of the distribution that a token is drawn from."""
    with LLM(tiny_path, logprobs_mode=request.param, max_logprobs=-1, **OPTIONS) as llm:
        yield llm, request.param == "processed_logits"


def test_processed_logprobs_are_what_tokens_were_drawn_from_on_both_meshes(whole, dense, llm):
    engine, are_logits = whole
    completion, prompt = one(engine, DRAWN), engine.tokenizer.encode(PROMPT)
    assert completion.token_ids == one(llm, replace(DRAWN, logprobs=None)).token_ids
    for index, at in enumerate(completion.logprobs):
        before = completion.token_ids[:index]
        logits = dense.logits([*prompt, *before])[-1].astype(np.float64)
        want = processed(logits, resolve(DRAWN, engine.tokenizer, 3, len(logits)), prompt, before, are_logits)
        assert sorted(at) == list(range(len(want)))
        found = np.array([at[token].logprob for token in range(len(want))])
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(want))
        np.testing.assert_allclose(found, want, rtol=2e-3, atol=2e-3)
        assert np.isfinite(at[completion.token_ids[index]].logprob)


def test_logprobs_of_prompts_are_the_models_own_whatever_the_mode(whole, dense):
    engine, are_logits = whole
    params = replace(DRAWN, logprobs=None, prompt_logprobs=-1, max_tokens=1)
    (output,) = engine.generate(PROMPT, params)
    wanted = (dense.logits if are_logits else dense.logprobs)(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    for at, want in zip(output.prompt_logprobs[1:], wanted, strict=False):
        np.testing.assert_allclose([at[token].logprob for token in range(len(want))], want, rtol=2e-3, atol=2e-3)


def test_an_engine_made_for_20_refuses_the_whole_vocabulary(llm):
    with pytest.raises(ValueError, match="make the engine with max_logprobs=-1"):
        llm.generate(PROMPT, replace(GREEDY, logprobs=-1))
