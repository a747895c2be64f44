"""deterministic=True: the same tokens, and the same log-probabilities to the last bit, however a request was run.

Log-probabilities are compared too: tokens would hide most differences in rounding.
"""

import pytest
from helpers.core_engine import disturb
from twinmesh import SamplingParams

PROMPTS = ["The cat", "On the other hand, " * 3, "a", "in the end there was only the sea " * 2]
COUNT = 20
KINDS = {
    "greedy": dict(temperature=0.0),
    "sampled": dict(temperature=1.2, top_p=0.95, top_k=40, min_p=0.01, seed=7),
    "penalties": dict(
        temperature=0.8, seed=3, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={5: 2.0}, min_tokens=3,
    ),
}  # fmt: skip


def params(kind):
    return SamplingParams(max_tokens=COUNT, ignore_eos=True, logprobs=2, **KINDS[kind])


def facts(output):
    """What must not change: tokens, and log-probabilities as the bits that they are."""
    completion = output.outputs[0]
    return completion.token_ids, [
        {token: logprob.logprob for token, logprob in step.items()} for step in completion.logprobs
    ]


@pytest.fixture(scope="module", params=["both=2", "prefill=1,decode=2"])
def engine(make_llm, request):
    with make_llm(request.param, deterministic=True, prefill_buckets=(32,), decode_buckets=(4,)) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(make_llm):
    """Each prompt alone on an undisturbed engine."""
    with make_llm("both=1", deterministic=True, prefill_buckets=(32,), decode_buckets=(4,)) as llm:
        return {(kind, prompt): facts(llm.generate(prompt, params(kind))[0]) for kind in KINDS for prompt in PROMPTS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "batched"])
@pytest.mark.parametrize("how", [None, "preempt", "migrate"])
def test_a_request_gives_the_same_bits(engine, expected, kind, together, how):
    before = engine.metrics()
    prompts = PROMPTS if together else PROMPTS[1:2]
    streams = [engine.stream(prompt, params(kind)) for prompt in prompts]
    results = [disturb(engine, stream, how, (3, 9)) if how else stream.result() for stream in streams]
    for prompt, result in zip(prompts, results, strict=True):
        assert facts(result) == expected[kind, prompt]
    after = engine.metrics()
    if how == "preempt":
        assert after.preemptions > before.preemptions
    if how == "migrate":
        assert after.migrations > before.migrations


def test_a_small_pool_that_preempts_by_itself_changes_nothing(make_llm):
    options = dict(deterministic=True, prefill_buckets=(32,), decode_buckets=(4,), page_size=4)
    with make_llm("both=1", kv_cache_bytes=34 * 2048, **options) as llm:
        alone = [facts(llm.generate(prompt, params("sampled"))[0]) for prompt in PROMPTS]
        results = llm.generate(PROMPTS * 3, params("sampled"))
        assert llm.metrics().preemptions > 0
    assert [facts(result) for result in results] == alone * 3


def test_a_cached_prefix_changes_nothing(engine, expected):
    long = PROMPTS[3]
    first = engine.generate(long, params("greedy"))[0]
    again = engine.generate(long, params("greedy"))[0]
    assert again.num_cached_tokens > 0
    assert facts(first) == facts(again) == expected["greedy", long]


@pytest.mark.parametrize("topology", ["both=1xtp2", "prefill=1xtp2,decode=1xtp2"])
def test_with_tensor_parallelism_both_and_split_agree(make_llm, topology, tp2_expected):
    with make_llm(topology, deterministic=True, prefill_buckets=(32,), decode_buckets=(4,)) as llm:
        results = llm.generate(PROMPTS, params("sampled"))
    assert [facts(result) for result in results] == tp2_expected


@pytest.fixture(scope="module")
def tp2_expected(make_llm):
    with make_llm("both=1xtp2", deterministic=True, prefill_buckets=(32,), decode_buckets=(4,)) as llm:
        return [facts(llm.generate(prompt, params("sampled"))[0]) for prompt in PROMPTS]
