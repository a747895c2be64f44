"""Engines that store keys and values in 8 bits: the same tokens however a request came to them, and nearly the best."""

from dataclasses import replace

import pytest
from helpers.core_engine import Reference, greedy, make_engine, model_with_windows, prompts_of

# Heads as in the tests of kernels, which so build the same ones.
MODEL, PROMPTS = replace(model_with_windows(None, 6), head_dim=16), prompts_of(9, 11, 10, 12)


@pytest.fixture(scope="module")
def reference():
    return Reference(MODEL)


def tokens_of(topology, kv, **changes):
    """The tokens of all prompts at once, and how often a request was preempted."""
    with make_engine(MODEL, topology, kv_cache_dtype=kv, deterministic=True, **changes) as llm:
        outputs = llm.generate(PROMPTS, greedy(40))
        return [output.outputs[0].token_ids for output in outputs], llm.metrics().preemptions


def test_tokens_are_the_same_preempted_in_chunks_or_handed_off(reference):
    """Pages hold what their own tokens gave: whoever wrote them, and in what pieces."""
    crowded, preemptions = tokens_of("both=1", "int8")
    assert preemptions > 0
    handed_off, _ = tokens_of("prefill=1,decode=1", "int8", room=4.0)
    assert crowded == handed_off
    for prompt, tokens in zip(PROMPTS, crowded, strict=True):
        assert reference.regret(prompt, tokens) < 0.5  # of logits that spread over several units


def test_a_prompt_computed_over_floats_is_decoded_over_8_bits(reference):
    found, _ = tokens_of("prefill=1,decode=1", "prefill=auto,decode=int8/fp8", room=4.0)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert reference.regret(prompt, tokens) < 1.5
