"""Measures whole steps on one GPU, for `gpu_suite.py`: a model's shapes, random weights, no engine."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.sampling.request_state import Float, Int
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.engine.worker.kv_cache import DeviceState, abstract_state
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.engine.worker.programs import Programs
from twinmesh.engine.worker.step_layout import ChunkColumn, DecodeColumn, PrefillInputs, decode_columns, prefill_columns
from twinmesh.kernels_pallas.tiles import length_class
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope
from twinmesh.models.decoder import AbstractParams, abstract_params
from twinmesh.models.quantized import nbytes
from twinmesh.scripts.gpu.budget import measure_budget
from twinmesh.scripts.gpu.facts import Facts
from twinmesh.scripts.gpu.timing import copy_bandwidth, matmul_rate, noise, seconds

QWEN3_8B = ModelConfig(
    "qwen3", 151936, 4096, 12288, 32, 8, 128, 1e-6, False, 40960, (AttentionSpec(Rope(1e6)),) * 36, qk_norm=True
)
LLAMA_3_1_8B = ModelConfig(
    "llama", 128256, 4096, 14336, 32, 8, 128, 1e-5, False, 131072, (AttentionSpec(Rope(5e5)),) * 32
)
CONTEXT, PROMPT, BATCHES = 1024, 8192, (1, 8, 32, 128)
PROFILED = (1, 32)  # batches whose time is broken down
VLLM_MS = {1: 7.22, 8: 7.67}  # public figures of vLLM for Qwen3-8B on an H100, ms a decode step


def qwen3(scale: float) -> Iterator[Facts]:
    """Measure steps of Qwen3-8B's shapes."""
    yield from measure_steps(QWEN3_8B, scale)


def llama(scale: float) -> Iterator[Facts]:
    """Measure steps of Llama-3.1-8B's shapes."""
    yield from measure_steps(LLAMA_3_1_8B, scale)


def measure_steps(model: ModelConfig, scale: float) -> Iterator[Facts]:
    """Measure the milliseconds of decode steps at several batches and of a prompt's prefill, and compare with ceilings.

    `floor_ms` of a decode step: the time to read the weights (of the embedding, a step reads a few rows only) and the
    rows' KV at the bandwidth of a copy. `of_matmul` of prefill: the rate of FLOPs of products and causal attention,
    over that of a large product. `vllm_ms`: the public figure of another engine on an H100, not of this run.
    `length_class` determines the tiles of both steps' attention: as in an engine, it is the class of the longest
    request that fits, not of the rows' context.
    """
    model = model if scale == 1 else shrink(model)
    context, prompt = max(64, int(CONTEXT * scale)), max(64, int(PROMPT * scale))
    plan = plan_for(model, context, prompt)
    made = _compiled(plan, prompt)
    copy, rate = copy_bandwidth(4e9 * scale), matmul_rate(int(8192 * scale))
    capacity = plan.config.max_pages * plan.config.page_size
    yield {"copy_tb_s": copy / 1e12, "matmul_tflop_s": rate / 1e12, "length_class": length_class(capacity)}
    params = random_params(plan)
    weights, products = weight_bytes(plan.params)
    token = 4 * model.num_kv_heads * model.head_dim * model.num_layers
    tables = _tables(plan, context)
    held = [_filled(plan, made, tables)]  # one state for all, as two would not fit beside the weights
    calls, times = {}, {}
    for rows in BATCHES:
        inputs = _decode_inputs(plan, tables, rows, context)
        calls[rows] = partial(_step, partial(made.decode[rows], params), held, inputs)
        times[rows] = taken = seconds(calls[rows])
        floor = (weights + rows * context * token) / copy
        row: Facts = {"ms": 1e3 * taken, "floor_ms": 1e3 * floor, "of_floor": floor / taken}
        row |= {"dispatch_ms": 1e3 * dispatch_seconds(calls[rows]), "weights_floor_ms": 1e3 * weights / copy}
        row |= {"vllm_ms": VLLM_MS.get(rows)} if model.family == "qwen3" else {}
        yield {"decode": {str(rows): row}}
    taken = seconds(partial(_step, partial(made.prefill[prompt], params), held, _prefill_inputs(plan, prompt)))
    attention = 2.0 * model.num_layers * model.num_heads * model.head_dim * prompt**2
    # Two FLOPs for each of the weights' 2-byte numbers; the head takes the last token only.
    flops = products * prompt + (weights - products) + attention
    yield {"prefill": {"tokens": prompt, "ms": 1e3 * taken, "of_matmul": flops / taken / rate}}
    for rows in PROFILED:  # last, as a profiler may go on to cost something
        found = measure_budget(calls[rows], made.decode[rows].as_text() or "", 1e3 * times[rows])
        yield {"decode": {str(rows): {"budget": found}}}


def weight_bytes(params: AbstractParams) -> tuple[int, int]:
    """Count the bytes of weights that a decode step reads whole, all but the embedding; with and without the head."""
    sizes = {name: nbytes(spec.value) for name, spec in params.specs.items()}
    read = sum(sizes.values()) - sizes["embedding.weight"]
    return read, read - sizes["head.weight"]


def random_params(plan: MeshPlan) -> tuple[Array, ...]:
    """Make small random weights, and ones for norms."""
    specs = jax.tree.leaves([spec.value for spec in plan.params.specs.values()])
    return tuple(
        jnp.ones(spec.shape, spec.dtype) if len(spec.shape) < 2 else (0.02 * noise(spec.shape, i)).astype(spec.dtype)
        for i, spec in enumerate(specs)
    )


def _compiled(plan: MeshPlan, prompt: int) -> Programs:
    """Compile the engine's programs for these steps, and no others, all at the same time."""
    sizes = [("allocate",), *(("decode", rows) for rows in BATCHES), ("prefill", prompt)]
    with ThreadPoolExecutor(len(sizes)) as pool:
        allocate, *decode, prefill = pool.map(lambda size: compile_program(plan, *size), sizes)
    return Programs(
        allocate,
        prefill={prompt: prefill},
        decode=dict(zip(BATCHES, decode, strict=True)),
    )


def plan_for(model: ModelConfig, context: int, prompt: int) -> MeshPlan:
    """Plan one device with a pool for the largest batch and for the prompt.

    Requests can be as long as the prompt, so that tiles are those of the 8k class, not of a higher one.
    """
    config = EngineConfig(
        Topology.parse("both=1"), max_model_len=max(prompt, context + 1), max_num_seqs=BATCHES[-1],
        prefill_buckets=(prompt,), prefill_rows=1, decode_buckets=BATCHES, dtype="bfloat16",
    )  # fmt: skip
    pages = BATCHES[-1] * (context // config.page_size + 1) + prompt // config.page_size + 1
    (mesh,) = build_meshes(config.topology, jax.devices()[:1])
    state = abstract_state(model, config, (pages,), config.kv_on(config.topology.meshes[0]), mesh)
    return MeshPlan(mesh, config.topology.meshes[0], model, abstract_params(model, jnp.bfloat16), config, state)


def shrink(model: ModelConfig) -> ModelConfig:
    """Reduce layers and vocabulary, to try the suite quickly."""
    return dataclasses.replace(model, layers=model.layers[:1], vocab_size=1024, hidden_size=256, intermediate_size=256)


def _tables(plan: MeshPlan, context: int) -> np.ndarray:
    """Make page tables [slots, max_pages] with scattered pages for every slot's context."""
    config = plan.config
    used, pages = context // config.page_size + 1, plan.state.kv[0].k.shape[1]
    tables = np.zeros((config.max_num_seqs, config.max_pages), np.int32)
    tables[:, :used] = np.random.default_rng(0).permutation(pages)[: config.max_num_seqs * used].reshape(-1, used)
    return tables


def _filled(plan: MeshPlan, made: Programs, tables: np.ndarray) -> DeviceState:
    """Make a state with random KV, filled in place, and these page tables."""
    allocate: Any = made.allocate
    state: DeviceState
    state, _ = allocate()

    def fill(kv: Any) -> Any:
        def draw(x: Array) -> Array:
            def layer(i: Array, x: Array) -> Array:
                return x.at[i].set(jax.random.normal(jax.random.fold_in(jax.random.key(0), i), x.shape[1:], x.dtype))

            drawn: Array = jax.lax.fori_loop(0, len(x), layer, x)
            return drawn

        return jax.tree.map(draw, kv)

    shardings = jax.tree.map(lambda x: x.sharding, state.kv)
    kv = jax.jit(fill, donate_argnums=0, out_shardings=shardings)(state.kv)
    return state._replace(kv=kv, tables=(jax.device_put(tables, state.tables[0].sharding),))


def _decode_inputs(plan: MeshPlan, tables: np.ndarray, rows: int, context: int) -> Array:
    size = plan.config.page_size
    inputs = np.zeros((rows, decode_columns(1, 1, size)), np.int32)
    inputs[:, DecodeColumn.SLOT], inputs[:, DecodeColumn.KV_LEN] = np.arange(rows), context
    inputs[:, DecodeColumn.FORCED] = 5
    inputs[:, len(DecodeColumn)] = tables[:rows, (context - 1) // size]
    return jnp.asarray(inputs)


def _prefill_inputs(plan: MeshPlan, prompt: int) -> PrefillInputs:
    config = plan.config
    row = np.zeros((1, prefill_columns(1, config.max_pages)), np.int32)
    row[0, : len(ChunkColumn)] = (0, prompt, prompt, 0, 1)  # in the order of ChunkColumn
    row[0, len(ChunkColumn) + len(Int) :] = np.arange(config.max_pages) % plan.state.kv[0].k.shape[1]
    tokens = np.random.default_rng(0).integers(0, plan.model.vocab_size, prompt)
    return PrefillInputs(jnp.asarray(tokens, jnp.int32), jnp.asarray(row), jnp.zeros((1, len(Float)), jnp.float32))


def _step(step: Callable[..., Any], held: list[DeviceState], inputs: Any) -> Any:
    """Run a step on the held state, and hold the state that it returns."""
    held[0], *rest = step(held[0], inputs)
    return rest


def dispatch_seconds(call: Callable[[], Any], calls: int = 8) -> float:
    """Measure the host's time to dispatch one call while the device still has work."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        out = call()
        times.append(time.perf_counter() - start)
    jax.block_until_ready(out)
    return float(np.median(times))
