"""From `EngineOptions` to a running engine: everything that happens once, at start-up.

In this order, so that mistakes show before work is done and before the process is changed: the model's files, lengths
and buckets, whether the decision log can be written, devices and dtype, weights, the size of the KV pools, compilation
(on CPUs while the weights are loaded), the links between meshes, and last the log and the threads. Invariant: what
fails leaves nothing open, no thread and no emptied log. Three settings of JAX are the process's and stay: the number of
CPU devices, the part of a GPU's memory that its allocator holds, and the compilation cache.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ...kernels_pallas.cpu import loader
from ...kernels_pallas.cpu.threads import lower_pool_priority
from ...models.checkpoints.base import Checkpoint
from ...models.checkpoints.catalog import cache_directory, resolve_model
from ...models.checkpoints.host_memory import FileMaps
from ...models.checkpoints.open import open_checkpoint
from ...models.config import ModelConfig
from ...models.decoder import abstract_params
from ...models.text.chat import ChatTemplate
from ...models.text.tokenizer import Tokenizer
from ..chat.chat_format import ChatFormat
from ..config import EngineConfig, PoolSize
from ..core.engine_core import EngineCore
from ..host.progress import say
from ..options import EngineOptions
from ..protocol.results import Completion
from ..scheduler.decision_log import RecordingScheduler, RunFacts
from ..scheduler.policy import Policy, check_policy, policy_named
from ..scheduler.scheduler import Scheduler
from ..sharding.mesh import build_meshes, find_devices, products_on
from ..sharding.weights import Params, held, load_weights
from ..sizing.defaults import Defaults, compile_threads, defaults_for, engine_config
from ..sizing.device_memory import Share
from ..sizing.heads import check_tp, model_on
from ..sizing.memory_needs import request_bytes, transit_bytes
from ..sizing.pools import size_pools
from ..sizing.temporaries import temporary_bytes
from ..sizing.weight_sizes import weight_bytes
from ..topology import MeshSpec
from ..worker.jax_settings import own_settings
from ..worker.kv_cache import abstract_state
from ..worker.local_executor import LocalExecutor
from ..worker.mesh_plan import MeshPlan
from ..worker.mesh_worker import MeshWorker
from .compilation import Compilation, CompileCounter
from .decision_file import check_log, name_of, open_log
from .dtype import choose_dtype, parse_dtype, read_cpu_flags
from .gpu_memory import backend_has_started, check_share, request_share
from .kept_programs import kept_or_compiled
from .links import time_links, warn_if_staged
from .memory import check_room, give_back_freed, memory_for_kv
from .one_request import OneRequest
from .quantization import Quantized, asked_of, choose, cpu_kernels, file_lines, start_line

# Gives each mesh the parameters, those with a format quantised and all others in the dtype.
type Load = Callable[[jnp.dtype, Sequence[Mesh], Mapping[str, str]], list[Params]]


@dataclass(frozen=True)
class Engine:
    """A running engine and what its callers need around it."""

    core: EngineCore
    config: EngineConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    chat_format: ChatFormat | None = None  # how answers are read; None: as the template says
    profile_dir: str | Path = "twinmesh_profile"  # where traces go


def start_engine(options: EngineOptions, only: Callable[[Checkpoint], OneRequest] | None = None) -> Engine:
    """Start an engine: load the model, size the KV pools, compile, and run.

    With `only` the engine is for one request, which `only` describes once the model's files are open: it has what that
    request needs, and starts sooner.

    Raises:
        ValueError: anything wrong with the options, the model's files, the devices or the memory, in one sentence.
            Nothing stays open then, and an existing decision log is as it was.
    """
    if options.workers is not None:
        from .workers import start_with_workers  # which needs what is here

        return start_with_workers(options)
    parse_dtype(options.dtype)
    checkpoint = open_checkpoint(resolve_model(options.model), options.hf_overrides)
    options = replace(options, quantization=asked_of(options.quantization, checkpoint.method, checkpoint.name))
    tokenizer, chat_template = checkpoint.tokenizer(), checkpoint.chat_template()
    chat_format = ChatFormat(tokenizer, chat_template, options.tool_call_parser, options.reasoning_parser)
    request = None if only is None else only(checkpoint)
    maps = FileMaps() if options.mmap else None

    def load(dtype: jnp.dtype, meshes: Sequence[Mesh], formats: Mapping[str, str]) -> list[Params]:
        allowed = options.allow_nonfinite
        if options.progress:
            for line in file_lines(checkpoint, dtype):
                say(line)
        weights = load_weights(
            checkpoint, dtype, meshes, formats, progress=options.progress, allow_nonfinite=allowed, maps=maps
        )
        if options.progress and meshes[0].devices.flat[0].platform == "cpu":
            say(f"memory of weights: {held(weights, maps)}")
        return weights

    core, config = start_core(checkpoint.config, checkpoint.dtype, load, options, checkpoint.formats, maps, request)
    return Engine(core, config, tokenizer, chat_template, chat_format, options.profile_dir)


def start_core(
    model: ModelConfig,
    stored: DTypeLike,
    load: Load,
    options: EngineOptions,
    formats: Mapping[str, str] | None = None,
    maps: FileMaps | None = None,
    request: OneRequest | None = None,
) -> tuple[EngineCore, EngineConfig]:
    """Start an engine without files.

    `stored` is the checkpoint's own dtype, and `formats` its quantised parameters; `load` gives the parameters for each
    mesh as was chosen, which then lie in the files of `maps`. `options.model` is only a name. With `request` the engine
    is for this one alone. Raises as `start_engine` does.
    """
    with own_settings():
        if options.is_auto:
            options = _with_topology(options, model, stored, formats or {}, request)
        return _start_core(model, stored, load, options, formats or {}, maps, request)


def _start_core(
    model: ModelConfig,
    stored: DTypeLike,
    load: Load,
    options: EngineOptions,
    formats: Mapping[str, str],
    maps: FileMaps | None,
    request: OneRequest | None,
) -> tuple[EngineCore, EngineConfig]:
    for spec in dict.fromkeys(options.parsed_topology.meshes):
        check_tp(model, spec)
    config = engine_config(options, model, defaults_for("cpu", ""), "float32")
    policy = policy_named(options.policy) if isinstance(options.policy, str) else options.policy
    check_policy(policy, config)
    check_log(options.decision_log)
    share = request_share(options.memory_fraction, os.environ, has_started=backend_has_started())
    meshes = build_meshes(options.parsed_topology, options.devices)
    device = meshes[0].devices.flat[0]
    check_share(share, device.platform)
    config, defaults = configure(options, model, stored, device)
    if request is not None:
        config = request.narrow(config)
    dtype = jnp.dtype(config.dtype)
    is_cpu = device.platform == "cpu"
    specs = tuple(dict.fromkeys(config.topology.meshes))
    quantized = choose(options.quantization, formats, model, device.platform, specs, options.activations)
    config = replace(config, formats=quantized.formats, activations=options.activations)
    if is_cpu:  # while weights are read
        loader.compile_ahead(*cpu_kernels(model, dtype, quantized, config.kv_dtypes))
    if options.progress:
        say(start_line(quantized, dtype.name, config.kv))
    part, asked_len = defaults.staging_part, options.max_model_len
    check_room(name_of(options.model), model, config, meshes, share, part, asked_len, quantized)
    # A CPU's memory is that of its host, of which the weights' part is known: programs compile while they are loaded.
    weights = None if is_cpu else load(dtype, meshes, quantized.kept)
    to_load = _weight_bytes(model, dtype, quantized.kept, meshes) if is_cpu else 0
    config, pools = _size_pools(config, options, defaults, share, model, meshes, to_load, quantized.kept)
    if request is not None:
        config = request.narrow_prefill(config)
    plans = mesh_plans(model, config, quantized, meshes, pools)
    with ExitStack() as opened:
        compilation = begin_compiling(plans, options, config, request)
        opened.callback(compilation.close)
        workers = mesh_workers(
            plans, load(dtype, meshes, quantized.kept) if weights is None else weights, compilation, options.progress
        )
        core = _run(config, pools, workers, policy, compilation, options.decision_log, name_of(options.model), maps)
        opened.pop_all()  # the engine closes it from here on
        return core, config


def _with_topology(
    options: EngineOptions,
    model: ModelConfig,
    stored: DTypeLike,
    formats: Mapping[str, str],
    request: OneRequest | None,
) -> EngineOptions:
    """Choose the topology that was left to us, and say why; one request needs one mesh."""
    from .auto_topology import choose_topology  # with the whole simulator, for which no other start should wait

    one = replace(options, topology="both=1")
    share = request_share(options.memory_fraction, os.environ, has_started=backend_has_started())
    given = options.devices
    device = build_meshes(one.parsed_topology, None if given is None else given[:1])[0].devices.flat[0]
    check_share(share, device.platform)
    dtype = configure(one, model, stored, device)[0].dtype
    devices = list(given) if given is not None else find_devices()
    chosen = choose_topology(options, model, dtype, devices, share, formats, is_for_one=request is not None)
    if options.progress:
        say(f"topology {chosen.options.topology}: {chosen.why}")
    return chosen.options


def _weight_bytes(model: ModelConfig, dtype: jnp.dtype, formats: Mapping[str, str], meshes: Sequence[Mesh]) -> int:
    """Return the bytes of the weights of all CPU meshes together; those of one device hold them once."""
    sizes = [mesh.size for mesh in meshes if mesh.size > 1] + [1] * any(mesh.size == 1 for mesh in meshes)
    return sum(size * weight_bytes(model_on(model, size), dtype.name, size, formats) for size in sizes)


def begin_compiling(
    plans: Sequence[MeshPlan], options: EngineOptions, config: EngineConfig, request: OneRequest | None
) -> Compilation:
    """Begin to compile, or to read what is kept."""
    platform = plans[0].mesh.devices.flat[0].platform
    return Compilation(
        plans,
        compile_threads(len(os.sched_getaffinity(0))),
        make=kept_or_compiled(cache_directory() / "compiled", platform),
        needs=lambda job: request is None or request.needs(config, job),
        # Which size a step ran in could show in its bits.
        serve_early=options.serve_early and not config.deterministic,
    )


def mesh_workers(
    plans: Sequence[MeshPlan], weights: Sequence[Params], compilation: Compilation, progress: bool
) -> list[MeshWorker]:
    """Wait for the programs, allocate each mesh's pools, and time the links between meshes."""
    programs = compilation.wait(progress=progress)
    workers = [MeshWorker(*parts) for parts in zip(plans, programs, weights, strict=True)]
    if plans[0].mesh.devices.flat[0].platform != "cpu":  # there the host's memory is the device's
        for link in time_links(workers, time.monotonic):
            warn_if_staged(link)
    return workers


def _run(
    config: EngineConfig,
    pools: Sequence[PoolSize],
    workers: Sequence[MeshWorker],
    policy: Policy,
    compilation: Compilation,
    path: str | Path | None,
    name: str,
    maps: FileMaps | None,
) -> EngineCore:
    """Open the decision log, overwriting an earlier one, and start the threads; after a failure nothing stays open."""
    give_back_freed()
    if config.has_handoffs and workers[0].plan.mesh.devices.flat[0].platform == "cpu":
        lower_pool_priority()  # prompts of one mesh may not stop the tokens of another
    with ExitStack() as opened:

        def make_executor(post: Callable[[Completion], None]) -> LocalExecutor:
            made = LocalExecutor(workers, post, time.monotonic, maps)
            opened.callback(made.close)
            return made

        log = None if path is None else open_log(path, _facts(workers[0].plan, name))
        if log is not None:
            opened.callback(log.close)
        scheduler = Scheduler(config, pools, policy) if log is None else RecordingScheduler(config, pools, log, policy)
        compilations = CompileCounter(compilation)
        opened.callback(compilations.close)
        core = EngineCore(scheduler, make_executor, time.monotonic, compilations, log, own_settings)
        opened.pop_all()  # the engine closes them from here on
        return core


def _facts(plan: MeshPlan, name: str) -> RunFacts:
    """Say for the decision log what runs where."""
    return RunFacts(plan.model, name, plan.mesh.devices.flat[0].device_kind)


def configure(
    options: EngineOptions, model: ModelConfig, stored: DTypeLike, device: jax.Device
) -> tuple[EngineConfig, Defaults]:
    """Fill the gaps that the options leave as suits this kind of device, and choose the dtype."""
    defaults = defaults_for(device.platform, device.device_kind)
    if device.platform == "cpu":
        defaults = replace(defaults, has_kernels=loader.toolchain() is not None)
    dtype = choose_dtype(
        options.dtype,
        model,
        stored,
        platform=device.platform,
        cpu_flags=read_cpu_flags(),
        max_num_seqs=engine_config(options, model, defaults, "float32").max_num_seqs,
        deterministic=options.deterministic,
    )
    return engine_config(options, model, defaults, dtype.name), defaults


def _size_pools(
    config: EngineConfig,
    options: EngineOptions,
    defaults: Defaults,
    share: Share,
    model: ModelConfig,
    meshes: Sequence[Mesh],
    to_load: int,
    formats: Mapping[str, str],
) -> tuple[EngineConfig, list[PoolSize]]:
    """Size each mesh's pools. A max_model_len that was asked for must fit; one that was not shrinks until it does.

    `to_load`: bytes of weights that are not loaded yet; `formats`: path -> format, of those that stay quantised.
    """
    models, in_transit = [model_on(model, mesh.size) for mesh in meshes], transit_bytes(config)
    reserved = [
        request_bytes(on_mesh, config) + in_transit + temporary_bytes(on_mesh, config, mesh.size, formats)
        for on_mesh, mesh in zip(models, meshes, strict=True)
    ]
    budgets = memory_for_kv(meshes, options.kv_cache_bytes, reserved, share, to_load)
    return size_pools(config, models, budgets, defaults.staging_part, options.max_model_len)


def mesh_plans(
    model: ModelConfig,
    config: EngineConfig,
    quantized: Quantized,
    meshes: Sequence[Mesh],
    pools: Sequence[PoolSize],
) -> list[MeshPlan]:
    """Plan every mesh: its part of the model, and its state with so many pages."""
    return [
        mesh_plan(model, config, quantized, mesh, spec, pool)
        for mesh, spec, pool in zip(meshes, config.topology.meshes, pools, strict=True)
    ]


def mesh_plan(
    model: ModelConfig, config: EngineConfig, quantized: Quantized, mesh: Mesh, spec: MeshSpec, pool: PoolSize
) -> MeshPlan:
    """Plan one mesh."""
    on_mesh = model_on(model, mesh.size)
    state = abstract_state(on_mesh, config, pool.pages, config.kv_on(spec), mesh)
    products = products_on(mesh, quantized.activations)
    params = abstract_params(on_mesh, jnp.dtype(config.dtype), quantized.kept, products)
    return MeshPlan(mesh, spec, model, params, config, state)
