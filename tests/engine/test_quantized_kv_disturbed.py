"""8-bit pages amid aborts, preemption, migration, prefix-cache hits and windows: tokens are those of a quiet engine."""

import jax
import numpy as np
import pytest
from helpers.core_engine import assert_at_rest, greedy, make_engine, model_with_windows, prompts_of
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.protocol.events import AbortRequested, MigrateRequested, PreemptRequested
from twinmesh.engine.scheduler.request import State

DISTURBANCES = (
    lambda id_: AbortRequested(0.0, id_), lambda id_: PreemptRequested(0.0, id_),
    lambda id_: MigrateRequested(0.0, id_, None),
)  # fmt: skip
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


class Disturber(Observer):
    """Disturbs a request that decodes at every third decision, on the engine's own thread: however fast the machine."""

    def __init__(self):
        self.random, self.turns = np.random.default_rng(1), 0

    def deciding(self, scheduler):
        self.turns += 1
        decoding = [request.id for request in scheduler.requests.values() if request.state is State.DECODE]
        if self.turns % 3 or not decoding:
            return
        victim = int(self.random.choice(decoding))
        scheduler.on(DISTURBANCES[self.random.choice(len(DISTURBANCES), p=(0.2, 0.4, 0.4))](victim))


def test_who_is_left_has_the_tokens_of_a_quiet_engine(llm):
    quiet = [llm.generate([prompt], greedy(24))[0].outputs[0].token_ids for prompt in PROMPTS]
    before = llm.metrics()
    with llm.engine.core.observe(Disturber()):
        outputs = llm.generate(PROMPTS * 5, greedy(24))
    ended = [(index % len(PROMPTS), output.outputs[0]) for index, output in enumerate(outputs)]
    left = [(index, output) for index, output in ended if output.finish_reason == "length"]
    assert 0 < len(left) < len(ended)
    assert all(output.token_ids == quiet[index] for index, output in left)
    after = llm.metrics()
    assert after.preemptions > before.preemptions
    assert after.migrations > before.migrations
    assert after.cached_tokens > before.cached_tokens
    assert_at_rest(llm)
