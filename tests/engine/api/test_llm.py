"""The engine end to end on a tiny model: what callers see."""

import _thread
import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers.dense import DenseModel
from helpers.tiny_gguf import write_tiny_gguf
from twinmesh import LLM, EngineError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PROMPTS = ["The cat", "On the other hand, " * 3, "a", "in the end there was only the sea"]


@pytest.fixture(scope="module")
def split(make_llm):
    with make_llm("prefill=1,decode=1") as llm:
        yield llm


@pytest.fixture(scope="module")
def both(make_llm):
    with make_llm("both=1") as llm:
        yield llm


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens_equal_dense_attention_over_the_whole_sequence(split, tiny_path):
    (output,) = split.generate(PROMPTS[1], GREEDY)
    assert output.outputs[0].token_ids == DenseModel(tiny_path).greedy(output.prompt_token_ids, 12)


def test_disaggregated_and_colocated_give_the_same_tokens_alone_and_in_a_batch(split, both):
    alone = [split.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    assert tokens(split.generate(PROMPTS, GREEDY)) == alone
    assert tokens(both.generate(PROMPTS, GREEDY)) == alone


@pytest.mark.parametrize("topology", ["prefill=2,decode=2", "both=2"])
def test_several_meshes_per_role_give_the_same_tokens(make_llm, split, topology):
    expected = tokens(split.generate(PROMPTS * 3, GREEDY))
    with make_llm(topology, prefill_buckets=(64,), decode_buckets=(4,)) as llm:
        assert tokens(llm.generate(PROMPTS * 3, GREEDY)) == expected


def test_meshes_may_share_a_device(make_llm, split):
    import jax

    with make_llm("prefill=1,decode=1", devices=jax.devices()[:1] * 2) as llm:
        assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(split.generate(PROMPTS, GREEDY))


def test_a_prompt_of_several_chunks_equals_one_chunk(make_llm, split):
    prompt = "the sea and the land " * 4
    assert len(split.tokenizer.encode(prompt)) > 32
    with make_llm("both=1", prefill_buckets=(16,)) as chunked:
        assert tokens(chunked.generate(prompt, GREEDY)) == tokens(split.generate(prompt, GREEDY))


def test_sampling_depends_on_seed_and_not_on_the_batch_or_topology(split, both):
    def sampled(seed):
        return SamplingParams(temperature=1.5, top_p=0.9, top_k=40, seed=seed, max_tokens=10, ignore_eos=True)

    alone = [split.generate(PROMPTS[0], sampled(seed))[0].outputs[0].token_ids for seed in range(4)]
    assert len({tuple(ids) for ids in alone}) > 1
    mixed = split.generate([PROMPTS[0]] * 4 + [PROMPTS[1]], [sampled(seed) for seed in range(4)] + [GREEDY])
    assert tokens(mixed)[:4] == alone
    assert tokens(both.generate([PROMPTS[0]] * 4, [sampled(seed) for seed in range(4)])) == alone


def test_requests_without_a_seed_differ(split):
    hot = SamplingParams(temperature=2.0, max_tokens=10, ignore_eos=True)
    first, second = tokens(split.generate([PROMPTS[0]] * 2, hot))
    assert first != second


def test_a_stop_token_ends_the_request_and_stays_out_of_the_text(split):
    (whole,) = tokens(split.generate(PROMPTS[0], GREEDY))
    stop = whole[5]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    completion = split.generate(PROMPTS[0], params)[0].outputs[0]
    end = whole.index(stop) + 1
    assert completion.token_ids == whole[:end]
    assert completion.finish_reason == "stop"
    assert completion.text == split.tokenizer.decode(whole[: end - 1])


def test_max_tokens_ends_with_length_and_the_context_bounds_it(split):
    (output,) = split.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=10_000, ignore_eos=True))
    assert output.outputs[0].finish_reason == "length"
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 128


def test_streamed_text_joins_to_the_result(split):
    stream = split.stream(PROMPTS[1], LONG)
    deltas = list(stream)
    (whole,) = split.generate(PROMPTS[1], LONG)
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text == stream.result().outputs[0].text
    assert [i for delta in deltas for i in delta.token_ids] == whole.outputs[0].token_ids
    assert [delta.finish_reason for delta in deltas][-2:] == [None, "length"]


def test_leaving_a_stream_aborts_its_request(make_llm):
    with make_llm("both=1") as llm:
        for _ in llm.stream(PROMPTS[0], LONG):
            break
        llm.generate(PROMPTS[0], GREEDY)
        assert llm.metrics().requests == {"abort": 1, "length": 1}


def test_abort_gives_the_tokens_so_far(split):
    stream = split.stream(PROMPTS[0], LONG)
    next(iter(stream))
    result = stream.result()
    assert result.outputs[0].finish_reason == "abort"
    assert 1 <= len(result.outputs[0].token_ids) < 100
    split.abort(stream.request_id)  # again, and of an unknown one: nothing happens
    split.abort("request-none")


def test_aborting_waiting_requests_frees_everything(split):
    streams = [split.stream(prompt, LONG) for prompt in PROMPTS * 4]
    for stream in streams:
        stream.close()
    assert {stream.result().outputs[0].finish_reason for stream in streams} <= {"abort", "length"}
    assert tokens(split.generate(PROMPTS[0], GREEDY)) == tokens(split.generate(PROMPTS[0], GREEDY))
    assert split.metrics().running == 0


def test_an_interrupt_in_generate_aborts_its_requests_and_the_engine_goes_on(make_llm):
    with make_llm("prefill=1,decode=1") as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY))
        submit, seen = llm.engine.core.submit, []

        def interrupting(submissions, **options):
            submit(submissions, **options)
            seen.extend(submissions)
            if len(seen) == 3:
                _thread.interrupt_main()

        llm.engine.core.submit = interrupting
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS * 4, LONG)
        llm.engine.core.submit = submit
        assert tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.metrics().running == 0
        assert llm.metrics().requests["abort"] == len(seen)


def test_as_completed_gives_results_while_there_is_no_job_yet(split):
    finished = []

    def jobs():
        yield PROMPTS[0], GREEDY
        while not finished:
            yield None
        yield PROMPTS[1], GREEDY

    for index, output in split.as_completed(jobs()):
        finished.append((index, output.prompt_token_ids))
    assert [index for index, _ in finished] == [0, 1]
    assert finished[1][1] == split.check_prompt(PROMPTS[1]).token_ids


def test_as_completed_keeps_at_most_the_window_in_the_engine(split):
    pulled = []

    def jobs():
        for index in range(10):
            pulled.append(index)
            yield PROMPTS[index % 4], GREEDY

    finished = 0
    for _ in split.as_completed(jobs(), window=3):
        finished += 1
        assert len(pulled) <= finished + 3
    assert finished == 10


def test_several_threads_share_the_engine(split):
    expected = tokens(split.generate(PROMPTS, GREEDY))
    results = {}

    def work(index):
        results[index] = tokens(split.generate(PROMPTS, GREEDY))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [expected] * 4


def test_prompts_come_as_text_ids_or_dicts(split):
    ids = split.tokenizer.encode(PROMPTS[0])
    forms = [PROMPTS[0], ids, {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}]
    first, *others = tokens(split.generate(forms, GREEDY))
    assert others == [first] * 3
    assert tokens(split.generate(np.array(ids), GREEDY)) == [first]


def test_chat_takes_one_conversation_or_many(split):
    conversation = [{"role": "user", "content": "the sea"}]
    (one,) = split.chat(conversation, GREEDY)
    two = split.chat([conversation, conversation], GREEDY)
    assert tokens(two) == tokens([one]) * 2
    assert one.prompt_token_ids == split.chat_prompt(conversation)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ("the sea " * 100, "max_model_len=128"),
        ([10_000], "outside 0 to"),
        ([-1], "outside 0 to"),
        ({"text": "a"}, "under 'prompt' or ids under 'prompt_token_ids'"),
        ({"prompt_token_ids": "a"}, "text or a list of token ids"),
        ({"prompt": "a", "prompt_ids": [5]}, "nothing else"),
        (b"abc", "text or a list of token ids"),
        (np.array([[5, 6]]), "text or a list of token ids"),
        ([1.5], "text or a list of token ids"),
    ],
)
def test_bad_prompts_are_refused_before_anything_starts(split, prompt, message):
    before = split.metrics()
    with pytest.raises(ValueError, match=message):
        split.generate(["fine", prompt], GREEDY)
    assert split.metrics().requests == before.requests


def test_sampling_params_must_match_the_prompts(split):
    with pytest.raises(ValueError, match="2 prompts and 3 sampling_params"):
        split.generate(PROMPTS[:2], [GREEDY] * 3)
    assert split.generate([], GREEDY) == []


def test_metrics_count_and_time_requests(make_llm):
    with make_llm("prefill=1,decode=1") as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
        metrics = llm.metrics()
    assert metrics.requests == {"length": 4}
    assert metrics.generated_tokens == 48
    assert metrics.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
    assert metrics.handoff_bytes > 0
    latencies = metrics.latencies
    assert [p.count for p in (latencies.ttft, latencies.tpot, latencies.e2e, latencies.handoff)] == [4] * 4
    assert latencies.itl.count == 4 * 11
    for output in outputs:
        line = output.timeline
        assert line.arrival <= line.prefill_start <= line.first_token <= line.finish
        assert line.tokens == sorted(line.tokens)


def test_close_aborts_what_runs_joins_threads_and_frees_memory(make_llm):
    import jax

    before_threads = set(threading.enumerate())
    gc.collect()
    before_bytes = sum(x.nbytes for x in jax.live_arrays())
    llm = make_llm("prefill=1,decode=1")
    assert set(threading.enumerate()) - before_threads
    stream = llm.stream(PROMPTS[0], LONG)
    llm.close()
    llm.close()
    assert stream.result().outputs[0].finish_reason in ("abort", "length")
    assert not set(threading.enumerate()) - before_threads
    gc.collect()
    assert sum(x.nbytes for x in jax.live_arrays()) == before_bytes
    with pytest.raises(EngineError, match="closed"):
        llm.generate(PROMPTS, GREEDY)
    with pytest.raises(EngineError, match="closed"):
        llm.check_health()
    llm.abort("request-0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "prefill=1"}, "no decode mesh"),
        ({"topology": "both=99"}, "needs 99 devices and JAX has 8"),
        ({"topology": "both=1xtp4"}, "6 query heads do not divide by 4"),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"max_model_len": 4096}, "context of 512"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"page_size": 0}, "page_size=0"),
        ({"kv_cache_bytes": 1000}, "lower max_model_len"),
        ({"decode_buckets": (4, 1)}, "decode_buckets"),
        ({"decode_buckets": (1, 2)}, "max_num_seqs=4"),
        ({"prefill_buckets": ()}, "prefill_buckets"),
        ({"decode_buckets": ()}, "decode_buckets"),
        ({"max_model_len": "12"}, "max_model_len='12'"),
        ({"max_num_seqs": "4"}, "max_num_seqs='4'"),
        ({"kv_cache_bytes": "1GB"}, "kv_cache_bytes='1GB'"),
        ({"kv_cache_bytes": -5}, "kv_cache_bytes=-5"),
        ({"seed": -1}, "seed=-1"),
        ({"devices": []}, "needs 2 devices: devices= lists 0"),
        ({"dtype": np.int8}, "is not supported"),
    ],
)
def test_options_that_cannot_work_are_refused(make_llm, changes, message):
    import jax

    jax.devices()  # JAX is in use from here on, with the 8 that the tests ask for
    with pytest.raises(ValueError, match=message):
        make_llm(**changes)


def test_a_context_nobody_asked_for_shrinks_to_the_memory(tiny_path):
    with LLM(tiny_path, page_size=16, max_num_seqs=1, prefill_buckets=(16,), kv_cache_bytes=100_000) as llm:
        assert llm.config.max_model_len < 512
        assert llm.config.max_model_len % 16 == 0


def test_a_page_larger_than_the_context_does_not_stretch_it(tiny_path):
    with LLM(tiny_path, page_size=1024, max_num_seqs=1, prefill_buckets=(16,), kv_cache_bytes=2 << 20) as llm:
        assert llm.config.max_model_len == 512


def test_sixteen_bit_types_run_too(make_llm):
    import jax.numpy as jnp

    for dtype in (jnp.bfloat16, "float16"):
        with make_llm("prefill=1,decode=1", dtype=dtype, prefill_buckets=(64,), decode_buckets=(4,)) as llm:
            assert [len(ids) for ids in tokens(llm.generate(PROMPTS, GREEDY))] == [12] * 4


def test_a_tokenizer_that_is_not_supported_is_refused_before_anything_starts(tmp_path):
    before = set(threading.enumerate())
    path = write_tiny_gguf(tmp_path / "other.gguf", metadata={"tokenizer.ggml.pre": "other"})
    with pytest.raises(ValueError, match="other"):
        LLM(path)
    assert set(threading.enumerate()) == before


def run_program(code, tiny_path, tmp_path):
    start = f"from twinmesh import LLM, SamplingParams\nMODEL = {str(tiny_path)!r}\n"
    # As many rows in a step of either kind, so that they share what samples.
    options = (
        "max_model_len=64, page_size=16, prefill_buckets=(16,), decode_buckets=(8,), kv_cache_bytes=1 << 20, "
        "dtype='float32'"
    )
    start += f"def make(topology): return LLM(MODEL, topology=topology, {options})\n"
    return subprocess.run([sys.executable, "-c", start + code], cwd=tmp_path, capture_output=True, text=True)


def test_a_program_may_end_with_requests_in_flight(tiny_path, tmp_path):
    code = (
        "llm = make('prefill=1,decode=1')\nstream = llm.stream('a', SamplingParams(max_tokens=50, ignore_eos=True))\n"
    )
    done = run_program(code + "raise SystemExit(3)", tiny_path, tmp_path)
    assert (done.returncode, done.stderr) == (3, "")


def test_an_engine_found_dropped_by_an_engines_own_thread_closes_without_waiting(make_llm):
    from twinmesh.engine.host.threads import EngineThread

    llm = make_llm("prefill=1,decode=1")
    thread = EngineThread(target=llm.close)
    thread.start()
    thread.join()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate(PROMPTS[0], GREEDY)


def test_it_runs_where_jax_makes_64_bit_numbers(tiny_path, tmp_path, split):
    code = (
        "import jax; jax.config.update('jax_enable_x64', True)\n"
        "p = [SamplingParams(temperature=t, seed=1, max_tokens=8, ignore_eos=True) for t in (0, 1)]\n"
        f"print([o.outputs[0].token_ids for o in make('prefill=1,decode=1').generate([{PROMPTS[0]!r}] * 2, p)])"
    )
    params = [SamplingParams(temperature=t, seed=1, max_tokens=8, ignore_eos=True) for t in (0, 1)]
    done = run_program(code, tiny_path, tmp_path)
    assert done.stdout.strip() == str(tokens(split.generate([PROMPTS[0]] * 2, params))), done.stderr


@pytest.mark.parametrize("window", [0, -1, 1.5])
def test_a_window_that_lets_nothing_in_is_refused(split, window):
    with pytest.raises(ValueError, match="window="):
        list(split.as_completed([(PROMPTS[0], GREEDY)], window=window))
