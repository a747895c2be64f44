"""Whole engines of tiny models with random weights, without files; and plain attention as what they must agree with.

    with make_engine(model_with_windows(None, 6), "prefill=1,decode=1") as llm:
        (output,) = llm.generate([5, 6, 7], greedy(10))
    assert Reference(llm.model).agrees([5, 6, 7], output.outputs[0].token_ids)

Prompts are token ids. Buckets are few and small, because compilation takes nearly all the time of a test.
"""

import contextlib
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from helpers.tiny_gguf import CHAT_TEMPLATE, TOKENIZER, TOKENS
from twinmesh import LLM, SamplingParams
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.core.inspection import Observer
from twinmesh.engine.kv_dtypes import parse_kv_dtypes
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.sharding.weights import Placer
from twinmesh.engine.sizing.cache_groups import groups
from twinmesh.engine.sizing.heads import model_on
from twinmesh.engine.sizing.memory_needs import page_bytes
from twinmesh.engine.startup.build import Engine, start_core
from twinmesh.engine.topology import Topology
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope
from twinmesh.models.decoder import abstract_params, bind, dense_hidden
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

OPTIONS = dict(
    dtype="float32", max_model_len=64, page_size=4, max_num_seqs=4, prefill_buckets=(16,), decode_buckets=(4,)
)


def model_with_windows(*windows, **changes):
    """Describe a model whose layers have these attention windows; it has 8 query heads and 2 key/value heads."""
    layers = tuple(AttentionSpec(Rope(1e4), window) for window in windows)
    return ModelConfig("llama", len(TOKENS), 32, 32, 8, 2, 8, 1e-5, False, 128, layers, **changes)


def random_weights(model, seed=0, dtype="float32"):
    """Draw an array for each path, scaled so that attention decides what comes next and tokens do not repeat."""
    random = np.random.default_rng(seed)
    specs = abstract_params(model, dtype).specs
    return {path: random.standard_normal(x.shape).astype(x.dtype) / 3 for path, (x, _) in specs.items()}


def make_engine(model, topology="both=1", *, weights=None, room=1.25, **changes):
    """Start an `LLM` of `model` whose pools hold `room` requests of full length.

    By default they are so few that requests get in each other's way wherever they can. `weights` default to
    `random_weights(model)`, `changes` are options of `LLM`.
    """

    memory = {} if "kv_cache_bytes" in changes else {"kv_cache_bytes": _bytes_for(model, topology, room, changes)}
    options = EngineOptions("", topology=topology, **({"dtype": "float32"} | OPTIONS | memory | changes))

    def load(dtype, meshes, formats):
        arrays = weights or random_weights(model, dtype=dtype)
        placers = [Placer(model, dtype, mesh) for mesh in meshes]
        return [tuple(placer.put(path, arrays[path]) for path in placer.specs) for placer in placers]

    core, config = start_core(model, "float32", load, options)
    tokenizer = tokenizer_from_gguf(TOKENIZER)
    engine = Engine(core, config, tokenizer, ChatTemplate(CHAT_TEMPLATE, tokenizer, name="tiny"))
    return LLM.from_engine(engine, seed=options.seed)


def _bytes_for(model, topology, requests, changes):
    """Compute the `kv_cache_bytes` of so many requests of full length on each mesh, and of hand-offs of one besides."""
    options = {name: value for name, value in (OPTIONS | changes).items() if name in OPTIONS and name != "dtype"}
    windows, dtype = [group.window for group in groups(model)], jnp.dtype(changes.get("dtype", "float32"))
    kv = parse_kv_dtypes(changes.get("kv_cache_dtype", "auto"), dtype.name)
    config = EngineConfig(Topology.parse(topology), windows=tuple(windows), dtype=dtype.name, kv=kv, **options)
    most = 0
    for spec in config.topology.meshes:
        sizes = page_bytes(model_on(model, spec.tp), config.page_size, config.kv_on(spec))
        whole = sum(config.most_pages(window) * size for window, size in zip(windows, sizes, strict=True))
        staging = sum(config.pages_to_send(window) * size for window, size in zip(windows, sizes, strict=True))
        most = max(most, math.ceil(requests * whole) + config.has_handoffs * staging)
    return most


class Reference:
    """Plain attention over whole sequences of up to `length` tokens, in float32."""

    def __init__(self, model, weights=None, length=64):
        graphdef, specs = abstract_params(model, jnp.float32)
        weights = weights or random_weights(model)
        self._params, self._length = tuple(jnp.asarray(weights[path], jnp.float32) for path in specs), length

        @jax.jit
        def logits(params, ids):
            decoder = bind(graphdef, params)
            return decoder.logits(dense_hidden(decoder, ids))

        self._logits = logits
        self.regret([1], [1])  # compiles now, and not while an engine counts compilations

    def regret(self, prompt, tokens):
        """Return by how much the tokens' logits fall short of the best, at most; 0: greedy sampling gives them."""
        ids = np.zeros(self._length, np.int32)
        ids[: len(prompt) + len(tokens)] = [*prompt, *tokens]
        rows = np.asarray(self._logits(self._params, ids))[len(prompt) - 1 :][: len(tokens)]
        return float((rows.max(-1) - rows[np.arange(len(tokens)), tokens]).max())

    def agrees(self, prompt, tokens):
        """Return whether greedy sampling gives these tokens."""
        return self.regret(prompt, tokens) == 0


def greedy(max_tokens, **changes):
    """Ask for exactly `max_tokens` tokens, each the most likely one."""
    return SamplingParams(**dict(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False) | changes)


def prompts_of(*lengths, seed=0):
    """Draw random prompts of these lengths."""
    random = np.random.default_rng(seed)
    return [random.integers(3, len(TOKENS), length).tolist() for length in lengths]


def token_ids(outputs):
    """Return the token ids of each output's first completion."""
    return [output.outputs[0].token_ids for output in outputs]


def ask(llm, question):
    """Return `question(scheduler, executor)`, called between two turns of the engine's thread."""
    return llm.engine.core.inspect(question)


def executor_of(llm):
    """Return the executor, for tests that change what its meshes do while the engine is idle."""
    return ask(llm, lambda scheduler, executor: executor)


class Pause(Observer):
    """A pause of the engine's thread, which stops as soon as there are requests and `when(requests)` holds.

    The `with` block begins when the thread has stopped, and at its end the thread goes on. Messages queue up meanwhile.
    """

    def __init__(self, llm, when):
        self._when, self._stopped, self._go_on = when, threading.Event(), threading.Event()
        self._observing = contextlib.ExitStack()
        self._observing.enter_context(llm.engine.core.observe(self))

    def deciding(self, scheduler):
        if not self._stopped.is_set() and scheduler.requests and self._when(scheduler.requests.values()):
            self._stopped.set()
            self._go_on.wait(60)

    def __enter__(self):
        assert self._stopped.wait(60)

    def __exit__(self, *error):
        self._go_on.set()
        self._observing.close()


class Watch(Observer):
    """An observer of what `watching` yields: actions in `seen`, and numbers of pages in `most`."""

    def __init__(self):
        self.seen, self.most = [], {}

    def decided(self, scheduler, actions):
        self.seen.extend(actions)
        for request in scheduler.requests.values():
            for placement in filter(None, (request.placement, request.handoff and request.handoff.placement)):
                pages = [len(table.pages) + len(table.spare) for table in placement.tables]
                when = "decoding" if request.kv_len > request.to_prefill else request.state
                self.most[when] = list(map(max, self.most.get(when, pages), pages))


@contextlib.contextmanager
def watching(llm):
    """Yield what an engine does in the `with` block: its actions, and how many pages its requests hold at most.

    The latter are a dict: for each state of a request, and "decoding" for the time after its first decode step, the
    most pages of each cache group that a placement held.
    """
    watch = Watch()
    with llm.engine.core.observe(watch):
        yield watch.seen, watch.most


def assert_at_rest(llm):
    """Check that every page and slot is free, nothing is staged or listed, and the engine's threads are alive.

    Two short requests go through first: transfers leave a mesh in order, so what was sent before has arrived.
    """
    llm.generate(prompts_of(3, 3, seed=99), greedy(3))
    ask(llm, _check_at_rest)  # the dispatching thread answers, so it lives


def _check_at_rest(scheduler, executor):
    scheduler.check_integrity()
    assert not scheduler.requests
    assert not executor.records
    assert not executor.num_staged
    assert all(thread.is_alive() for thread in executor.threads)
    for mesh in scheduler.meshes:
        assert all(pages.num_free == pages.num_pages for pages in mesh.pages.groups)
        assert mesh.pages.slots.num_free == scheduler.config.max_num_seqs
        for left in (mesh.placed, mesh.computing, mesh.arriving, mesh.prefill_load):
            assert not left


def disturb(llm, stream, how, at):
    """Consume a stream to its end; its request is preempted or moved as it reaches each of these numbers of tokens."""
    seen = 0
    for delta in stream:
        before, seen = seen, seen + len(delta.token_ids)
        if any(before < number <= seen for number in at):
            getattr(llm, how)(stream.request_id)
    return stream.result()


def in_threads(count, work):
    """Run `work(index)` on `count` threads; return their results, or raise the first exception."""
    results = [None] * count
    errors = []

    def run(index):
        try:
            results[index] = work(index)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a caller's thread hangs"
    if errors:
        raise errors[0]
    return results
