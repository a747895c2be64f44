"""One mesh with a tiny random model, its programs compiled, and no engine around it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from helpers.shared_programs import SharedPrograms
from twinmesh.engine.config import EngineConfig, bucket_for
from twinmesh.engine.protocol.actions import Accept, AssignPages, Chunk, Decode, DecodeRow, Fused, Prefill
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sharding.weights import Placer
from twinmesh.engine.sizing.cache_groups import groups
from twinmesh.engine.sizing.heads import model_on
from twinmesh.engine.startup.compilation import Compilation
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.kv_cache import abstract_state
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.engine.worker.mesh_worker import MeshWorker
from twinmesh.engine.worker.request_records import RequestRecords
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope
from twinmesh.models.decoder import abstract_params, bind, dense_hidden

VOCABULARY = 50


def tiny_model(*windows):
    """Describe a model whose layers have these attention windows."""
    layers = tuple(AttentionSpec(Rope(1e4), window) for window in windows or (None, None))
    return ModelConfig("llama", VOCABULARY, 24, 32, 4, 2, 8, 1e-5, True, 128, layers)


def tiny_config(topology="both=1", model=None, **changes):
    options = dict(
        max_model_len=32, page_size=4, max_num_seqs=4, prefill_buckets=(16,), prefill_rows=3, decode_buckets=(1, 4),
        windows=tuple(group.window for group in groups(model or tiny_model())),
    )  # fmt: skip
    return EngineConfig(Topology.parse(topology), **(options | changes))


def tiny_weights(model):
    """Draw a float32 array for each path, large enough that sampled tokens differ."""
    random = np.random.default_rng(0)
    specs = abstract_params(model, jnp.float32).specs
    return {path: random.standard_normal(spec.value.shape).astype(np.float32) / 3 for path, spec in specs.items()}


def tiny_plans(config, model=None, pages=None):
    """A plan and the parameters of each mesh of the config's topology; `pages` of each cache group."""
    model, dtype = model or tiny_model(), jnp.dtype(config.dtype)
    weights, pages = tiny_weights(model), pages or (24,) * len(config.windows)
    plans, params = [], []
    for mesh, spec in zip(build_meshes(config.topology), config.topology.meshes, strict=True):
        own = model_on(model, spec.tp)
        described = abstract_params(own, dtype)
        state = abstract_state(own, config, pages, config.kv_on(spec), mesh)
        plans.append(MeshPlan(mesh, spec, model, described, config, state))
        placer = Placer(model, dtype, mesh)
        typed = {path: weights[path].astype(spec.value.dtype) for path, spec in described.specs.items()}
        params.append(tuple(placer.put(path, array) for path, array in typed.items()))
    return plans, params


def tiny_machines(config, model=None, pages=None, meshes=None):
    """Compile the programs of the topology's first `meshes` meshes (None: all of them).

    Return a function, of which each call makes a fresh `TinyMesh` of each.
    """
    plans, params = (x[:meshes] for x in tiny_plans(config, model, pages))
    programs = Compilation(plans, 2, make=SharedPrograms()).wait()
    return lambda: [TinyMesh(*parts) for parts in zip(plans, programs, params, strict=True)]


def dense_scores(model, tokens):
    """Compute log-probabilities after each token, [n, V], by plain attention over the whole sequence."""
    ids = np.zeros(64, np.int32)
    ids[: len(tokens)] = tokens
    return np.asarray(_dense(model)(ids))[: len(tokens)]


def greedy_tokens(model, prompt, count):
    """Generate tokens greedily, by plain attention over the whole sequence."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(dense_scores(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@functools.cache
def _dense(model):
    graphdef, specs = abstract_params(model, jnp.float32)
    weights = tiny_weights(model)
    params = tuple(jnp.asarray(weights[path]) for path in specs)

    @jax.jit
    def scores(ids):
        decoder = bind(graphdef, params)
        return jax.nn.log_softmax(decoder.logits(dense_hidden(decoder, ids)))

    return scores


GREEDY = SamplingPlan(temperature=0.0, seed=0)


class TinyMesh:
    """A mesh worker, and requests placed on it by hand: each slot and page is used once and never again."""

    def __init__(self, plan, programs, params):
        self.worker = MeshWorker(plan, programs, params)
        self.records, self.slots, self.config = RequestRecords(), {}, plan.config
        self.fresh = [iter(range(kv.k.shape[1])) for kv in plan.state.kv]
        self.steps = itertools.count()

    def place(self, name, prompt, plan=GREEDY, *, slot=None, pages=8, outputs=()):
        """Place a request in a slot of its own, with pages for `pages * page_size` tokens in every group."""
        self.accept(name, prompt, plan, outputs)
        self.slots[name] = len(self.slots) if slot is None else slot
        for group, fresh in enumerate(self.fresh):
            self.assign(name, group, 0, [next(fresh) for _ in range(pages)])

    def accept(self, name, prompt, plan=GREEDY, outputs=()):
        """Begin a run of a request that has generated `outputs` before."""
        self.records.accept(Accept(name, np.array(prompt, np.int32), plan, np.array(outputs, np.int32)))

    def assign(self, name, group, first, pages):
        self.worker.inputs.assign(AssignPages(0, self.slots[name], group, first, tuple(pages)))

    def chunk(self, name, start, length, *, is_last=True, write_from=0):
        return Chunk(name, 1, self.slots[name], start, length, write_from, is_last)

    def row(self, name, kv_len, *, is_forced=False):
        return DecodeRow(name, 1, self.slots[name], kv_len, is_forced)

    def prefill(self, *chunks):
        """Run a prefill step; return the token sampled for each chunk."""
        action = Prefill(0, next(self.steps), self.config.prefill_buckets[-1], chunks)
        return self.worker.prefill(action, self.records).to_host()[0][0].tolist()

    def decode(self, *rows, steps=1, bucket=None):
        """Run decode steps; return the tokens sampled, [steps][rows]."""
        bucket = bucket or bucket_for(len(rows), self.config.decode_buckets)
        action = Decode(0, next(self.steps), bucket, steps, rows)
        return self.worker.decode(action, self.records).to_host()[0].tolist()

    def fused(self, chunks, rows):
        """Run a fused step; return the tokens sampled, chunks before rows."""
        action = Fused(0, next(self.steps), self.config.prefill_buckets[-1], chunks, rows)
        return self.worker.fused(action, self.records).to_host()[0][0].tolist()

    def generate(self, name, count, chunk=16):
        """Generate tokens of one request that runs alone: prefill in chunks, and decode one by one."""
        length = len(self.records[name].prompt)
        for start in range(0, length, chunk):
            size = min(chunk, length - start)
            (token,) = self.prefill(self.chunk(name, start, size, is_last=start + size == length))
        tokens = [token]
        while len(tokens) < count:
            tokens.append(self.decode(self.row(name, length + len(tokens)))[0][0])
        return tokens
