"""Engines under pressure: pools for little more than one request, thousands of requests from several threads, aborts at
any moment. Whatever happens, tokens are right, nothing is left behind, and the decisions can be replayed."""

import contextlib
from collections import Counter

import jax
import numpy as np
import pytest
from helpers.core_engine import (
    Reference,
    assert_at_rest,
    greedy,
    in_threads,
    make_engine,
    model_with_windows,
    prompts_of,
    token_ids,
)
from twinmesh import SamplingParams
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.protocol.actions import CopyPage, DropTransfer, Fused
from twinmesh.engine.protocol.events import AbortRequested
from twinmesh.engine.scheduler.decision_log import read_line
from twinmesh.engine.scheduler.request import State
from twinmesh.engine.simulation.logs.replay import replay

MODEL = model_with_windows(None, 6)
# Both decode meshes are on one device, and share its programs.
KINDS = {"both": ("both=1", [0]), "fused": ("both(mode=fused)=1", [0]), "split": ("prefill=1,decode=2", [0, 1, 1])}


def start(kind, **options):
    topology, devices = KINDS[kind]
    return make_engine(MODEL, topology, devices=[jax.devices()[i] for i in devices], **options)


@pytest.fixture(scope="module")
def engines():
    """An engine of each kind, made when it is first asked for."""
    with contextlib.ExitStack() as stack:
        made = {}

        def engine(kind):
            if kind not in made:
                made[kind] = stack.enter_context(start(kind))
            return made[kind]

        yield engine


@pytest.fixture(scope="module")
def reference():
    return Reference(MODEL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_for_little_more_than_one_request_serves_fifty(engines, reference, kind):
    llm = engines(kind)
    before = llm.metrics()
    random = np.random.default_rng(0)
    # Short and growing long, so that some are placed at once for whom there is no room later.
    prompts, counts = prompts_of(*random.integers(1, 20, 50)), random.integers(20, 45, 50).tolist()
    outputs = llm.generate(prompts, [greedy(count) for count in counts])
    assert [len(ids) for ids in token_ids(outputs)] == counts
    assert all(map(reference.agrees, prompts, token_ids(outputs)))
    after = llm.metrics()
    assert after.preemptions > before.preemptions
    assert after.compiles == before.compiles
    assert_at_rest(llm)


@pytest.mark.parametrize(("kind", "count"), [("split", 2000), ("both", 500), ("fused", 500)])
def test_aborts_at_any_moment_leave_nothing_behind(engines, kind, count):
    llm = engines(kind)
    before = Counter(llm.metrics().requests)
    counts = in_threads(4, lambda index: use(llm, index, count // 4))
    metrics = llm.metrics()
    ended = Counter(metrics.requests) - before
    assert ended == sum(counts, Counter())
    assert sum(ended.values()) == count
    assert set(ended) == {"length", "abort"}
    assert metrics.running == 0
    assert_at_rest(llm)


def use(llm, caller, count):
    """One caller's requests, some of them aborted, preempted or moved; how they ended."""
    random = np.random.default_rng(caller)
    prompts = prompts_of(3, 9, 18, 33, seed=caller % 2)  # two callers each have the same
    running, ended = [], Counter()
    for _ in range(count):
        prompt = prompts[random.integers(4)][: random.integers(1, 34)]
        running.append(llm.stream(prompt, greedy(int(random.integers(1, 12)), temperature=float(random.integers(2)))))
        victim = running[random.integers(len(running))]
        getattr(llm, random.choice(["abort", "abort", "preempt", "migrate"]))(victim.request_id)
        while len(running) > 6:
            stream = running.pop(0)
            for delta, patience in zip(stream, range(random.integers(1, 20)), strict=False):
                if patience == 3:
                    llm.abort(stream.request_id)
                del delta
            ended[stream.result().outputs[0].finish_reason] += 1
    ended.update(stream.result().outputs[0].finish_reason for stream in running)
    return ended


class Hunter(Observer):
    """Aborts a request on the engine's own thread, as soon as it is in a given state, before or after a decision.

    `aborted`: the lengths of their prompts."""

    def __init__(self, state):
        self.state, self.aborted = state, []

    def deciding(self, scheduler):
        self._hunt(scheduler)

    def decided(self, scheduler, actions):
        self._hunt(scheduler)  # a hand-off may begin here, and be over by the next decision

    def _hunt(self, scheduler):
        for request in list(scheduler.requests.values()):
            if request.state is self.state and request.prompt_len > 30 and len(self.aborted) < 5:
                scheduler.on(AbortRequested(0.0, request.id))
                self.aborted.append(request.prompt_len)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", [State.WAITING, State.PREFILL, State.HANDOFF, State.DECODE])
def test_an_abort_in_any_state_ends_only_its_request(engines, reference, kind, state):
    if state is State.HANDOFF and kind != "split":
        pytest.skip("nothing is handed off")
    llm = engines(kind)
    hunter = Hunter(state)
    prompts = prompts_of(35, 36, 8, 37, 38, 9, 39, 40, seed=7)
    with llm.engine.core.observe(hunter):
        outputs = llm.generate(prompts, greedy(12))
    assert len(hunter.aborted) == 5
    aborted = [output for output in outputs if output.outputs[0].finish_reason == "abort"]
    assert sorted(len(output.prompt_token_ids) for output in aborted) == sorted(hunter.aborted)
    assert all(reference.agrees(p, ids) for p, ids in zip(prompts, token_ids(outputs), strict=True) if ids)
    assert_at_rest(llm)
    outputs = llm.generate(prompts, greedy(12))
    assert all(map(reference.agrees, prompts, token_ids(outputs)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_run_can_be_replayed(tmp_path, kind):
    path = tmp_path / "decisions.jsonl"
    with start(kind, decision_log=path) as llm:
        in_threads(3, lambda index: use_in_every_way(llm, index))
        in_threads(2, lambda index: use(llm, index, 40))
        assert_at_rest(llm)
        metrics = llm.metrics()
        running = llm.stream(prompts_of(30)[0], greedy(20))
        next(iter(running))
    replayed = replay(path)
    assert metrics.preemptions > 0
    assert metrics.migrations > 0 or kind != "split"
    assert replayed.scheduler.counters.preemptions >= metrics.preemptions
    assert Counter(replayed.finished.values())["length"] >= metrics.requests["length"]
    assert replayed.ended.generated_tokens >= metrics.generated_tokens
    lines = [read_line(line) for line in path.read_text().splitlines()[1:]]
    made = {type(action) for line in lines if isinstance(line, list) for action in line}
    assert {"both": CopyPage, "fused": Fused, "split": DropTransfer}[kind] in made


def use_in_every_way(llm, caller):
    """Requests of several completions, some preempted, moved or aborted, and new parameters in between."""
    for prompt in prompts_of(37, 5, 22, seed=caller):
        stream = llm.stream(prompt, SamplingParams(n=2, max_tokens=12, seed=caller, detokenize=False))
        for delta in stream:
            if len(delta.token_ids):
                getattr(llm, ("preempt", "migrate", "abort")[caller])(stream.request_id)
        if caller == 0:
            llm.update_params({})
