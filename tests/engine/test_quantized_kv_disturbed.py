"""8-bit pages amid aborts, preemption, migration, prefix-cache hits and windows: tokens are those of a quiet engine."""

import jax
import numpy as np
import pytest
from helpers.core_engine import assert_at_rest, greedy, make_engine, model_with_windows, prompts_of

MODEL = model_with_windows(None, 6)
WHOLE = prompts_of(30, 30)
# Beginnings of two texts, of which longer ones find blocks of shorter ones in the prefix cache.
PROMPTS = [text[:length] for text in WHOLE for length in (9, 14, 21, 30)]


@pytest.fixture(scope="module")
def llm():
    """Floats are converted as they leave; both decode meshes are on one device, and share its programs."""
    devices = [jax.devices()[i] for i in (0, 1, 1)]
    kv = "prefill=auto,decode=int8/fp8"
    with make_engine(MODEL, "prefill=1,decode=2", devices=devices, kv_cache_dtype=kv, deterministic=True) as llm:
        yield llm


def test_who_is_left_has_the_tokens_of_a_quiet_engine(llm):
    quiet = [llm.generate([prompt], greedy(24))[0].outputs[0].token_ids for prompt in PROMPTS]
    before, random = llm.metrics(), np.random.default_rng(1)
    streams = [(index % len(PROMPTS), llm.stream(PROMPTS[index % len(PROMPTS)], greedy(24))) for index in range(40)]
    for _, victim in streams:
        getattr(llm, random.choice(["abort", "preempt", "preempt", "migrate"]))(victim.request_id)
    ended = [(index, stream.result().outputs[0]) for index, stream in streams]
    left = [(index, output) for index, output in ended if output.finish_reason == "length"]
    assert 0 < len(left) < len(ended)
    assert all(output.token_ids == quiet[index] for index, output in left)
    after = llm.metrics()
    assert after.preemptions > before.preemptions
    assert after.cached_tokens > before.cached_tokens
    assert_at_rest(llm)
