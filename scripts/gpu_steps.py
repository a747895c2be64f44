"""Whole steps on one GPU, for `gpu_suite.py`: a model's shapes with random weights, no engine around the programs."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.engine.config import EngineConfig, Topology
from twinmesh.engine.kv_cache import DeviceState, abstract_state
from twinmesh.engine.mesh import build_meshes
from twinmesh.engine.programs import MeshPlan, Programs, compile_programs
from twinmesh.engine.request_state import Float, Int
from twinmesh.engine.steps import ChunkColumn, DecodeColumn, PrefillInputs, decode_columns, prefill_columns
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope
from twinmesh.models.decoder import abstract_params
from twinmesh.scripts.gpu_bench import copy_bandwidth, matmul_rate, seconds
from twinmesh.scripts.gpu_budget import measure_budget

QWEN3_8B = ModelConfig(
    "qwen3", 151936, 4096, 12288, 32, 8, 128, 1e-6, False, 40960, (AttentionSpec(Rope(1e6)),) * 36, qk_norm=True
)
LLAMA_3_1_8B = ModelConfig(
    "llama", 128256, 4096, 14336, 32, 8, 128, 1e-5, False, 131072, (AttentionSpec(Rope(5e5)),) * 32
)
CONTEXT, PROMPT, BATCHES = 1024, 8192, (1, 8, 32, 128)
PROFILED = (1, 32)  # batches whose time is told apart
VLLM_MS = {1: 7.22, 8: 7.67}  # public figures of vLLM for Qwen3-8B on an H100, ms a decode step


type Facts = dict[str, Any]


def qwen3(scale: float) -> Iterator[Facts]:
    """Steps of Qwen3-8B's shapes."""
    yield from measure_steps(QWEN3_8B, scale) if scale == 1 else measure_steps(_small(QWEN3_8B), scale)


def llama(scale: float) -> Iterator[Facts]:
    """Steps of Llama-3.1-8B's shapes."""
    yield from measure_steps(LLAMA_3_1_8B, scale) if scale == 1 else measure_steps(_small(LLAMA_3_1_8B), scale)


def measure_steps(model: ModelConfig, scale: float) -> Iterator[Facts]:
    """Milliseconds of decode steps at several batches and of a prompt's prefill, and of what the ceilings allow.

    `floor_ms` of a decode step: the bytes of weights (of the embedding a step reads a few rows) and of the rows' KV,
    at the bandwidth of a copy. `of_matmul` of prefill: FLOPs of products and of causal attention, over the rate of a
    large product. `vllm_ms`: the public figure of another engine on an H100, not of this run.
    """
    context, prompt = max(64, int(CONTEXT * scale)), max(64, int(PROMPT * scale))
    plan = _plan(model, context, prompt)
    (programs,) = compile_programs([plan], progress=False)
    params = tuple(_random(spec.value, i) for i, spec in enumerate(plan.params.specs.values()))
    copy, rate = copy_bandwidth(4e9 * scale), matmul_rate(int(8192 * scale))
    yield {"copy_tb_s": copy / 1e12, "matmul_tflop_s": rate / 1e12}
    weights = sum(x.nbytes for x in params) - params[0].nbytes
    token = 4 * model.num_kv_heads * model.head_dim * model.num_layers
    for rows in BATCHES:
        call = _decode_call(plan, programs, params, rows, context)
        taken = seconds(call)
        floor = (weights + rows * context * token) / copy
        row: Facts = {"ms": 1e3 * taken, "floor_ms": 1e3 * floor, "of_floor": floor / taken}
        row |= {"dispatch_ms": 1e3 * dispatch_seconds(call), "weights_floor_ms": 1e3 * weights / copy}
        if model.family == "qwen3":
            row["vllm_ms"] = VLLM_MS.get(rows)
        yield {"decode": {str(rows): row}}
        if rows in PROFILED:
            text = programs.decode[rows, 1].as_text() or ""
            yield {"decode": {str(rows): {"budget": measure_budget(call, text, 1e3 * taken)}}}
    taken = seconds(_prefill_call(plan, programs, params, prompt))
    attention = 2.0 * model.num_layers * model.num_heads * model.head_dim * prompt**2
    flops = weights * prompt + attention  # two FLOPs for each of the weights' 2-byte numbers
    yield {"prefill": {"tokens": prompt, "ms": 1e3 * taken, "of_matmul": flops / taken / rate}}


def _plan(model: ModelConfig, context: int, prompt: int) -> MeshPlan:
    """One device, with a pool for the largest batch and for the prompt."""
    config = EngineConfig(
        Topology.parse("both=1"), max_model_len=max(prompt, context) + 64, max_num_seqs=BATCHES[-1],
        prefill_buckets=(prompt,), prefill_rows=1, decode_buckets=BATCHES,
    )  # fmt: skip
    pages = BATCHES[-1] * (context // config.page_size + 1) + prompt // config.page_size + 1
    (mesh,) = build_meshes(config.topology, jax.devices()[:1])
    state = abstract_state(model, config, (pages,), jnp.dtype(jnp.bfloat16), mesh)
    return MeshPlan(mesh, config.topology.meshes[0], model, abstract_params(model, jnp.bfloat16), config, state)


def _small(model: ModelConfig) -> ModelConfig:
    """Fewer layers and a smaller vocabulary, to try the suite."""
    return dataclasses.replace(model, layers=model.layers[:1], vocab_size=1024, hidden_size=256, intermediate_size=256)


def _random(spec: jax.ShapeDtypeStruct, seed: int) -> Array:
    # By rows of the first axis, as drawing takes several times the memory of what is drawn.
    draw = jax.jit(lambda key: (0.02 * jax.random.normal(key, spec.shape[1:])).astype(spec.dtype))
    if len(spec.shape) < 2:
        return jnp.ones(spec.shape, spec.dtype)
    block = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(seed), min(64, spec.shape[0])))
    repeats = (-(-spec.shape[0] // len(block)), *[1] * (block.ndim - 1))
    drawn: Array = jax.jit(lambda x: jnp.tile(x, repeats)[: spec.shape[0]])(block)
    return drawn


def _filled(plan: MeshPlan, programs: Programs, tables: np.ndarray) -> DeviceState:
    """A state with random KV and these page tables."""
    state: DeviceState = programs.allocate()
    noise = jax.jit(lambda x, key: jax.random.normal(key, x.shape[1:], x.dtype))
    kv = jax.tree.map(
        lambda x: jnp.stack([noise(x, key) for key in jax.random.split(jax.random.key(0), len(x))]), state.kv
    )
    placed = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), kv, state.kv)
    table = jax.device_put(tables.astype(np.int32), state.tables[0].sharding)
    return state._replace(kv=placed, tables=(table,))


def _decode_call(plan: MeshPlan, programs: Programs, params: Any, rows: int, context: int) -> Callable[[], Any]:
    config = plan.config
    used, pages = context // config.page_size + 1, plan.state.kv[0].k.shape[1]
    tables = np.zeros((config.max_num_seqs, config.max_pages), np.int32)
    tables[:, :used] = np.random.default_rng(0).permutation(pages)[: config.max_num_seqs * used].reshape(-1, used)
    inputs = np.zeros((rows, decode_columns(1, 1, config.page_size)), np.int32)
    inputs[:, DecodeColumn.SLOT], inputs[:, DecodeColumn.KV_LEN] = np.arange(rows), context
    inputs[:, DecodeColumn.FORCED] = 5
    inputs[:, len(DecodeColumn)] = tables[:rows, (context - 1) // config.page_size]
    return _chained(partial(programs.decode[rows, 1], params), _filled(plan, programs, tables), jnp.asarray(inputs))


def _prefill_call(plan: MeshPlan, programs: Programs, params: Any, prompt: int) -> Callable[[], Any]:
    config = plan.config
    row = np.zeros((1, prefill_columns(1, config.max_pages)), np.int32)
    row[0, : len(ChunkColumn)] = (0, prompt, prompt, 0, 1)  # in the order of ChunkColumn
    row[0, len(ChunkColumn) + len(Int) :] = np.arange(config.max_pages) % plan.state.kv[0].k.shape[1]
    tokens = np.random.default_rng(0).integers(0, plan.model.vocab_size, prompt)
    inputs = PrefillInputs(jnp.asarray(tokens, jnp.int32), jnp.asarray(row), jnp.zeros((1, len(Float)), jnp.float32))
    tables = np.zeros((config.max_num_seqs, config.max_pages), np.int32)
    return _chained(partial(programs.prefill[prompt], params), _filled(plan, programs, tables), inputs)


def _chained(step: Callable[..., Any], state: DeviceState, inputs: Any) -> Callable[[], Any]:
    """A step that takes its own state back."""
    held = [state]

    def call() -> Any:
        held[0], *rest = step(held[0], inputs)
        return rest

    return call


def dispatch_seconds(call: Callable[[], Any], calls: int = 8) -> float:
    """What the host takes to dispatch one call, while the device still has work."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        out = call()
        times.append(time.perf_counter() - start)
    jax.block_until_ready(out)
    return float(np.median(times))
