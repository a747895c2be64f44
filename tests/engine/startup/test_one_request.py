"""An engine for one request: it has the sizes and programs that the request can come to, and gives the same tokens."""

import pytest
from helpers.core_engine import token_ids
from hypothesis import given
from hypothesis import strategies as st
from twinmesh import LLM, SamplingParams
from twinmesh.engine.api.resolve_sampling import resolve
from twinmesh.engine.config import EngineConfig, bucket_for
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.sampling.request_rows import Stage
from twinmesh.engine.startup.build import start_engine
from twinmesh.engine.startup.one_request import OneRequest
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.programs import Job

GREEDY = SamplingPlan(temperature=0.0, seed=0)


def config(topology="both=1", **changes):
    options = dict(max_model_len=8192, prefill_buckets=(64, 256, 512), decode_buckets=(1, 8, 32)) | changes
    return EngineConfig(Topology.parse(topology), **options)


def narrowed_for(prompt, **changes):
    request = OneRequest(prompt, 10, GREEDY)
    return request.narrow_prefill(request.narrow(config(**changes)))


@pytest.mark.parametrize(
    ("prompt", "prefill"),
    [
        (1, (64,)),
        (64, (64,)),
        (65, (256,)),
        (300, (512,)),
        (512, (512,)),
        (513, (64, 512)),
        (1100, (256, 512)),
        (1024, (512,)),
    ],
)
def test_it_has_the_sizes_in_which_the_prompt_is_cut(prompt, prefill):
    narrowed = narrowed_for(prompt)
    assert narrowed.prefill_buckets == prefill
    assert (narrowed.max_num_seqs, narrowed.decode_buckets) == (1, (1,))


@given(st.integers(1, 8000))
def test_each_chunk_runs_in_the_size_that_an_engine_for_many_gives_it(prompt):
    whole, narrowed = config(), narrowed_for(prompt)
    for start in range(0, prompt, whole.chunk_size):
        length = min(whole.chunk_size, prompt - start)
        assert length <= narrowed.chunk_size
        assert bucket_for(length, narrowed.prefill_buckets) == bucket_for(length, whole.prefill_buckets)


def test_the_smallest_decode_size_is_that_of_the_configuration():
    assert narrowed_for(5, decode_buckets=(8, 32)).decode_buckets == (8,)


def test_a_deterministic_engine_keeps_its_sizes():
    narrowed = narrowed_for(5, prefill_buckets=(512,), decode_buckets=(32,), deterministic=True)
    assert (narrowed.prefill_buckets, narrowed.decode_buckets) == ((512,), (32,))
    assert narrowed.max_num_seqs == 1


@pytest.mark.parametrize(
    ("plan", "stages"),
    [
        (GREEDY, set()),
        (SamplingPlan(temperature=1.0, seed=0), {Stage.DRAW}),
        (SamplingPlan(temperature=1.0, seed=0, top_p=0.9), {Stage.TOP_P, Stage.DRAW}),
        (SamplingPlan(temperature=1.0, seed=0, top_k=5), {Stage.TOP_K, Stage.DRAW}),
        (SamplingPlan(temperature=0.0, seed=0, repetition_penalty=1.5), {Stage.ADJUST, Stage.DRAW}),
        (SamplingPlan(temperature=0.0, seed=0, logprobs=2), {Stage.SCORE}),
    ],
)
def test_it_has_the_stages_of_sampling_that_the_request_runs(plan, stages):
    request = OneRequest(5, 10, plan)
    narrowed = request.narrow(config())
    assert {stage for stage in Stage if request.needs(narrowed, Job("sample", (stage, 8)))} == stages
    assert request.needs(narrowed, Job("load_dense")) == (Stage.ADJUST in stages)
    assert not request.needs(narrowed, Job("score", (64,)))
    assert not request.needs(narrowed, Job("copy_page", (0,)))
    assert request.needs(narrowed, Job("prefill", (64,)))
    assert request.needs(narrowed, Job("allocate"))


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (64, 1), (65, 4), (256, 4), (257, 16), (8000, 128), (10**6, 128)])
def test_it_has_the_transfers_that_its_tokens_fill(tokens, most):
    request = OneRequest(1, tokens - 1, GREEDY)
    narrowed = request.narrow(config("prefill=1,decode=1"))
    sizes = [size for size in narrowed.handoff_buckets if request.needs(narrowed, Job("gather", (1, size)))]
    assert sizes == [size for size in narrowed.handoff_buckets if size <= most]


OPTIONS = dict(
    max_model_len=128, page_size=16, max_num_seqs=4, prefill_buckets=(16, 64), decode_buckets=(1, 4), dtype="float32"
)
DRAWN = SamplingParams(temperature=0.9, top_p=0.8, top_k=30, seed=5, max_tokens=20, ignore_eos=True)


@pytest.mark.parametrize(
    ("topology", "length", "params"),
    [
        ("both=1", 5, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)),
        ("both=1", 70, DRAWN),
        ("both=1", 30, SamplingParams(temperature=0, repetition_penalty=1.3, min_tokens=20, max_tokens=20)),
        ("prefill=1,decode=1", 70, DRAWN),
        ("both(mode=fused)=1", 70, DRAWN),
        ("both=2", 70, DRAWN),
    ],
)
def test_it_gives_the_tokens_that_an_engine_for_many_gives(tiny_path, topology, length, params):
    prompt = [3 + index % 20 for index in range(length)]
    options = EngineOptions(tiny_path, topology=topology, kv_cache_bytes=4 << 20, **OPTIONS)

    def only(checkpoint):
        return OneRequest(length, params.max_tokens, resolve(params, checkpoint.tokenizer(), seed=0))

    with LLM.from_engine(start_engine(options, only)) as alone:
        tokens = token_ids(alone.generate(prompt, params))
        assert alone.metrics().compiles == 0
    with LLM.from_engine(start_engine(options)) as many:
        assert token_ids(many.generate(prompt, params)) == tokens
