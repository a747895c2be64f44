"""Every program a mesh runs, compiled at start-up: one per (step, bucket). Nothing compiles afterwards.

Compiled objects are called as they are, so a shape that was not foreseen raises instead of compiling.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled
from tqdm import tqdm

from ..models.config import ModelConfig
from ..models.decoder import AbstractParams, bind
from .config import EngineConfig, MeshSpec, Role
from .handoff import Staging, gather, scatter
from .kv_cache import DeviceState, KVCache, RequestState
from .mesh import replicated, sharding
from .sampling import SamplingInputs
from .steps import DecodeInputs, PrefillInputs, decode_step, prefill_step

# A model's parameters on one mesh, in the order of `AbstractParams.specs`.
type Params = tuple[jax.Array, ...]


@dataclass
class Programs:
    """One mesh's compiled programs, by bucket: tokens, rows, pages, pages. `allocate` makes a zeroed state."""

    allocate: Compiled
    prefill: dict[int, Compiled] = field(default_factory=dict)
    decode: dict[int, Compiled] = field(default_factory=dict)
    gather: dict[int, Compiled] = field(default_factory=dict)
    scatter: dict[int, Compiled] = field(default_factory=dict)


@dataclass(frozen=True)
class MeshPlan:
    """What is to run on one mesh: everything a program's shapes and shardings depend on."""

    mesh: Mesh
    spec: MeshSpec
    model: ModelConfig
    params: AbstractParams
    config: EngineConfig
    state: DeviceState


def compile_programs(plans: list[MeshPlan], *, progress: bool) -> list[Programs]:
    """Compile everything for every mesh, two programs at a time; `progress` shows a bar on stderr.

    Compiling releases the GIL, so a second thread helps; more would only hold more memory.
    """
    programs = [Programs(_compile_allocate(plan)) for plan in plans]
    jobs = [job for plan, target in zip(plans, programs, strict=True) for job in _jobs(plan, target)]
    with ThreadPoolExecutor(2) as pool, tqdm(total=len(jobs), desc="compiling", disable=not progress) as bar:
        for _ in pool.map(lambda job: job(), jobs):
            bar.update()
    return programs


def _compile_allocate(plan: MeshPlan) -> Compiled:
    def allocate() -> DeviceState:
        state: DeviceState = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), plan.state)
        return state

    return jax.jit(allocate, out_shardings=_shardings(plan.state)).lower().compile()


def _jobs(plan: MeshPlan, programs: Programs) -> Iterator[Callable[[], None]]:
    config, role = plan.config, plan.spec.role
    if plan.spec.prefills:
        yield from (partial(_compile_prefill, plan, programs, bucket) for bucket in config.prefill_buckets)
    if plan.spec.decodes:
        yield from (partial(_compile_decode, plan, programs, bucket) for bucket in config.decode_buckets)
    if role is Role.PREFILL:
        yield from (partial(_compile_gather, plan, programs, bucket) for bucket in config.handoff_buckets)
    if role is Role.DECODE:
        yield from (partial(_compile_scatter, plan, programs, bucket) for bucket in config.handoff_buckets)


def _compile_prefill(plan: MeshPlan, programs: Programs, tokens: int) -> None:
    rows, config = plan.config.prefill_rows, plan.config
    arg = partial(_argument, plan.mesh)
    inputs = PrefillInputs(
        tokens=arg((tokens,)),
        q_start=arg((rows + 1,)),
        kv_len=arg((rows,)),
        page_table=arg((rows, config.max_pages)),
        slot=arg((rows,)),
        sampling=SamplingInputs(
            temperature=arg((rows,), jnp.float32),
            top_p=arg((rows,), jnp.float32),
            top_k=arg((rows,)),
            seed=arg((rows,), jnp.uint32),
        ),
    )

    def prefill(params: Params, state: DeviceState, inputs: PrefillInputs) -> tuple[DeviceState, jax.Array]:
        return prefill_step(bind(plan.params.graphdef, params), plan.model, state, inputs)

    programs.prefill[tokens] = _compile_step(plan, prefill, inputs)


def _compile_decode(plan: MeshPlan, programs: Programs, rows: int) -> None:
    arg = partial(_argument, plan.mesh)
    inputs = DecodeInputs(arg((rows,)), arg((rows,)), arg((rows, plan.config.max_pages)))

    def decode(params: Params, state: DeviceState, inputs: DecodeInputs) -> tuple[DeviceState, jax.Array]:
        return decode_step(bind(plan.params.graphdef, params), plan.model, state, inputs)

    programs.decode[rows] = _compile_step(plan, decode, inputs)


def _compile_step(
    plan: MeshPlan, step: Callable[..., tuple[DeviceState, jax.Array]], inputs: PrefillInputs | DecodeInputs
) -> Compiled:
    """The state is donated with the same sharding in and out: otherwise donation would copy the pool."""
    params = tuple(
        jax.ShapeDtypeStruct(spec.value.shape, spec.value.dtype, sharding=sharding(plan.mesh, spec.axes))
        for spec in plan.params.specs.values()
    )
    out = (_shardings(plan.state), replicated(plan.mesh))
    return jax.jit(step, donate_argnums=1, out_shardings=out).lower(params, plan.state, inputs).compile()


def _compile_gather(plan: MeshPlan, programs: Programs, pages: int) -> None:
    arg = partial(_argument, plan.mesh)
    out = _shardings(_staging(plan, pages))
    lowered = jax.jit(gather, out_shardings=out).lower(plan.state, arg((pages,)), arg(()))
    programs.gather[pages] = lowered.compile()


def _compile_scatter(plan: MeshPlan, programs: Programs, pages: int) -> None:
    arg = partial(_argument, plan.mesh)
    jitted = jax.jit(scatter, donate_argnums=0, out_shardings=_shardings(plan.state))
    lowered = jitted.lower(plan.state, _staging(plan, pages), arg((pages,)), arg(()))
    programs.scatter[pages] = lowered.compile()


def _staging(plan: MeshPlan, pages: int) -> Staging:
    layers, _, *page = plan.state.kv.k.shape
    pool = plan.state.kv.k
    kv: Any = jax.ShapeDtypeStruct((layers, pages, *page), pool.dtype, sharding=pool.sharding)
    request: RequestState = jax.tree.map(lambda x: _argument(plan.mesh, (), x.dtype), plan.state.requests)
    return Staging(KVCache(kv, kv), request)


def _argument(mesh: Mesh, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.int32) -> Any:
    """The shape that stands for an array until there is one; `Any`, because it goes where arrays go."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))


def _shardings[T](tree: T) -> T:
    shardings: T = jax.tree.map(lambda x: x.sharding, tree)
    return shardings
