"""Meshes over several worker processes give the tokens of one process, and the processes of a mesh have one fate."""

import os
import signal
import threading

import numpy as np
import pytest
from helpers.core_engine import ask, executor_of, greedy, prompts_of
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from helpers.workers import LONG, OPTIONS, nothing_left, start, wait_until_back
from twinmesh import LLM, SamplingParams, StructuredOutputsParams
from twinmesh.engine.options import EngineOptions

PROMPTS = prompts_of(*(3 + 11 * index % 60 for index in range(16)))
PARAMS = greedy(24)
DRAWN = SamplingParams(seed=3, max_tokens=12, ignore_eos=True, detokenize=False, presence_penalty=0.5)


def tokens_of(outputs):
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model that does not repeat itself."""
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TinyLlama(heads=8, kv_heads=2, tied=False))


@pytest.fixture(scope="module")
def alone(path):
    with LLM(path, topology="both=1xtp2", **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(path):
    """One mesh of tp 2 over two processes."""
    with start(path, "both=1xtp2", workers_per_mesh=2) as llm:
        yield llm


def members_of(llm, mesh):
    """The processes of a mesh."""
    return [executor_of(llm).crew.backend.backend.pid(2 * mesh + member) for member in (0, 1)]


def test_two_processes_give_the_tokens_of_one(llm, alone):
    with nothing_left(llm):
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == tokens_of(alone.generate(PROMPTS, PARAMS))
        assert tokens_of(llm.generate(PROMPTS[:4], DRAWN)) == tokens_of(alone.generate(PROMPTS[:4], DRAWN))
        # What scores a prompt is dispatched beside the steps, and has collectives as well.
        scored = greedy(6, logprobs=2, prompt_logprobs=1)
        for there, here in zip(llm.generate(PROMPTS[:6], scored), alone.generate(PROMPTS[:6], scored), strict=True):
            assert there.prompt_logprobs == here.prompt_logprobs
            assert there.outputs[0].logprobs == here.outputs[0].logprobs
    assert llm.metrics().compiles == 0


def test_masks_reach_every_process_of_the_mesh(llm, alone):
    asked = StructuredOutputsParams(regex="[0-9]{2}:[0-9]{2}")
    params = [SamplingParams(seed=seed, max_tokens=12, structured_outputs=asked) for seed in range(4)]
    with nothing_left(llm):
        assert tokens_of(llm.generate(PROMPTS[:4], params)) == tokens_of(alone.generate(PROMPTS[:4], params))
    assert llm.metrics().compiles == 0


def test_new_parameters_reach_every_process_of_the_mesh(llm, alone):
    mesh = executor_of(alone).meshes[0]
    name = "layers.0.attention.k_proj"
    old = np.asarray(mesh.params[list(mesh.placer.specs).index(name)])
    before = tokens_of(llm.generate(PROMPTS[:4], PARAMS))
    for engine in (llm, alone):
        engine.update_params({name: np.roll(old, 1, axis=-1)})
    changed = tokens_of(llm.generate(PROMPTS[:4], PARAMS))
    assert before != changed == tokens_of(alone.generate(PROMPTS[:4], PARAMS))
    for engine in (llm, alone):
        engine.update_params({name: old})
    assert tokens_of(llm.generate(PROMPTS[:4], PARAMS)) == before


def lose_one_of(llm, mesh, member, signal_):
    """While requests run, do to one process of a mesh what ends it; return their tokens once the mesh is back."""
    results, deltas = [], iter(llm.stream(PROMPTS[0], PARAMS))
    batch = threading.Thread(target=lambda: results.append(llm.generate(PROMPTS, PARAMS)))
    batch.start()
    streamed = list(next(deltas).token_ids)
    epoch, before = executor_of(llm).crew.epochs()[mesh], members_of(llm, mesh)
    os.kill(before[member], signal_)
    for delta in deltas:
        streamed += delta.token_ids
    batch.join(LONG)
    wait_until_back(llm, mesh, epoch)
    assert not set(before) & set(members_of(llm, mesh))
    return tokens_of(results[0]), streamed


def test_a_killed_process_takes_its_mesh_along_which_comes_back_and_no_request_loses_a_token(llm, alone):
    expected = tokens_of(alone.generate(PROMPTS, PARAMS))
    with nothing_left(llm):
        assert lose_one_of(llm, 0, 1, signal.SIGKILL) == (expected, expected[0])
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        assert ask(llm, lambda scheduler, executor: scheduler.counters.retries) == 0


@pytest.mark.long
def test_the_first_process_may_be_killed_and_one_that_is_stopped_is_as_good_as_dead(path, alone):
    expected = tokens_of(alone.generate(PROMPTS, PARAMS))
    with start(path, "both=1xtp2", workers_per_mesh=2, worker_timeout=5.0) as llm, nothing_left(llm):
        for member, signal_ in ((0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)):
            assert lose_one_of(llm, 0, member, signal_) == (expected, expected[0])
        assert ask(llm, lambda scheduler, executor: scheduler.counters.retries) == 0


@pytest.mark.long
@pytest.mark.parametrize("topology", ["prefill=1xtp2,decode=1xtp4", "prefill=1xtp4,decode=1xtp2", "both=2xtp2"])
def test_kv_moves_between_meshes_over_processes_and_a_mesh_does_not_share_the_fate_of_another(path, topology):
    with LLM(path, topology=topology, **OPTIONS) as llm:
        expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    with start(path, topology, workers_per_mesh=2) as llm, nothing_left(llm):
        streams = [llm.stream(prompt, PARAMS) for prompt in PROMPTS]
        deltas = [iter(stream) for stream in streams]
        tokens = [list(next(some).token_ids) for some in deltas]
        for number, stream in enumerate(streams):
            (llm.migrate if number % 2 else llm.preempt)(stream.request_id)
        for some, found in zip(deltas, tokens, strict=True):
            found += [token for delta in some for token in delta.token_ids]
        assert tokens == expected
        metrics = llm.metrics()
        assert metrics.preemptions
        assert metrics.handoff_bytes
        other = members_of(llm, 0)
        for member in (0, 1):
            assert lose_one_of(llm, 1, member, signal.SIGKILL) == (expected, expected[0])
        assert members_of(llm, 0) == other


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"workers_per_mesh=2 divides meshes over workers: name them with workers=\.$"):
        EngineOptions("m", topology="both=1xtp2", workers_per_mesh=2)
    with pytest.raises(
        ValueError, match=r"workers_per_mesh=2 cannot divide the prefill mesh of tp 1 in topology '.*': use .*"
    ):
        EngineOptions("m", topology="prefill=1,decode=1xtp2", workers="processes", workers_per_mesh=2)
    with pytest.raises(ValueError, match="workers_per_mesh=0"):
        EngineOptions("m", topology="both=1xtp2", workers="processes", workers_per_mesh=0)
