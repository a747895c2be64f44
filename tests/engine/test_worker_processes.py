"""Engines over worker processes: the tokens of one process, also when workers are killed, stopped or replaced."""

import itertools
import json
import os
import re
import signal
import threading

import numpy as np
import pytest
from helpers.core_engine import ask, executor_of, greedy, prompts_of
from helpers.workers import LONG, OPTIONS, kill, nothing_left, pid_of, start, wait_until_back
from twinmesh import LLM, SamplingParams, StructuredOutputsParams
from twinmesh.engine.batch import run
from twinmesh.engine.errors import Overloaded
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.startup.workers import start_with_workers
from twinmesh.engine.worker.remote.processes import WorkerProcesses

PROMPTS = prompts_of(*(3 + 11 * index % 60 for index in range(24)))
PARAMS = greedy(24)


@pytest.fixture(scope="module")
def alone(tiny_path):
    """The same engine in one process."""
    with LLM(tiny_path, topology="prefill=1,decode=1", **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(alone):
    """Its tokens for `PROMPTS`."""
    return tokens_of(alone.generate(PROMPTS, PARAMS))


@pytest.fixture(scope="module")
def llm(tiny_path):
    with start(tiny_path) as llm:
        yield llm


def tokens_of(outputs):
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


def stream_all(llm, streams):
    """Add a stream for each prompt, as far as they are let in."""
    for prompt in PROMPTS:
        streams.append(llm.stream(prompt, PARAMS))


class Reading:
    """A stream as it is read: what has come so far, and the rest."""

    def __init__(self, llm, prompt):
        self.stream = llm.stream(prompt, PARAMS)
        self._deltas, self.tokens = iter(self.stream), []

    def read(self, deltas=None):
        """Read so many deltas; None: to the end. Return all tokens so far."""
        for delta in itertools.islice(self._deltas, deltas):
            self.tokens += delta.token_ids
        if deltas is None:
            assert self.stream.result().error is None
        return self.tokens


def test_tokens_are_those_of_one_process_also_with_preemptions(llm, expected):
    with nothing_left(llm):
        reading = Reading(llm, PROMPTS[0])
        reading.read(1)
        llm.preempt(reading.stream.request_id)
        aborted = llm.stream(PROMPTS[1], greedy(60))
        llm.abort(aborted.request_id)
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        assert reading.read() == expected[0]
        assert aborted.result().outputs[0].finish_reason == "abort"
    metrics = llm.metrics()
    assert metrics.preemptions
    assert metrics.compiles == 0
    assert metrics.handoff_bytes == metrics.links[0, 1].bytes > 0


def test_log_probabilities_and_penalties_cross(llm, alone):
    params = greedy(6, logprobs=2, prompt_logprobs=1, repetition_penalty=1.3)
    (there,) = llm.generate([PROMPTS[2]], params)
    (here,) = alone.generate([PROMPTS[2]], params)
    assert there.prompt_logprobs == here.prompt_logprobs
    assert there.outputs[0].logprobs == here.outputs[0].logprobs


def test_killed_workers_cost_no_request_a_token(llm, expected):
    results = {}
    with nothing_left(llm):
        batch = threading.Thread(target=lambda: results.update(batch=llm.generate(PROMPTS, PARAMS)))
        for worker in (1, 0):
            if worker:
                batch.start()
            reading = Reading(llm, PROMPTS[5])
            reading.read(3)
            epoch = kill(llm, worker)
            assert reading.read() == expected[5]
            wait_until_back(llm, worker, epoch)
        batch.join(LONG)
        assert tokens_of(results["batch"]) == expected
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
    assert llm.roles() == {0: "prefill", 1: "decode"}


DATE = StructuredOutputsParams(regex="[0-9]{4}-[0-9]{2}-[0-9]{2}")
DATES = [
    SamplingParams(temperature=0.0, max_tokens=20, structured_outputs=DATE),
    SamplingParams(temperature=1.3, top_p=0.95, seed=7, max_tokens=20, logprobs=1, structured_outputs=DATE),
]


def test_structured_output_has_the_tokens_of_one_process_also_where_workers_are_killed(llm, alone):
    prompts = [prompt for prompt in PROMPTS[:4] for _ in DATES]
    here = alone.generate(prompts, DATES * 4)
    with nothing_left(llm):
        there = llm.generate(prompts, DATES * 4)
        assert tokens_of(there) == tokens_of(here)
        assert [one.outputs[0].logprobs for one in there] == [one.outputs[0].logprobs for one in here]
        assert all(re.fullmatch(DATE.regex, output.outputs[0].text) for output in there)
        for worker in (1, 0):
            streams = [llm.stream(prompt, params) for prompt, params in zip(prompts, DATES * 4, strict=True)]
            reading = iter(streams[1])  # which would end the request if it were dropped
            next(reading)
            epoch = kill(llm, worker)
            results = [stream.result() for stream in streams]
            assert tokens_of(results) == tokens_of(here)
            wait_until_back(llm, worker, epoch)
        assert tokens_of(llm.generate(prompts, DATES * 4)) == tokens_of(here)  # of workers that have been away
    assert llm.metrics().compiles == 0


def test_new_parameters_reach_every_worker(llm, alone, expected):
    name = "layers.0.attention.q_proj"
    with pytest.raises(ValueError, match=r"params names 'no\.such', which the model does not have"):
        llm.update_params({"no.such": np.zeros(1, np.float32)})
    old = np.asarray(parameter_of(alone, name))
    new = {name: np.roll(old, 1, axis=-1)}
    alone.update_params(new)
    changed = tokens_of(alone.generate(PROMPTS[:6], PARAMS))
    alone.update_params({name: old})
    assert changed != expected[:6]
    llm.update_params(new)
    assert tokens_of(llm.generate(PROMPTS[:6], PARAMS)) == changed
    llm.update_params({name: old})
    assert tokens_of(llm.generate(PROMPTS[:6], PARAMS)) == expected[:6]


def parameter_of(llm, name):
    mesh = executor_of(llm).meshes[0]
    return mesh.params[list(mesh.placer.specs).index(name)]


def test_what_workers_cannot_do_is_said_in_a_sentence(tiny_path):
    with pytest.raises(ValueError, match="workers='threads' is not usable: use one of processes"):
        LLM(tiny_path, workers="threads")
    with pytest.raises(ValueError, match=r"topology='auto' looks at the devices of this process, .*\.$"):
        LLM(tiny_path, workers="processes", topology="auto")
    with pytest.raises(ValueError, match=r"devices= are of this process, and workers have their own: .*\.$"):
        LLM(tiny_path, workers="processes", devices=[])
    with pytest.raises(ValueError, match="worker_timeout=-1 is not usable"):
        LLM(tiny_path, workers="processes", worker_timeout=-1)


def stop(llm, worker):
    """Stop a worker as a hung device would, and return its process."""
    os.kill(pid := pid_of(llm, worker), signal.SIGSTOP)
    return pid


@pytest.mark.long
def test_a_worker_that_is_stopped_is_lost_killed_and_replaced(tiny_path, expected):
    with start(tiny_path, worker_timeout=5.0) as llm, nothing_left(llm):
        reading = Reading(llm, PROMPTS[5])
        reading.read(3)
        epoch, pid = executor_of(llm).crew.epochs()[1], stop(llm, 1)
        assert reading.read() == expected[5]
        wait_until_back(llm, 1, epoch)
        assert pid_of(llm, 1) != pid
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        assert ask(llm, lambda scheduler, executor: scheduler.counters.retries) == 0


@pytest.mark.long
def test_a_batch_whose_workers_are_killed_ten_times_each_has_every_line_once(tiny_path, tmp_path):
    lines = [
        {"custom_id": str(number), "prompt": f"line {number} of many", "max_tokens": 40, "temperature": 0}
        for number in range(200)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    random = np.random.default_rng(0)
    with LLM(tiny_path, topology="prefill=1,decode=1", **OPTIONS) as llm:
        run(llm, source, tmp_path / "expected.jsonl", model=tiny_path)
        expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    with start(tiny_path) as llm, nothing_left(llm):
        batch = threading.Thread(target=run, args=(llm, source, target), kwargs={"model": tiny_path})
        batch.start()
        for number in range(20):
            worker, index = number % 2, number % len(PROMPTS)
            reading = Reading(llm, PROMPTS[index])
            reading.read(int(random.integers(1, 20)))
            epoch = kill(llm, worker)
            wait_until_back(llm, worker, epoch)
            assert reading.read() == expected[index]
        batch.join(LONG)
        assert not batch.is_alive()
    assert results_of(target) == results_of(tmp_path / "expected.jsonl")


def results_of(path):
    """The text of each line, by its id; every id once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["error"] for line in found if line["error"]] == []
    by_id = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in found}
    assert len(by_id) == len(found) == 200
    return by_id


@pytest.mark.long
@pytest.mark.parametrize("topology", ["prefill=1xtp2,decode=2", "prefill=1,decode=2xtp2", "pool=3"])
def test_three_processes_of_unequal_size_give_the_tokens_of_one(tiny_path, topology):
    with LLM(tiny_path, topology=topology, **OPTIONS) as llm:
        expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    with start(tiny_path, topology) as llm, nothing_left(llm):
        readings = [Reading(llm, prompt) for prompt in PROMPTS]
        for number, reading in enumerate(readings):
            reading.read(2)
            (llm.migrate if number % 2 else llm.preempt)(reading.stream.request_id)
        assert [reading.read() for reading in readings] == expected
        metrics = llm.metrics()
        assert metrics.preemptions
        assert metrics.migrations


@pytest.mark.long
def test_a_worker_with_two_meshes_hands_on_within_itself_and_is_lost_as_a_whole(tiny_path):
    topology = "prefill=2,decode=1"
    with LLM(tiny_path, topology=topology, **OPTIONS) as llm:
        expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    options = EngineOptions(tiny_path, topology=topology, workers="processes", worker_timeout=60.0, **OPTIONS)
    engine = start_with_workers(options, WorkerProcesses(options.parsed_topology, 2))
    with LLM.from_engine(engine) as llm, nothing_left(llm):
        assert [place.meshes for place in executor_of(llm).crew.places] == [(0,), (1, 2)]
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        links = llm.metrics().links
        assert links[0, 2].bytes > 0
        assert links[1, 2].bytes > 0
        reading = Reading(llm, PROMPTS[5])
        reading.read(3)
        epoch = kill(llm, 1)
        assert reading.read() == expected[5]
        wait_until_back(llm, 1, epoch)
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected


@pytest.mark.long
def test_in_a_pool_the_mesh_that_is_left_does_both_and_calls_wait_in_a_bounded_queue(tiny_path):
    pool = dict(topology="pool=2", roles="prefill=1,decode=1")
    with LLM(tiny_path, **pool, **OPTIONS) as llm:
        expected = tokens_of(llm.generate(PROMPTS, PARAMS))
    with start(tiny_path, **pool, max_waiting=3) as llm, nothing_left(llm):
        reading = Reading(llm, PROMPTS[5])
        reading.read(3)
        epoch = kill(llm, 1)
        assert reading.read() == expected[5]
        if llm.roles()[1].endswith("(gone)"):  # it takes seconds to come back
            assert llm.roles()[0] == "both"
        os.kill(other := pid_of(llm, 0), signal.SIGSTOP)  # so that nothing gets on
        streams = []
        with pytest.raises(Overloaded):
            stream_all(llm, streams)
        os.kill(other, signal.SIGCONT)
        assert len(streams) >= 3
        assert [list(stream.result().outputs[0].token_ids) for stream in streams] == expected[: len(streams)]
        wait_until_back(llm, 1, epoch)
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        assert llm.roles() == {0: "prefill", 1: "decode"}


@pytest.mark.long
def test_thousand_aborted_handoffs_leave_the_source_as_it_was(llm):
    def memory():
        return [int(open(f"/proc/{pid_of(llm, worker)}/statm").read().split()[1]) * 4096 for worker in (0, 1)]

    def abort_many(count):
        for number in range(count):
            reading = Reading(llm, PROMPTS[number % len(PROMPTS)])
            reading.read(1)  # of the prefill mesh: its KV leaves about now
            llm.abort(reading.stream.request_id)
            reading.read()

    with nothing_left(llm):
        abort_many(100)
        before = memory()
        abort_many(1000)
        assert all(now - then < 8 << 20 for then, now in zip(before, memory(), strict=True))
