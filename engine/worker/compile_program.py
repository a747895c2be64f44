"""Compiles one program of a mesh: a step of one size, a stage of sampling, or one of the small ones around them.

Every program that changes a mesh's state has it donated, with the same sharding in and out: with another one, donation
would copy the pools. Which programs a mesh needs is `programs.py`'s business.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from ...models.decoder import Decoder, bind
from ..protocol.results import TokenScores
from ..sampling.allow import allow, words_for
from ..sampling.cuts import top_k, top_p
from ..sampling.logits_processors import adjust, empty_dense, load_dense
from ..sampling.logprobs import score, score_tokens
from ..sampling.request_rows import Stage
from ..sampling.request_state import DenseRows, DrawColumn, Float
from ..sampling.sampler import draw
from ..sharding.mesh import param_on, replicate_logits, replicated, sharding
from ..sharding.weights import Params
from .channel_scales import channel_scales, of_groups
from .jax_settings import own_settings
from .kv_cache import CHANNEL_AXES, DeviceState, KVCache, copy_page, fresh
from .kv_transfer import Staging, abstract_staging, gather, scatter, staged_pages
from .kv_transfer import plan as plan_route
from .mesh_plan import MeshPlan
from .step_layout import PrefillInputs, decode_columns, prefill_columns
from .steps import Passed, decode_step, decode_steps, fused_step, prefill_step

# XLA's options for GPUs that make all programs compute alike; not yet tried on a GPU.
_FIXED: dict[str, str | bool | int] = {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": "0"}
# Gate and up of a decode step are one product, which reads both weights where they are. In MB of weights.
_MERGED: dict[str, str | bool | int] = {"xla_gpu_dot_merger_threshold_mb": 1024}


def compile_program(plan: MeshPlan, kind: str, *size: Any) -> Compiled:
    """Compile one program for a mesh, as an engine would have it.

    `kind` is the name of a field of `Programs`, and `size` that field's key: ("prefill", tokens) or
    ("sample", stage, rows), for instance; nothing where the field is one program.
    """
    is_split_on_cpu = plan.mesh.size > 1 and plan.mesh.devices.flat[0].platform == "cpu"
    # Where a product is split between devices, `kernels_pallas/matmul.py` has to know.
    known = jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh) if is_split_on_cpu else nullcontext()
    with own_settings(), known:
        return _COMPILERS[kind](plan, *size)


def _compile_allocate(plan: MeshPlan) -> Compiled:
    described = plan.state, plan.dense

    def allocate() -> tuple[DeviceState, DenseRows]:
        return fresh(*described)

    return jax.jit(allocate, out_shardings=_shardings(described)).lower().compile()


def _compile_prefill(plan: MeshPlan, tokens: int) -> Compiled:
    def prefill(params: Params, state: DeviceState, inputs: PrefillInputs) -> tuple[DeviceState, Passed, jax.Array]:
        return prefill_step(_decoder(plan, params), plan.mesh, state, inputs)

    return _compile_step(plan, prefill, _prefill_inputs(plan, tokens))


def _compile_fused(plan: MeshPlan, tokens: int) -> Compiled:
    def fused(
        params: Params, state: DeviceState, inputs: PrefillInputs, rows: jax.Array
    ) -> tuple[DeviceState, Passed, jax.Array]:
        return fused_step(_decoder(plan, params), plan.mesh, state, inputs, rows)

    rows = _decode_rows(plan, plan.config.decode_buckets[-1], 1)
    return _compile_step(plan, fused, _prefill_inputs(plan, tokens), rows)


def _compile_decode(plan: MeshPlan, rows: int) -> Compiled:
    def decode(params: Params, state: DeviceState, rows: jax.Array) -> tuple[DeviceState, Passed]:
        return decode_step(_decoder(plan, params), plan.mesh, state, rows)

    return _compile_step(plan, decode, _decode_rows(plan, rows, 1), options=_MERGED)


def _compile_decode_steps(plan: MeshPlan, rows: int, steps: int) -> Compiled:
    def decode(params: Params, state: DeviceState, rows: jax.Array) -> tuple[DeviceState, jax.Array]:
        return decode_steps(_decoder(plan, params), plan.mesh, state, rows, steps)

    return _compile_step(plan, decode, _decode_rows(plan, rows, steps), options=_MERGED)


def _compile_sample(plan: MeshPlan, stage: Stage, rows: int) -> Compiled:
    arg, scalars = partial(_argument, plan.mesh), plan.state.scalars
    logits, drawn = arg((rows, plan.model.vocab_size), jnp.float32), arg((rows, len(DrawColumn)))
    stages: dict[Stage, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]] = {  # arguments; those donated
        Stage.ADJUST: (adjust, (plan.dense, scalars, drawn, logits), (0,)),
        Stage.TOP_K: (top_k, (scalars, drawn, logits), ()),
        Stage.TOP_P: (top_p, (scalars, drawn, logits), ()),
        Stage.DRAW: (draw, (scalars, drawn, logits), (0,)),
        Stage.SCORE: (score, (logits, arg((rows,))), ()),
    }
    function, arguments, donated = stages[stage]
    jitted = jax.jit(function, donate_argnums=donated, out_shardings=replicated(plan.mesh))
    return _compile(plan, jitted.lower(*arguments), {})


def _compile_allow(plan: MeshPlan, rows: int) -> Compiled:
    arg, vocabulary = partial(_argument, plan.mesh), plan.model.vocab_size
    masks, logits = arg((rows, words_for(vocabulary))), arg((rows, vocabulary), jnp.float32)
    jitted = jax.jit(allow, donate_argnums=0, out_shardings=replicated(plan.mesh))
    return _compile(plan, jitted.lower(plan.state.scalars, arg((rows, len(DrawColumn))), masks, logits), {})


def _decoder(plan: MeshPlan, params: Params) -> Decoder:
    return bind(plan.params.graphdef, params)


def _prefill_inputs(plan: MeshPlan, tokens: int) -> PrefillInputs:
    rows, config, arg = plan.config.prefill_rows, plan.config, partial(_argument, plan.mesh)
    columns = prefill_columns(len(config.windows), config.max_pages)
    return PrefillInputs(arg((tokens,)), arg((rows, columns)), arg((rows, len(Float)), jnp.float32))


def _decode_rows(plan: MeshPlan, rows: int, steps: int) -> Any:
    config = plan.config
    return _argument(plan.mesh, (rows, decode_columns(len(config.windows), steps, config.page_size)))


def _compile_step(
    plan: MeshPlan, step: Callable[..., Any], *inputs: Any, options: dict[str, str | bool | int] | None = None
) -> Compiled:
    """Compile a step that takes parameters, state and inputs, and returns the new state first; `options` of a GPU."""
    whole = replicated(plan.mesh)
    outputs = jax.eval_shape(step, _params(plan), plan.state, *inputs)
    out = (_shardings(plan.state), *(whole for _ in outputs[1:]))
    lowered = jax.jit(step, donate_argnums=1, out_shardings=out).lower(_params(plan), plan.state, *inputs)
    return _compile(plan, lowered, options or {})


def _compile(plan: MeshPlan, lowered: Lowered, options: Mapping[str, str | bool | int]) -> Compiled:
    """Compile for the mesh's devices; `options` are XLA's, for GPUs alone."""
    # Each mesh's programs are compiled separately, so autotuning could choose different kernels for two meshes.
    fixed = _FIXED if plan.config.deterministic else {}
    is_gpu = plan.mesh.devices.flat[0].platform == "gpu"
    return lowered.compile(compiler_options={**fixed, **options} if is_gpu else None)


def _params(plan: MeshPlan) -> Any:
    return tuple(param_on(plan.mesh, spec) for spec in plan.params.specs.values())


def _compile_score(plan: MeshPlan, tokens: int) -> Compiled:
    def score(params: Params, hidden: jax.Array, targets: jax.Array) -> TokenScores[jax.Array]:
        decoder = _decoder(plan, params)
        return score_tokens(lambda rows: replicate_logits(decoder.logits(rows), plan.mesh), hidden, targets)

    arg = partial(_argument, plan.mesh)
    hidden = arg((tokens, plan.model.hidden_size), plan.dtype)
    jitted = jax.jit(score, out_shardings=replicated(plan.mesh))
    return jitted.lower(_params(plan), hidden, arg((tokens,))).compile()


def _compile_load_dense(plan: MeshPlan) -> Compiled:
    dense, arg = plan.dense, partial(_argument, plan.mesh)
    row: DenseRows = jax.tree.map(lambda x: arg(x.shape[1:], x.dtype), empty_dense(1, plan.model.vocab_size))
    jitted = jax.jit(load_dense, donate_argnums=0, out_shardings=_shardings(dense))
    return jitted.lower(dense, arg(()), row).compile()


def _compile_gather(plan: MeshPlan, tp: int, bucket: int) -> Compiled:
    arg, state, mesh = partial(_argument, plan.mesh), plan.state, plan.mesh
    route = plan_route(plan.model.num_kv_heads, mesh.size, tp)
    pages, stored = staged_pages(plan.config, bucket), plan.converted_to
    out = _shardings(abstract_staging(state, mesh, route, pages, stored))
    jitted = jax.jit(partial(gather, mesh=mesh, route=route, stored=stored), out_shardings=out)
    scales = None if stored is None else _described_scales(plan)[1]
    return jitted.lower(state, tuple(arg((count,)) for count in pages), arg(()), scales).compile()


def _compile_scatter(plan: MeshPlan, tp: int, bucket: int) -> Compiled:
    arg, state, mesh = partial(_argument, plan.mesh), plan.state, plan.mesh
    pages = staged_pages(plan.config, bucket)
    staging: Staging = abstract_staging(state, mesh, plan_route(plan.model.num_kv_heads, tp, mesh.size), pages)
    jitted = jax.jit(partial(scatter, mesh=mesh), donate_argnums=0, out_shardings=_shardings(state))
    ids, tables = (
        tuple(arg((count,)) for count in counts) for counts in (pages, [table.shape[1] for table in state.tables])
    )
    return jitted.lower(state, staging, ids, arg(()), tables).compile()


def _compile_copy_page(plan: MeshPlan, group: int) -> Compiled:
    kv, arg = plan.state.kv[group], partial(_argument, plan.mesh)
    jitted = jax.jit(copy_page, donate_argnums=0, out_shardings=_shardings(kv))
    return jitted.lower(kv, arg(()), arg(())).compile()


def _compile_scales(plan: MeshPlan) -> Compiled:
    def scales(params: Params) -> tuple[tuple[KVCache, ...], tuple[KVCache, ...] | None]:
        return _scales(plan, params)

    return jax.jit(scales, out_shardings=_shardings(_described_scales(plan))).lower(_params(plan)).compile()


def _scales(plan: MeshPlan, params: Params) -> tuple[tuple[KVCache, ...], tuple[KVCache, ...] | None]:
    """Compute the channels' scales of the mesh's own pools, and of what it converts before it sends it."""
    decoder, sent = _decoder(plan, params), plan.converted_to
    found, model = channel_scales(decoder), decoder.config
    return of_groups(found, model, plan.kv), None if sent is None else of_groups(found, model, sent)


def _described_scales(plan: MeshPlan) -> Any:
    """Describe what `_scales` returns, by shapes and shardings."""
    described = jax.eval_shape(partial(_scales, plan), _params(plan))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(plan.mesh, CHANNEL_AXES)), described
    )


def _argument(mesh: Mesh, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.int32) -> Any:
    """Describe a replicated argument by shape and dtype; typed `Any`, because it is passed in place of an array."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))


def _shardings[T](tree: T) -> T:
    shardings: T = jax.tree.map(lambda x: x.sharding, tree)
    return shardings


_COMPILERS: dict[str, Callable[..., Compiled]] = {
    "allocate": _compile_allocate,
    "prefill": _compile_prefill,
    "fused": _compile_fused,
    "score": _compile_score,
    "decode": _compile_decode,
    "decode_steps": _compile_decode_steps,
    "sample": _compile_sample,
    "allow": _compile_allow,
    "gather": _compile_gather,
    "scatter": _compile_scatter,
    "copy_page": _compile_copy_page,
    "scales": _compile_scales,
    "load_dense": _compile_load_dense,
}
