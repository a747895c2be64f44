"""What the engine promises about devices: overlap, order, no copies through the host, no compilation, failures."""

import asyncio
import contextlib
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.core_engine import Pause, ask, executor_of
from twinmesh import EngineError, SamplingParams
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.protocol.actions import Chunk, DecodeRow, Finish, Scatter
from twinmesh.engine.protocol.events import TransferReady
from twinmesh.engine.protocol.results import StepResult
from twinmesh.engine.scheduler.policy import FirstComeFirstServed

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PROMPTS = ["The cat", "On the other hand, " * 3, "a", "in the end there was only the sea"]


@jax.jit
def _slow(tokens):
    """The tokens, unchanged, after a second or so of arithmetic."""
    matrix = jnp.full((256, 256), 1e-3)
    last = jax.lax.fori_loop(0, 2000, lambda _, m: m @ matrix, matrix)
    return tokens + (last[0, 0] > 1).astype(tokens.dtype)


def slow_down_prefill(llm, mesh=0, bucket=64):
    """Make prefill steps of one bucket wait for a slow computation on their own device."""
    runner = executor_of(llm).meshes[mesh]
    program, device = runner.programs.prefill[bucket], runner.plan.mesh.devices.flat[0]
    _slow(jax.device_put(np.zeros(bucket, np.int32), device)).block_until_ready()

    def slowed(params, state, inputs):
        tokens = _slow(jax.device_put(inputs.tokens, device))
        return program(params, state, inputs._replace(tokens=tokens))

    runner.programs.prefill[bucket] = slowed


@contextlib.contextmanager
def recording(llm):
    """Completions and scatters, in the order the engine saw them."""
    recorder = Recorder()
    with llm.engine.core.observe(recorder):
        yield recorder.seen


class Recorder(Observer):
    def __init__(self):
        self.seen = []

    def received(self, message):
        self.seen.append(message)

    def decided(self, scheduler, actions):
        self.seen.extend(action for action in actions if isinstance(action, Scatter | Finish))


def ids(seen):
    """The engine's id of each request that came in, by its name."""
    return {m[0].sink.collector.request_id: m[0].facts.id for m in seen if isinstance(m, tuple)}


def decode_steps_during_a_slow_prefill(llm):
    slow_down_prefill(llm)
    running = llm.stream(PROMPTS[0], LONG)
    updates = iter(running)
    next(updates)
    with recording(llm) as seen:
        late = llm.stream("the sea and the land " * 2, GREEDY)
        late.result()
        running.close()
    late_id = ids(seen)[late.request_id]
    finish = next(
        i for i, m in enumerate(seen)
        if isinstance(m, StepResult) and isinstance(m.rows[0], Chunk) and m.rows[0].request_id == late_id
    )  # fmt: skip
    arrival = next(i for i, m in enumerate(seen) if isinstance(m, tuple) and m[0].facts.id == late_id)
    between = seen[arrival:finish]
    return sum(isinstance(m, StepResult) and isinstance(m.rows[0], DecodeRow) for m in between), seen


def test_decode_goes_on_while_a_prompt_prefills_and_the_scatter_waits_for_it(make_llm):
    with make_llm("prefill=1,decode=1") as llm:
        steps, seen = decode_steps_during_a_slow_prefill(llm)
    assert steps >= 20
    transfers = [message for message in seen if isinstance(message, TransferReady | Scatter)]
    late = max(message.transfer for message in transfers)
    assert [type(message) for message in transfers if message.transfer == late] == [TransferReady, Scatter]


def test_a_mesh_that_does_both_cannot_overlap_them(make_llm):
    with make_llm("both=1") as llm:
        steps, _ = decode_steps_during_a_slow_prefill(llm)
    assert steps <= 2  # those that were in flight


def test_a_handoff_reads_no_kv_on_the_host(make_llm, host_reads):
    with make_llm("prefill=1,decode=1") as llm:
        llm.generate(PROMPTS, GREEDY)
        assert llm.metrics().handoff_bytes > 0
    assert [shape for shape in host_reads if len(shape) > 3] == []  # tokens are [steps, rows]


def test_host_reads_are_seen_where_shards_do_not_match(host_reads):
    """The control of the test above: unequal shardings send `device_put` through the host."""
    devices = np.array(jax.devices())
    split, whole = (jax.sharding.Mesh(devices[part], ("tp",)) for part in (slice(0, 2), slice(4, 8)))
    spec = jax.sharding.PartitionSpec("tp")
    array = jax.device_put(np.ones((8, 8), np.float32), jax.NamedSharding(split, spec))
    host_reads.clear()
    jax.device_put(array, jax.NamedSharding(whole, spec)).block_until_ready()
    assert (8, 8) in host_reads


def pool_pointers(llm):
    return [x.unsafe_buffer_pointer() for mesh in executor_of(llm).meshes for x in jax.tree.leaves(mesh.state.kv)]


def test_the_pools_stay_where_they_are(make_llm):
    with make_llm("prefill=1,decode=1") as llm:
        llm.generate(PROMPTS, GREEDY)
        before = pool_pointers(llm)
        llm.generate(PROMPTS, GREEDY)
        assert pool_pointers(llm) == before


def test_every_program_that_takes_a_pool_aliases_it_and_needs_little_besides(make_llm):
    with make_llm("prefill=1,decode=1", kv_cache_bytes=32 << 20, max_num_seqs=128, decode_buckets=(1, 128)) as llm:
        for mesh in executor_of(llm).meshes:
            pool = sum(x.nbytes for x in jax.tree.leaves(mesh.state.kv))
            assert pool >= 8 << 20
            programs = mesh.programs
            for program in [*programs.prefill.values(), *programs.decode.values(), *programs.scatter.values()]:
                memory = program.memory_analysis()
                assert memory.alias_size_in_bytes >= pool
                assert memory.temp_size_in_bytes < pool / 4


def test_nothing_compiles_under_mixed_load(make_llm):
    random = np.random.default_rng(0)
    with make_llm("prefill=1,decode=1") as llm:
        streams = []
        for index in range(100):
            prompt = random.integers(3, 200, random.integers(1, 100)).tolist()
            params = SamplingParams(
                temperature=float(random.choice([0.0, 0.7])),
                top_p=float(random.choice([0.5, 1.0])),
                top_k=int(random.choice([0, 5])),
                max_tokens=int(random.integers(1, 30)),
                ignore_eos=bool(index % 2),
            )
            streams.append(llm.stream(prompt, params))
        for stream in streams[::10]:
            stream.close()
        results = [stream.result() for stream in streams]
        metrics = llm.metrics()
    assert metrics.compiles == 0
    assert sum(metrics.requests.values()) == 100
    assert all(result.outputs[0].finish_reason in ("stop", "length", "abort") for result in results)


def test_the_counter_sees_a_compilation(make_llm):
    with make_llm("both=1") as llm:
        jax.jit(lambda x: x * 3 + 1)(np.arange(7)).block_until_ready()
        assert llm.metrics().compiles > 0


def test_a_late_eos_does_not_cut_the_slots_next_tenant(make_llm):
    """One slot: the step that was in flight when "a" stopped still samples for the slot that "b" then has."""
    with make_llm("both=1", max_num_seqs=1, decode_buckets=(1,)) as llm:
        (whole,) = llm.generate(PROMPTS[0], GREEDY)
        expected = llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].token_ids
        late = whole.outputs[0].token_ids[4]  # what the late step samples
        stopping = SamplingParams(
            temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(whole.outputs[0].token_ids[3], late)
        )
        guarded = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(late,))
        assert late not in expected
        for _ in range(5):
            first, second = llm.generate(PROMPTS[:2], [stopping, guarded])
            assert first.outputs[0].finish_reason == "stop", first.error
            assert second.outputs[0].token_ids == expected


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def raising(*args):
    raise RuntimeError("the device is on fire")


def test_a_step_that_always_raises_fails_its_requests_with_the_cause_and_the_engine_goes_on(make_llm):
    with make_llm("prefill=1,decode=1") as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
        programs = executor_of(llm).meshes[1].programs
        decode, programs.decode = programs.decode, dict.fromkeys(programs.decode, raising)
        failed = llm.generate(PROMPTS, GREEDY)
        assert {output.outputs[0].finish_reason for output in failed} == {"error"}
        assert all("on fire (after 3 tries)" in output.error for output in failed)
        programs.decode = decode
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected


@pytest.mark.parametrize("topology", ["prefill=1,decode=1", "both=1"])
def test_requests_survive_a_decode_step_that_raises_now_and_then(make_llm, topology):
    with make_llm(topology) as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
        programs, calls = executor_of(llm).meshes[-1].programs, []

        def sometimes(program):
            def run(*arguments):
                calls.append(None)
                return raising() if len(calls) in (4, 20) else program(*arguments)

            return run

        programs.decode = {key: sometimes(program) for key, program in programs.decode.items()}
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.metrics().retries >= 2


def test_requests_survive_a_step_that_raises_on_the_device(make_llm):
    with make_llm("prefill=1,decode=1") as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
        runner = executor_of(llm).meshes[1]
        device, decode = runner.plan.mesh.devices.flat[0], runner.programs.decode

        @jax.jit
        def poison(rows):
            return jax.pure_callback(raising, jax.ShapeDtypeStruct(rows.shape, rows.dtype), rows)

        calls = []

        def poisoned(program):
            def run(params, state, rows):
                calls.append(None)
                return program(params, state, poison(jax.device_put(rows, device)) if len(calls) == 3 else rows)

            return run

        runner.programs.decode = {key: poisoned(program) for key, program in decode.items()}
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.metrics().retries > 0


def test_a_transfer_that_raises_starts_only_its_request_again(make_llm):
    with make_llm("prefill=1,decode=1") as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
        runner = executor_of(llm).meshes[0]
        gather, calls = runner.gather, []

        def once(*arguments):
            calls.append(None)
            return raising() if len(calls) == 2 else gather(*arguments)

        runner.gather = once
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.metrics().retries == 1


def test_a_scatter_that_raises_leaves_nothing_staged(make_llm):
    with make_llm("prefill=1,decode=1", max_retries=0) as llm:
        executor = executor_of(llm)
        scatter = executor.meshes[1].scatter
        executor.meshes[1].scatter = raising
        failed = llm.generate(PROMPTS, GREEDY)
        executor.meshes[1].scatter = scatter
        assert "error" in {output.outputs[0].finish_reason for output in failed}
        llm.generate(PROMPTS, GREEDY)
        assert not executor.num_staged


def test_a_lost_pool_is_let_go_before_a_new_one_is_made(make_llm):
    with make_llm("both=1", max_retries=0) as llm:
        mesh = executor_of(llm).meshes[0]
        alive, allocate, pool = [], mesh.programs.allocate, weakref.ref(mesh.state.kv[0].k)

        def allocating():
            alive.append(pool())
            return allocate()

        mesh.programs.allocate = allocating
        prefill, mesh.programs.prefill = mesh.programs.prefill, dict.fromkeys(mesh.programs.prefill, raising)
        assert llm.generate(PROMPTS[0], GREEDY)[0].error
        mesh.programs.prefill = prefill
        assert alive == [None]
        assert not llm.generate(PROMPTS[0], GREEDY)[0].error


def test_one_source_does_not_hold_back_what_another_sends(make_llm):
    with make_llm("prefill=2,decode=1") as llm:
        slow_down_prefill(llm)
        with recording(llm) as seen:
            late = llm.stream("the sea and the land " * 2, GREEDY)
            quick = [llm.stream(PROMPTS[2], GREEDY) for _ in range(2)]
            late.result()
        assert {ids(seen)[stream.request_id] for stream in quick} == set(ends(seen)[:2])


def ends(seen):
    """Requests in the order in which they ended."""
    return [action.request_id for action in seen if isinstance(action, Finish)]


def test_an_action_without_a_mesh_that_raises_stops_the_engine(make_llm):
    with make_llm("both=1") as llm:
        executor_of(llm).meshes[0].inputs.assign = raising
        (output,) = llm.generate(PROMPTS[0], GREEDY)
        assert output.outputs[0].finish_reason == "error"
        assert llm.metrics().requests == {"error": 1}


def test_an_internal_failure_ends_every_request_with_its_cause(make_llm):
    with make_llm("both=1") as llm:
        stream = llm.stream(PROMPTS[0], LONG)
        ask(llm, fail_to_decide)
        result = stream.result()
        assert result.outputs[0].finish_reason == "error"
        assert "on fire" in result.error
        with pytest.raises(EngineError, match="on fire"):
            llm.generate(PROMPTS, GREEDY)


def fail_to_decide(scheduler, executor):
    scheduler.actions = raising


def test_a_queue_longer_than_the_slots_is_served_in_full(make_llm):
    with make_llm("prefill=1,decode=1", kv_cache_bytes=300_000) as llm:
        outputs = llm.generate(PROMPTS * 10, GREEDY)
        assert [o.outputs[0].finish_reason for o in outputs] == ["length"] * 40
        for index, output in enumerate(outputs):
            assert output.outputs[0].token_ids == outputs[index % 4].outputs[0].token_ids


def test_time_stamps_come_from_one_clock(make_llm):
    with make_llm("both=1") as llm:
        start = time.monotonic()
        (output,) = llm.generate(PROMPTS[0], GREEDY)
        assert start <= output.timeline.arrival <= output.timeline.finish <= time.monotonic()


def test_a_question_is_answered_between_turns_and_its_errors_are_the_askers(make_llm):
    with make_llm("both=1") as llm:
        core = llm.engine.core
        assert core.inspect(lambda scheduler, executor: (len(scheduler.meshes), len(executor.meshes))) == (1, 1)
        with pytest.raises(RuntimeError, match="on fire"):
            core.inspect(raising)
        assert not llm.generate(PROMPTS[0], GREEDY)[0].error
    with pytest.raises(EngineError, match="closed"):
        core.inspect(raising)


def test_a_question_behind_the_engines_end_is_refused(make_llm):
    """The engine is held until both wait for it: the end, and behind it the question."""
    answers = []

    def ask_too_late(core):
        try:
            core.inspect(raising)
        except EngineError as error:
            answers.append(str(error))

    with make_llm("both=1") as llm:
        core, pause = llm.engine.core, Pause(llm, when=lambda requests: True)
        stream = llm.stream(PROMPTS[0], LONG)
        with pause:
            threads = [threading.Thread(target=work) for work in (llm.close, lambda: ask_too_late(core))]
            for thread in threads:
                before = core.backlog
                thread.start()
                while core.backlog == before:
                    thread.join(0.001)
        for thread in threads:
            thread.join()
        assert stream.result().outputs[0].finish_reason == "abort"
    assert answers == ["the engine is closed: make a new LLM."]


def test_an_observer_sees_messages_and_decisions_until_its_block_ends(make_llm):
    with make_llm("both=1") as llm:
        with recording(llm) as seen:
            (output,) = llm.generate(PROMPTS[0], GREEDY)
        assert isinstance(seen[0], tuple)
        assert sum(isinstance(message, StepResult) for message in seen) >= 12
        assert ends(seen) == [ids(seen)[output.request_id]]
        llm.generate(PROMPTS[0], GREEDY)
        assert ends(seen) == [ids(seen)[output.request_id]]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("when", ["received", "deciding", "decided"])
def test_an_observer_that_raises_stops_the_engine_with_its_cause(make_llm, kind, when):
    def burn(seen, *_):
        if getattr(seen, "requests", True):  # once a request is there
            raise kind("the device is on fire")

    burning = Observer()
    setattr(burning, when, burn)
    with make_llm("both=1") as llm:
        with llm.engine.core.observe(burning):
            output = llm.generate(PROMPTS[0], GREEDY)[0]
        assert output.outputs[0].finish_reason == "error"
        assert "on fire" in output.error


def test_requests_that_a_failing_policy_meets_are_answered_with_the_engines_end(make_llm):
    class Brittle(FirstComeFirstServed):
        name = "brittle"

        def key(self, request):
            if request.prompt_len > 40:
                raise RuntimeError("too long for this policy")
            return request.number

    with make_llm(policy=Brittle()) as llm:
        requests = [list(range(3, 9)), list(range(3, 60)), list(range(3, 8))]
        streams = [llm.stream(prompt, GREEDY) for prompt in requests[:1]]
        outputs = llm.generate(requests[1:], GREEDY)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]
        assert "too long for this policy" in outputs[0].error
        assert streams[0].result().outputs[0].finish_reason in ("length", "error")
