"""Penalties, biases, bad words and minimum lengths, wherever a request goes: the tokens of `both=1`.

Steps are in flight ahead of what the host has read when a request leaves, arrives or starts over, so a token that was
not counted, or was counted twice, shows.
"""

import pytest
from helpers.core_engine import executor_of
from twinmesh import SamplingParams
from twinmesh.engine.sizing.memory_needs import page_bytes, state_bytes

PROMPTS = ["The cat", "On the other hand, " * 3, "in the end there was only the sea " * 2]
COUNT = 20
KINDS = {
    "repetition": dict(temperature=0.0, repetition_penalty=1.5),
    "frequency": dict(temperature=0.0, frequency_penalty=1.5),
    "presence": dict(temperature=0.7, seed=2, presence_penalty=2.0),
    "bias": dict(temperature=1.0, seed=3, logit_bias={5: 3.0, 7: -2.0}),
    "allowed": dict(temperature=1.0, seed=4, allowed_token_ids=tuple(range(20, 60))),
    "min_tokens": dict(temperature=0.0, min_tokens=12, stop_token_ids=tuple(range(3, 150)), ignore_eos=True),
    "bad words": dict(temperature=0.0, bad_words=("the", "e", " a", "he", "t")),
    "all": dict(
        temperature=0.9, seed=5, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.4, presence_penalty=0.3,
        logit_bias={9: 2.0}, min_tokens=5, bad_words=("th",), logprobs=1,
    ),
}  # fmt: skip


def params(kind):
    return SamplingParams(**dict(max_tokens=COUNT, ignore_eos=True) | KINDS[kind])


def tokens_of(output):
    assert output.error is None
    return output.outputs[0].token_ids


OPTIONS = dict(prefill_buckets=(32,), decode_buckets=(4,))


@pytest.fixture(scope="module", params=[True, False], ids=["deterministic", "any order"])
def expected(make_llm, request):
    """The mode, and each prompt's tokens on an undisturbed engine."""
    with make_llm("both=1", deterministic=request.param, **OPTIONS) as llm:
        return request.param, {kind: [tokens_of(llm.generate(p, params(kind))[0]) for p in PROMPTS] for kind in KINDS}


@pytest.fixture(scope="module", params=["both=2", "prefill=1,decode=2"])
def engine(make_llm, expected, request):
    with make_llm(request.param, deterministic=expected[0], **OPTIONS) as llm:
        yield llm


def disturb(llm, stream, how):
    """Consume a stream to its end; after a few tokens its request is preempted or moved, and again later."""
    seen = 0
    for delta in stream:
        before, seen = seen, seen + len(delta.token_ids)
        if how and any(before < at <= seen for at in (2, 6, 11)):
            getattr(llm, how)(stream.request_id)
    return stream.result()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [None, "migrate", "preempt"])
def test_tokens_are_those_of_one_mesh(engine, expected, kind, how):
    streams = [engine.stream(prompt, params(kind)) for prompt in PROMPTS]
    assert [tokens_of(disturb(engine, stream, how)) for stream in streams] == expected[1][kind]


def test_a_hand_off_carries_pages_and_a_few_numbers(make_llm):
    """Nothing of the vocabulary's size, with penalties or without."""
    for kind in ("all", "bias"):
        with make_llm("prefill=1,decode=1", **OPTIONS) as llm:
            llm.generate(PROMPTS[0], params(kind))
            executor = executor_of(llm)
            plan, traffic = executor.meshes[0].plan, executor.traffic
            (page,) = page_bytes(plan.model, plan.config.page_size, plan.kv)
            assert traffic.transfers == 1
            assert traffic.bytes == page + state_bytes()
            assert state_bytes() < 64


def test_many_requests_with_and_without_dense_rows_share_few_slots(make_llm):
    """Slots change hands between requests that have a dense row and others, on both meshes."""
    kinds = list(KINDS) + [None] * 4
    chosen = [params(kind) if kind else SamplingParams(temperature=0, max_tokens=COUNT) for kind in kinds] * 3
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(chosen))]
    with make_llm("both=1", **OPTIONS) as llm:
        want = [tokens_of(llm.generate(*pair)[0]) for pair in zip(prompts, chosen, strict=True)]
    with make_llm("prefill=1,decode=1", max_num_seqs=3, **OPTIONS) as llm:
        assert [tokens_of(output) for output in llm.generate(prompts, chosen)] == want
