"""vLLM's methods on an engine that runs: what they return is what vLLM's documentation says of them."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from helpers.dense import DenseModel
from twinmesh import LLM, AsyncLLM, BeamSearchParams, Counter, Gauge, Histogram, LLMEngine, SamplingParams

PROMPT = "the sea and the land"
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(make_llm):
    with make_llm("both=1") as llm:
        yield llm


def text_of(llm, prompt, params=GREEDY):
    return llm.generate(prompt, params)[0].outputs[0].text


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_beam_search_finds_what_a_search_over_dense_attention_finds(llm, tiny_path, penalty):
    dense, width, steps, prompt = DenseModel(tiny_path), 3, 4, llm.tokenizer.encode(PROMPT)
    eos = set(llm.tokenizer.eos_token_ids)

    def score(beam):
        return beam[1] / (len(beam[0]) - (beam[0][-1] in eos)) ** penalty

    beams, completed = [(prompt, 0.0)], []
    for _ in range(steps):
        new = []
        for tokens, total in beams:
            logprobs = dense.logprobs(tokens)[-1]
            for token in np.argsort(-logprobs, kind="stable")[: 2 * width].tolist():
                (completed if token in eos else new).append(([*tokens, token], total + logprobs[token]))
        beams = sorted(new, key=score, reverse=True)[:width]
    best = sorted(completed + beams, key=score, reverse=True)[:width]
    params = BeamSearchParams(beam_width=width, max_tokens=steps, length_penalty=penalty)
    (output,) = llm.beam_search([{"prompt": PROMPT}], params)
    assert [beam.tokens for beam in output.sequences] == [tokens for tokens, _ in best]
    np.testing.assert_allclose([beam.cum_logprob for beam in output.sequences], [total for _, total in best], atol=5e-3)
    assert output.sequences[0].text == llm.tokenizer.decode(output.sequences[0].tokens)


def test_beam_search_of_several_prompts_is_that_of_each_alone(llm):
    params = BeamSearchParams(beam_width=2, max_tokens=2)
    together = llm.beam_search([PROMPT, "a"], params, concurrency_limit=1)
    assert [out.sequences for out in together] == [llm.beam_search(p, params)[0].sequences for p in (PROMPT, "a")]
    with pytest.raises(ValueError, match="logprobs=22 is too many, and the engine has max_logprobs=20"):
        llm.beam_search(PROMPT, BeamSearchParams(beam_width=11, max_tokens=1))
    with pytest.raises(ValueError, match=r"of 3 tokens and max_tokens=126 of a beam .* max_model_len=128: lower"):
        llm.beam_search([[5, 6, 7]], BeamSearchParams(beam_width=2, max_tokens=126))
    with pytest.raises(ValueError, match="params of type SamplingParams are not usable: give BeamSearchParams"):
        llm.beam_search(PROMPT, GREEDY)
    with pytest.raises(ValueError, match="beam_width=0 is not usable"):
        BeamSearchParams(beam_width=0, max_tokens=1)


def test_an_llm_engine_is_driven_by_hand(llm):
    engine = llm.llm_engine
    assert isinstance(engine, LLMEngine)
    engine.add_request("0", PROMPT, GREEDY)
    engine.add_request("1", PROMPT, replace(GREEDY, max_tokens=100))
    assert engine.get_num_unfinished_requests() == 2
    engine.abort_request(["1"])
    ended = {}
    while engine.has_unfinished_requests():
        ended.update({output.request_id: output for output in engine.step() if output.finished})
    assert ended["0"].outputs[0].text == text_of(llm, PROMPT)
    assert ended["1"].outputs[0].finish_reason == "abort"
    assert engine.get_num_unfinished_requests() == 0


def test_prefixes_are_dropped_on_request_and_salted_ones_serve_their_own_salt_alone(llm):
    ids = list(range(40, 80))

    def cached(**prompt):
        return llm.generate({"prompt_token_ids": ids, **prompt}, GREEDY)[0].num_cached_tokens

    assert llm.reset_prefix_cache() is True
    assert [cached(), cached()] == [0, 32]
    assert [cached(cache_salt="a"), cached(cache_salt="b"), cached(cache_salt="a")] == [0, 0, 32]
    assert llm.reset_prefix_cache(reset_running_requests=True) is True
    assert [cached(), cached(cache_salt="a")] == [0, 0]
    assert llm.reset_prefix_cache() is True
    salted = {"prompt_token_ids": ids, "cache_salt": "a"}
    llm.beam_search(salted, BeamSearchParams(beam_width=1, max_tokens=1))
    assert [cached(), cached(cache_salt="a")] == [0, 32]


def test_metrics_are_counters_gauges_and_histograms(llm):
    (output,) = llm.generate(PROMPT, GREEDY)
    found = {metric.name: metric for metric in llm.get_metrics()}
    assert isinstance(found["twinmesh:generated_tokens"], Counter)
    assert found["twinmesh:generated_tokens"].value >= 6
    assert isinstance(found["twinmesh:requests_running"], Gauge)
    times = found["twinmesh:e2e_request_latency_seconds"]
    assert isinstance(times, Histogram)
    assert times.buckets["+Inf"] == times.count >= 1
    assert list(times.buckets.values()) == sorted(times.buckets.values())
    stats = output.metrics
    assert stats.num_generation_tokens == 6
    assert stats.arrival_time <= stats.scheduled_ts <= stats.first_token_ts <= stats.last_token_ts
    assert stats.first_token_latency == stats.first_token_ts - stats.arrival_time


def test_a_chat_shows_the_text_that_its_template_made(llm):
    (output,) = llm.chat([{"role": "user", "content": "sea"}], GREEDY, False)
    assert "sea" in output.prompt
    assert llm.tokenizer.encode(output.prompt, add_special=False) == output.prompt_token_ids


def test_default_parameters_can_be_assigned_to(llm):
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens, params.ignore_eos = 0.0, 6, True
    assert text_of(llm, PROMPT, params) == text_of(llm, PROMPT)
    assert llm.get_default_sampling_params() == SamplingParams()


def test_a_trace_of_jax_is_written_to_the_folder_of_the_options(llm, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", calls.append)
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    monkeypatch.setattr(llm, "engine", replace(llm.engine, profile_dir=tmp_path))
    llm.start_profile()
    llm.stop_profile()
    assert calls == [str(tmp_path), "stop"]


def test_ending_a_trace_that_was_not_begun_is_refused(llm):
    with pytest.raises(ValueError, match=r"^no trace is being written .*: call start_profile first\.$"):
        llm.stop_profile()


def test_a_trace_is_replayed_with_the_models_own_logprobs(llm):
    (output,) = llm.generate(PROMPT, replace(GREEDY, logprobs=3, max_tokens=8))
    made = output.outputs[0]
    params = SamplingParams(trace_decode_token_ids=made.token_ids, logprobs=3, max_tokens=2)
    other = replace(GREEDY, logprobs=None)
    (again,), (plain,) = llm.generate(PROMPT, params), llm.generate(PROMPT, other)
    replay = again.outputs[0]
    assert (replay.token_ids, replay.text, replay.finish_reason) == (made.token_ids, made.text, "length")
    assert (again.prompt, again.prompt_token_ids) == (output.prompt, output.prompt_token_ids)
    for at, known in zip(replay.logprobs, made.logprobs, strict=True):
        assert list(at) == list(known)
        assert [one.decoded_token for one in at.values()] == [one.decoded_token for one in known.values()]
        np.testing.assert_allclose([x.logprob for x in at.values()], [x.logprob for x in known.values()], atol=2e-3)
    assert plain.outputs[0].token_ids == made.token_ids[:6]
    foreign = replace(params, trace_decode_token_ids=[40] * 500, logprobs=None)
    mixed = llm.generate([PROMPT, PROMPT], [foreign, other])
    assert len(mixed[0].outputs[0].token_ids) == 127 - len(output.prompt_token_ids)
    assert set(mixed[0].outputs[0].token_ids) == {40}
    assert mixed[1].outputs[0].token_ids == plain.outputs[0].token_ids


def test_a_trace_is_refused_where_nothing_replays_it(llm):
    params = SamplingParams(trace_decode_token_ids=[5])
    with pytest.raises(ValueError, match=r"^trace_decode_token_ids are for LLM\.generate: "):
        llm.stream(PROMPT, params)
    with pytest.raises(ValueError, match=r"need at least one token, n=1 and no prompt_logprobs\.$"):
        replace(params, n=2)
    with pytest.raises(ValueError, match="trace_decode_token_ids holds token id 99999"):
        llm.generate(PROMPT, SamplingParams(trace_decode_token_ids=[99999]))


# ---- pauses


@pytest.fixture(scope="module")
def coroutines(llm):
    """The same engine for coroutines, which nobody closes."""
    return AsyncLLM.from_engine(llm.engine)


def test_a_request_stands_still_while_paused_and_goes_on_with_the_same_tokens(llm, coroutines):
    params = replace(GREEDY, max_tokens=40)
    expected = llm.generate(PROMPT, params)[0].outputs[0].token_ids

    async def run():
        outputs = coroutines.generate(PROMPT, params)
        await anext(outputs)
        await coroutines.pause_generation(mode="keep")
        flying = await asyncio.to_thread(llm.engine.core.inspect, lambda s, _: [m.in_flight for m in s.meshes])
        assert not any(flying)
        assert await coroutines.is_paused()
        with pytest.raises(ValueError, match=r'paused with mode="keep".*: call resume_generation first'):
            await coroutines.update_params({})
        later = asyncio.ensure_future(anext(coroutines.generate("a", GREEDY)))
        waiting = 0
        while waiting < 2:  # the new request has arrived
            waiting = await asyncio.to_thread(llm.engine.core.inspect, lambda scheduler, _: len(scheduler.requests))
        assert not later.done()
        await coroutines.resume_generation()
        assert not await coroutines.is_paused()
        await later
        async for output in outputs:
            last = output
        return list(last.outputs[0].token_ids)

    assert asyncio.run(run()) == expected


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_a_pause_waits_for_what_runs_or_aborts_it_and_holds_what_comes(llm, coroutines, mode):
    params = replace(GREEDY, max_tokens=60)

    async def run():
        running = coroutines.generate(PROMPT, params)
        await anext(running)
        await coroutines.pause_generation(mode=mode)
        later = asyncio.ensure_future(anext(coroutines.generate("a", GREEDY)))
        waiting = 0
        while not waiting:  # the new request has arrived, and nothing runs
            waiting = await asyncio.to_thread(llm.engine.core.inspect, lambda scheduler, _: len(scheduler.requests))
        assert await asyncio.to_thread(llm.engine.core.inspect, lambda scheduler, _: scheduler.is_drained)
        await coroutines.update_params({})
        assert not later.done()
        await coroutines.resume_generation()
        await later
        async for output in running:
            last = output
        return last.outputs[0]

    ended = asyncio.run(run())
    assert ended.finish_reason == ("length" if mode == "wait" else "abort")
    assert text_of(llm, PROMPT) == text_of(llm, PROMPT)


def test_a_pause_of_another_kind_is_refused(coroutines):
    with pytest.raises(ValueError, match="mode='sleep' is not usable"):
        asyncio.run(coroutines.pause_generation(mode="sleep"))


def test_an_engine_is_made_of_engine_args(tiny_path):
    from twinmesh import EngineArgs

    args = EngineArgs(
        model=tiny_path, max_model_len=128, block_size=16, max_num_seqs=4, max_num_batched_tokens=64,
        decode_buckets=(1, 4), kv_cache_memory_bytes=4 << 20, dtype="float32", enforce_eager=True,
    )  # fmt: skip
    with LLMEngine.from_engine_args(args) as engine:
        assert isinstance(engine, LLM)
        assert (engine.config.page_size, engine.config.prefill_buckets) == (16, (64,))
        assert engine.generate("a", GREEDY)[0].finished
