"""A pool of real engines of a tiny model: whatever becomes of the roles, requests give the same tokens, and nothing
compiles."""

import pytest
from helpers.core_engine import assert_at_rest, greedy, make_engine, model_with_windows, prompts_of, token_ids
from twinmesh import SamplingParams

LENGTHS = (3, 17, 30, 9, 22, 5, 13, 28)
ROLES = [
    "prefill=1,decode=2",
    "both=1,decode=2",
    "prefill=2,decode=1",
    "both=3",
    {0: "decode", 1: "both", 2: "prefill"},
]
FLIPS = 20


@pytest.fixture(scope="module")
def model():
    return model_with_windows(None, 6)


def params(index):
    """Every second request is sampled, with penalties that count its tokens."""
    sampled = SamplingParams(
        temperature=1.1, seed=index, presence_penalty=0.4, max_tokens=20, ignore_eos=True, detokenize=False
    )
    return sampled if index % 2 else greedy(20)


def run_through_flips(llm, prompts):
    """Answer prompts, twice over, while roles flip and requests are moved; return the tokens."""
    streams = [llm.stream(prompt, params(index)) for index, prompt in enumerate(prompts)]
    for index in range(FLIPS):
        assert llm.set_roles(ROLES[index % len(ROLES)], drain_timeout=60) == "reached"
        stream = streams[index % len(streams)]
        llm.migrate(stream.request_id)
        if index % 5 == 4:  # more to do
            streams += [llm.stream(prompt, params(at)) for at, prompt in enumerate(prompts)]
    outputs = [stream.result() for stream in streams]
    return token_ids(outputs)


def test_deterministic_tokens_are_the_same_through_flips_and_migrations(model):
    prompts = prompts_of(*LENGTHS)
    with make_engine(model, "both=1", room=4, deterministic=True) as llm:
        expected = token_ids(llm.generate(prompts, [params(index) for index in range(len(prompts))]))
    with make_engine(model, "pool=3", room=4, deterministic=True, roles="prefill=1,decode=2") as llm:
        before = llm.metrics()
        found = run_through_flips(llm, prompts)
        after = llm.metrics()
        assert found == expected * (len(found) // len(expected))
        assert after.flips >= FLIPS
        assert after.migrations > before.migrations
        assert after.compiles == before.compiles == 0
        assert llm.roles() == dict(enumerate(after.roles))
        assert not any("draining" in role for role in after.roles)
        assert_at_rest(llm)
