"""Whole engines against plain attention: every kind of topology, a model with attention windows, pools that are too
small for what runs at once, so that requests preempt each other all the time.

Prompts are longer than the window (6) and than two chunks (16), and what is generated is several windows long.
"""

import contextlib
import threading

import jax
import numpy as np
import pytest
from helpers.core_engine import (
    Pause,
    Reference,
    ask,
    assert_at_rest,
    greedy,
    in_threads,
    make_engine,
    model_with_windows,
    prompts_of,
    random_weights,
    token_ids,
    watching,
)
from twinmesh import SamplingParams
from twinmesh.engine.protocol.actions import StartTransfer
from twinmesh.engine.scheduler.request import State

PAGE, WINDOW, LENGTH = 4, 6, 64
MIXED, WINDOWED = model_with_windows(None, WINDOW), model_with_windows(WINDOW)
KINDS = {
    "both": (MIXED, "both=1", {}),
    "split": (MIXED, "prefill=1,decode=1", {}),
    "fused": (MIXED, "both(mode=fused)=1", {}),
    "steps": (MIXED, "both=1", {"decode_steps": 4}),
    "tp2-tp4": (MIXED, "prefill=1xtp2,decode=1xtp4", {}),
    "tp4-tp1": (WINDOWED, "prefill=1xtp4,decode=1", {}),
}
SIMPLE = ["both", "split", "fused"]
PROMPTS = prompts_of(41, 3, 17, 33, 1, 26)


@pytest.fixture(scope="module")
def engines():
    """An engine of each kind, made when it is first asked for."""
    with contextlib.ExitStack() as stack:
        made = {}

        def engine(kind):
            if kind not in made:
                model, topology, options = KINDS[kind]
                made[kind] = stack.enter_context(make_engine(model, topology, **options))
            return made[kind]

        yield engine


@pytest.fixture(scope="module")
def references():
    return {model: Reference(model) for model in (MIXED, WINDOWED)}


@pytest.fixture
def reference(references, kind):
    return references[KINDS[kind][0]]


@pytest.fixture
def watched(engines):
    """An engine, and what it does from here on: see `watching`."""
    with contextlib.ExitStack() as stack:

        def watch(kind):
            llm = engines(kind)
            return llm, *stack.enter_context(watching(llm))

        yield watch


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_plain_attention(engines, reference, kind):
    llm = engines(kind)
    compiles = llm.metrics().compiles
    for _ in range(2):  # the second time prompts are cached, at least in part
        outputs = llm.generate(PROMPTS, greedy(22))
        assert all(map(reference.agrees, PROMPTS, token_ids(outputs)))
    assert llm.metrics().compiles == compiles
    assert_at_rest(llm)


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_prompt_and_a_single_token_are_served(engines, reference, kind):
    llm = engines(kind)
    (longest,) = prompts_of(LENGTH - 1, seed=1)
    prompts = [longest, *PROMPTS[:3]]
    outputs = llm.generate(prompts, greedy(1))
    outputs += llm.generate(longest, greedy(None))
    assert [len(ids) for ids in token_ids(outputs)] == [1] * 5
    assert all(map(reference.agrees, [*prompts, longest], token_ids(outputs)))
    assert_at_rest(llm)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_unused_pages_does_not_matter(engines, reference, kind):
    llm = engines(kind)
    llm.update_params({})  # empties the prefix cache
    ask(llm, lambda scheduler, executor: list(map(fill_with_nan, executor.meshes)))
    outputs = llm.generate(PROMPTS, greedy(22))
    assert all(map(reference.agrees, PROMPTS, token_ids(outputs)))


def fill_with_nan(mesh):
    def nan(pool):
        return jax.device_put(np.full(pool.shape, np.nan, pool.dtype), pool.sharding)

    mesh.state = mesh.state._replace(kv=jax.tree.map(nan, mesh.state.kv))


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_holds_no_more_pages_than_it_needs(watched, kind):
    llm, _, most = watched(kind)
    llm.update_params({})
    llm.generate(prompts_of(44, 41, 30, seed=2), greedy(20))
    config = llm.config
    assert most[State.PREFILL][-1] <= config.most_pages(WINDOW) < config.pages_for(44)
    assert most["decoding"][-1] <= config.pages_for(WINDOW + config.decode_steps - 1) + 1
    if config.windows[0] is None:
        assert most[State.PREFILL][0] == config.pages_for(44)
        assert most["decoding"][0] == config.pages_for(44 + 19)


@pytest.mark.parametrize("kind", ["split", "tp2-tp4", "tp4-tp1"])
@pytest.mark.parametrize("length", [3, 6, 16, 32, 34, 48])
def test_a_handoff_moves_no_more_than_the_window(watched, kind, length):
    llm, seen, _ = watched(kind)
    llm.update_params({})
    (prompt,) = prompts_of(length, seed=3)
    llm.generate(prompt, greedy(3))
    transfers = [action for action in seen if isinstance(action, StartTransfer)]
    config = llm.config
    windowed = [len(action.source_pages[-1]) for action in transfers]
    assert windowed == [0] * (len(transfers) - 1) + [config.pages_for(length) - max(0, length - WINDOW + 1) // PAGE]
    if config.windows[0] is None:
        assert sum(len(action.source_pages[0]) for action in transfers) == config.pages_for(length)
        assert (len(transfers) > 1) == (length > 2 * config.chunk_size)  # long prompts go in parts


@pytest.mark.parametrize("kind", ["both", "split", "tp2-tp4"])
def test_cached_prompts_give_the_same_tokens(engines, reference, kind):
    llm = engines(kind)
    llm.update_params({})
    compiles = llm.metrics().compiles
    first, other = prompts_of(2 * PAGE, 2 * PAGE, seed=4)
    (output,) = llm.generate(first, greedy(3))
    assert output.num_cached_tokens == 0
    for shared, cached in [(2 * PAGE, 2 * PAGE - 1), (2 * PAGE - 1, PAGE), (PAGE, PAGE), (PAGE - 1, 0)]:
        prompt = first[:shared] + other[shared:]
        (output,) = llm.generate(prompt, greedy(8))
        assert output.num_cached_tokens == cached
        assert reference.agrees(prompt, output.outputs[0].token_ids)
    assert llm.metrics().compiles == compiles


@pytest.mark.parametrize("kind", ["both", "split", "fused", "tp2-tp4"])
def test_a_preempted_request_finds_its_own_pages(watched, reference, kind):
    llm, seen, _ = watched(kind)
    llm.update_params({})
    (prompt,) = prompts_of(2 * PAGE, seed=5)
    before = llm.metrics()
    stream = llm.stream(prompt, greedy(12))
    for delta in stream:
        if delta.token_ids:
            llm.preempt(stream.request_id)
    result, after = stream.result(), llm.metrics()
    assert after.preemptions > before.preemptions
    assert after.compiles == before.compiles
    assert result.num_cached_tokens == 0
    assert reference.agrees(prompt, result.outputs[0].token_ids)
    chunks = [chunk for action in seen for chunk in getattr(action, "chunks", ())]
    assert any(chunk.write_from > 0 for chunk in chunks if chunk.run != chunks[0].run)
    (output,) = llm.generate(prompt, greedy(8))
    assert output.num_cached_tokens == 2 * PAGE - 1
    assert reference.agrees(prompt, output.outputs[0].token_ids)
    assert_at_rest(llm)


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("sampling", [dict(temperature=0), dict(temperature=1.0, top_p=0.9, seed=2**32 - 2)])
def test_three_completions_are_three_requests(engines, kind, sampling):
    llm = engines(kind)
    for prompt in prompts_of(21, 3, 2 * PAGE, 40, seed=6):
        options = dict(max_tokens=20, ignore_eos=True, detokenize=False) | sampling
        (together,) = llm.generate(prompt, SamplingParams(n=3, **options))
        seeds = [(sampling.get("seed", 0) + i) % 2**32 for i in range(3)]
        alone = llm.generate([prompt] * 3, [SamplingParams(**options | {"seed": seed}) for seed in seeds])
        assert [output.token_ids for output in together.outputs] == token_ids(alone)
        assert len({tuple(ids) for ids in token_ids(alone)}) == (1 if sampling["temperature"] == 0 else 3)
    assert_at_rest(llm)


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_abort_ends_all_completions(engines, kind, after):
    llm = engines(kind)
    (prompt,) = prompts_of(21, seed=7)
    stream = llm.stream(prompt, greedy(40, n=3))
    deltas, seen = iter(stream), 0
    while seen < after:
        seen += len(next(deltas).token_ids)
    llm.abort(stream.request_id)
    result = stream.result()
    assert [output.finish_reason for output in result.outputs] == ["abort"] * 3
    assert_at_rest(llm)


@pytest.mark.parametrize("kind", ["both", "split", "tp4-tp1"])
def test_new_weights_serve_what_comes_after_them_and_only_that(engines, reference, kind):
    llm, model = engines(kind), KINDS[kind][0]
    old_weights, new_weights = random_weights(model), random_weights(model, seed=1)
    newer = Reference(model, new_weights)
    compiles = llm.metrics().compiles
    pause = Pause(llm, when=lambda requests: all(request.confirmed for request in requests))
    before = llm.stream(PROMPTS[2], greedy(40, n=2))
    with pause:
        change = start_update_params(llm, new_weights)
        after = [llm.stream(prompt, greedy(20)) for prompt in PROMPTS]
    change.join()
    assert all(reference.agrees(PROMPTS[2], completion.token_ids) for completion in before.result().outputs)
    outputs = [stream.result() for stream in after]
    assert all(map(newer.agrees, PROMPTS, token_ids(outputs)))
    assert outputs[0].num_cached_tokens == 0
    llm.update_params(old_weights)
    assert llm.metrics().compiles == compiles
    assert_at_rest(llm)


def start_update_params(llm, weights):
    """Call `update_params` on a thread of its own; return when the call waits in a paused engine's inbox."""
    core = llm.engine.core
    before = core.backlog
    thread = threading.Thread(target=llm.update_params, args=(weights,), daemon=True)
    thread.start()
    while core.backlog == before:  # the engine's thread is stopped, so that nothing but this changes it
        thread.join(0.001)
        assert thread.is_alive()
    return thread


@pytest.mark.parametrize("kind", ["both", "split"])
def test_weights_change_again_and_again_under_load(engines, reference, kind):
    llm = engines(kind)
    old_weights, new_weights = random_weights(MIXED), random_weights(MIXED, seed=1)
    references = [reference, Reference(MIXED, new_weights)]
    compiles = llm.metrics().compiles

    def work(index):
        for _ in range(4):
            if index == 0:
                llm.update_params(new_weights)
                llm.update_params(old_weights)
                continue
            outputs = llm.generate(PROMPTS[:3], greedy(12))
            for prompt, tokens in zip(PROMPTS, token_ids(outputs), strict=False):
                assert any(reference.agrees(prompt, tokens) for reference in references)

    in_threads(3, work)
    outputs = llm.generate(PROMPTS, greedy(12))
    assert all(map(reference.agrees, PROMPTS, token_ids(outputs)))
    assert llm.metrics().compiles == compiles
    assert_at_rest(llm)


@pytest.mark.parametrize(
    ("dtype", "window", "options"),
    [
        ("bfloat16", 6, dict(page_size=1, max_num_seqs=1, decode_buckets=(1,), max_model_len=32)),
        ("float16", None, dict(page_size=64)),
    ],
)
def test_sixteen_bits_and_odd_pages(dtype, window, options):
    model = model_with_windows(window)
    weights = random_weights(model, dtype=dtype)
    reference = Reference(model, weights)
    prompts = prompts_of(10, 1, 17, 3, seed=8)
    with make_engine(model, "prefill=1,decode=1", weights=weights, dtype=dtype, **options) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, greedy(15))
            assert max(map(reference.regret, prompts, token_ids(outputs))) < 0.1
        (longest,) = prompts_of(llm.config.max_model_len - 1, seed=9)
        (output,) = llm.generate(longest, greedy(None))
        assert reference.regret(longest, output.outputs[0].token_ids) < 0.1
        assert_at_rest(llm)
