"""Measures whole steps on one GPU, for `gpu_suite.py`: a model's shapes, random weights, no engine."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.sampling.request_state import Float, Int
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sizing.cache_groups import groups
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.engine.worker.kv_cache import DeviceState, abstract_state
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.engine.worker.programs import Programs
from twinmesh.engine.worker.step_layout import ChunkColumn, DecodeColumn, PrefillInputs, decode_columns, prefill_columns
from twinmesh.kernels_pallas.tiles import length_class
from twinmesh.models.config import AttentionSpec, ClampedGate, Experts, ModelConfig, Rope
from twinmesh.models.decoder import AbstractParams, abstract_params
from twinmesh.models.quantized import Described, QuantizedArray, nbytes
from twinmesh.scripts.gpu.budget import measure_budget
from twinmesh.scripts.gpu.experts import random_quantized
from twinmesh.scripts.gpu.facts import Facts
from twinmesh.scripts.gpu.timing import copy_bandwidth, matmul_rate, noise, seconds

QWEN3_8B = ModelConfig(
    "qwen3", 151936, 4096, 12288, 32, 8, 128, 1e-6, False, 40960, (AttentionSpec(Rope(1e6)),) * 36, qk_norm=True
)
LLAMA_3_1_8B = ModelConfig(
    "llama", 128256, 4096, 14336, 32, 8, 128, 1e-5, False, 131072, (AttentionSpec(Rope(5e5)),) * 32
)
# Of GPT-OSS without YaRN's factors, which change no shape; every other layer has a window.
_FULL, _WINDOWED = AttentionSpec(Rope(1.5e5)), AttentionSpec(Rope(1.5e5), window=128)
GPT_OSS_20B = ModelConfig(
    "gpt_oss", 201088, 2880, 2880, 64, 8, 64, 1e-5, False, 131072, (_WINDOWED, _FULL) * 12, qkv_bias=True,
    output_bias=True, has_sinks=True, fits_float16=False,
    experts=Experts(32, 4, has_bias=True, clamped=ClampedGate(1.702, 7.0)),
)  # fmt: skip
GPT_OSS_120B = dataclasses.replace(
    GPT_OSS_20B,
    layers=(_WINDOWED, _FULL) * 18,
    experts=dataclasses.replace(cast(Experts, GPT_OSS_20B.experts), count=128),
)
CONTEXT, PROMPT, BATCHES = 1024, 8192, (1, 8, 32, 128)
PROFILED = (1, 32)  # batches whose time is broken down
VLLM_MS = {1: 7.22, 8: 7.67}  # public figures of vLLM for Qwen3-8B on an H100, ms a decode step


# Of gpt-oss-20b in MXFP4 on one GPU, output tokens/s with 3,000 requests of 1,000 in and 1,000 out queued at once.
PUBLIC_GPT_OSS = {
    "tokens_s": {"NVIDIA H100": 11557, "NVIDIA H200": 13858},
    "source": "TensorRT-LLM's performance page, read in 2026-11: whole requests, prefill included; not of this run",
}


def qwen3(scale: float) -> Iterator[Facts]:
    """Measure steps of Qwen3-8B's shapes."""
    yield from measure_steps(QWEN3_8B, scale)


def llama(scale: float) -> Iterator[Facts]:
    """Measure steps of Llama-3.1-8B's shapes."""
    yield from measure_steps(LLAMA_3_1_8B, scale)


def gpt_oss(scale: float) -> Iterator[Facts]:
    """Measure steps of GPT-OSS-20B's shapes with experts in MXFP4, beside public figures of another engine."""
    yield {"public": PUBLIC_GPT_OSS}
    yield from measure_steps(GPT_OSS_20B, scale)


def measure_steps(model: ModelConfig, scale: float) -> Iterator[Facts]:
    """Measure the milliseconds of decode steps at several batches and of a prompt's prefill, and compare with ceilings.

    `floor_ms` of a decode step: the time to read the weights (of the embedding, a step reads a few rows only; of
    experts as many as rows choose that choose evenly) and the rows' KV at the bandwidth of a copy. `tokens_s` are those
    of a step that follows the other without a pause. `of_matmul` of prefill: the rate of FLOPs of products and causal
    attention, over that of a large product. `vllm_ms`: the public figure of another engine on an H100, not of this run.
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
    reads = weight_reads(plan.params, model)
    seen = sum(min(context, layer.window or context) for layer in model.layers)
    cached = 4 * model.num_kv_heads * model.head_dim * seen
    tables = _tables(plan, context)
    held = [_filled(plan, made, tables)]  # one state for all, as two would not fit beside the weights
    calls, times = {}, {}
    for rows in BATCHES:
        inputs = _decode_inputs(plan, tables, rows, context)
        calls[rows] = partial(_step, partial(made.decode[rows], params), held, inputs)
        times[rows] = taken = seconds(calls[rows])
        weights = reads.step_bytes(rows)
        floor = (weights + rows * cached) / copy
        row: Facts = {"ms": 1e3 * taken, "floor_ms": 1e3 * floor, "of_floor": floor / taken, "tokens_s": rows / taken}
        row |= {"dispatch_ms": 1e3 * dispatch_seconds(calls[rows]), "weights_floor_ms": 1e3 * weights / copy}
        row |= {"vllm_ms": VLLM_MS.get(rows)} if model.family == "qwen3" else {}
        yield {"decode": {str(rows): row}}
    taken = seconds(partial(_step, partial(made.prefill[prompt], params), held, _prefill_inputs(plan, prompt)))
    visible = sum(prompt**2 if layer.window is None else 2 * prompt * layer.window for layer in model.layers)
    attention = 2.0 * model.num_heads * model.head_dim * visible
    # Two FLOPs for each number that a token is multiplied by; the head takes the last token only.
    flops = 2.0 * reads.token_numbers * prompt + 2.0 * reads.head_numbers + attention
    yield {"prefill": {"tokens": prompt, "ms": 1e3 * taken, "of_matmul": flops / taken / rate}}
    for rows in PROFILED:  # last, as a profiler may go on to cost something
        found = measure_budget(calls[rows], made.decode[rows].as_text() or "", 1e3 * times[rows])
        yield {"decode": {str(rows): {"budget": found}}}


def mxfp4_experts(model: ModelConfig) -> dict[str, str]:
    """Name the format of every expert's projections in MXFP4, by path."""
    return {f"layers.{i}.mlp.{name}_proj": "MXFP4" for i in range(model.num_layers) for name in ("gate", "up", "down")}


class Reads(NamedTuple):
    """What steps read of the weights, and multiply by."""

    whole_bytes: int  # that every decode step reads
    expert_bytes: int  # of all experts
    head_numbers: int
    token_numbers: int  # that a token is multiplied by, the head's apart
    experts: Experts | None

    def step_bytes(self, rows: int) -> float:
        """Count the bytes that a decode step reads, of experts on average if every choice is as likely."""
        if self.experts is None:
            return self.whole_bytes
        missed = (1 - self.experts.per_token / self.experts.count) ** rows
        return self.whole_bytes + self.expert_bytes * (1 - missed)


def weight_reads(params: AbstractParams, model: ModelConfig) -> Reads:
    """Count what decode steps read, all but the embedding, and what tokens are multiplied by."""
    values = {name: spec.value for name, spec in params.specs.items() if name != "embedding.weight"}
    numbers = {name: math.prod(value.shape) for name, value in values.items()}
    stacks = {name for name, spec in params.specs.items() if spec.axes[0] == "experts" and len(spec.axes) == 3}
    share = 1.0 if model.experts is None else model.experts.per_token / model.experts.count
    of_experts = sum(nbytes(values[name]) for name in stacks)
    head = numbers["head.weight"]
    dense = sum(count for name, count in numbers.items() if name not in stacks) - head
    return Reads(
        whole_bytes=sum(map(nbytes, values.values())) - of_experts,
        expert_bytes=of_experts,
        head_numbers=head,
        token_numbers=dense + round(share * sum(numbers[name] for name in stacks)),
        experts=model.experts,
    )


def random_params(plan: MeshPlan) -> tuple[Any, ...]:
    """Make small random weights, and ones for norms: every parameter, in the order in which steps take them."""
    return tuple(_random(spec.value, i) for i, spec in enumerate(plan.params.specs.values()))


def _random(value: Described, seed: int) -> Any:
    if isinstance(value, QuantizedArray):
        return random_quantized(value, seed)
    if len(value.shape) < 2:
        return jnp.ones(value.shape, value.dtype)
    return (0.02 * noise(value.shape, seed)).astype(value.dtype)


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
        windows=tuple(group.window for group in groups(model)),
    )  # fmt: skip
    pages = BATCHES[-1] * (context // config.page_size + 1) + prompt // config.page_size + 1
    (mesh,) = build_meshes(config.topology, jax.devices()[:1])
    # A window's pool is as large as the other, so that one table serves both: what a window has left is not read.
    state = abstract_state(model, config, (pages,) * len(config.windows), config.kv_on(config.topology.meshes[0]), mesh)
    params = abstract_params(model, jnp.bfloat16, None if model.experts is None else mxfp4_experts(model))
    return MeshPlan(mesh, config.topology.meshes[0], model, params, config, state)


def shrink(model: ModelConfig) -> ModelConfig:
    """Reduce layers and vocabulary, to try the suite quickly."""
    layers = model.layers[: 1 if model.experts is None else 2]
    return dataclasses.replace(model, layers=layers, vocab_size=1024, hidden_size=256, intermediate_size=256)


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
    return state._replace(kv=kv, tables=tuple(jax.device_put(tables, table.sharding) for table in state.tables))


def _decode_inputs(plan: MeshPlan, tables: np.ndarray, rows: int, context: int) -> Array:
    size, count = plan.config.page_size, len(plan.config.windows)
    inputs = np.zeros((rows, decode_columns(count, 1, size)), np.int32)
    inputs[:, DecodeColumn.SLOT], inputs[:, DecodeColumn.KV_LEN] = np.arange(rows), context
    inputs[:, DecodeColumn.FORCED] = 5
    written = inputs[:, len(DecodeColumn) :].reshape(rows, count, -1)  # of each cache group, its first pages
    written[:, :, 0] = tables[:rows, (context - 1) // size, None]
    return jnp.asarray(inputs)


def _prefill_inputs(plan: MeshPlan, prompt: int) -> PrefillInputs:
    config = plan.config
    count = len(config.windows)
    row = np.zeros((1, prefill_columns(count, config.max_pages)), np.int32)
    row[0, : len(ChunkColumn)] = (0, prompt, prompt, 0, 1)  # in the order of ChunkColumn
    row[0, len(ChunkColumn) + len(Int) :] = np.tile(np.arange(config.max_pages) % plan.state.kv[0].k.shape[1], count)
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
