"""The start of an engine whose meshes live in workers: what its driver does, which touches no device.

In phases, so that what is wrong on one machine shows before another has loaded anything: every worker checks, the
driver agrees with all on a configuration (the least length, the pools that fit), all load and compile at the same time.
Refusals are one sentence that names the worker. After a failure no worker is left.
"""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from ...kernels_pallas.quantized import QuantizedArray
from ...models.checkpoints.catalog import resolve_model
from ...models.checkpoints.open import open_checkpoint
from ...models.config import ModelConfig
from ...models.decoder import abstract_params
from ..chat.chat_format import ChatFormat
from ..config import EngineConfig, PoolSize
from ..core.engine_core import EngineCore
from ..host.progress import say
from ..options import EngineOptions
from ..protocol.results import Completion
from ..protocol.worker import WorkerBackend
from ..roles import uncovered
from ..scheduler.decision_log import RecordingScheduler, RunFacts
from ..scheduler.policy import check_policy, policy_named
from ..scheduler.scheduler import Scheduler
from ..sharding.weights import check_params
from ..sizing.defaults import defaults_for, engine_config
from ..sizing.heads import check_tp, model_on
from ..sizing.pools import size_pools
from ..topology import Topology
from ..worker.remote.crew import Crew
from ..worker.remote.groups import Groups
from ..worker.remote.processes import WorkerProcesses
from ..worker.remote.ray_actors import RayWorkers
from ..worker.remote.remote_executor import RemoteExecutor
from .build import Engine
from .decision_file import check_log, name_of, open_log
from .dtype import parse_dtype
from .worker_main import serve
from .worker_part import Agreed, Found, asked_options, merge_found, read_found, to_bytes, versions


def start_with_workers(options: EngineOptions, backend: WorkerBackend | None = None) -> Engine:
    """Start an engine whose meshes live in the workers that `options.workers` names, or of this `backend`.

    Raises:
        ValueError: anything wrong with the options or the model's files here, or with what a worker finds, in one
            sentence. No worker is left then.
    """
    parse_dtype(options.dtype)
    checkpoint = open_checkpoint(resolve_model(options.model), options.hf_overrides)
    tokenizer, chat_template = checkpoint.tokenizer(), checkpoint.chat_template()
    chat_format = ChatFormat(tokenizer, chat_template, options.tool_call_parser, options.reasoning_parser)
    topology, model = options.parsed_topology, checkpoint.config
    for spec in dict.fromkeys(topology.meshes):
        check_tp(model, spec)
    policy = policy_named(options.policy) if isinstance(options.policy, str) else options.policy
    check_policy(policy, engine_config(options, model, defaults_for("cpu", ""), "float32"))
    check_log(options.decision_log)
    with ExitStack() as opened:
        asked = to_bytes(asked_options(options))
        backend = _backend(options, topology) if backend is None else backend
        crew = Crew(backend, [asked] * len(backend.places), time.monotonic, options.worker_timeout)
        opened.callback(crew.close)
        if options.progress:
            say(f"starting {len(backend.places)} workers")
        found = [_read(crew, worker, data) for worker, data in enumerate(crew.check())]
        check_alike(crew, found)
        config, pools = _agree(options, model, crew, found)
        if options.progress:
            say("workers load the weights and compile")
        crew.load(to_bytes(Agreed(config, tuple(pools))), lambda worker, now: why_not(found[worker], now))
        log = None
        if options.decision_log is not None:
            log = open_log(options.decision_log, RunFacts(model, name_of(options.model), found[0].device_kind))
            opened.callback(log.close)
        scheduler = Scheduler(config, pools, policy) if log is None else RecordingScheduler(config, pools, log, policy)

        def make_executor(post: Callable[[Completion], None]) -> RemoteExecutor:
            check = _checker(model, config, found[0])
            return RemoteExecutor(crew, post, time.monotonic, check, lambda gone: why_over(topology, gone))

        core = EngineCore(scheduler, make_executor, time.monotonic, CrewCompilations(crew), log)
        opened.pop_all()  # the engine closes them from here on
    return Engine(core, config, tokenizer, chat_template, chat_format, options.profile_dir)


class CrewCompilations:
    """What was compiled in the workers after they began to serve; the crew is closed with its executor."""

    def __init__(self, crew: Crew) -> None:
        self._crew, self.coming = crew, ()

    @property
    def count(self) -> int:
        """Return how often."""
        return self._crew.compiled

    def prepare_masks(self) -> None:
        """Have all workers compile what masks over tokens need; it is no compilation that counts."""
        self._crew.prepare_masks()

    def close(self) -> None:
        """Do nothing."""


def _backend(options: EngineOptions, topology: Topology) -> WorkerBackend:
    """Make what starts the workers that the options name."""
    if options.workers == "ray":
        hosts = None if options.mesh_hosts is None else [host.strip() for host in options.mesh_hosts.split(",")]
        return RayWorkers(topology, serve, options.ray_address, hosts)
    divided = options.workers_per_mesh
    processes = WorkerProcesses(topology, per_mesh=divided)
    return processes if divided == 1 else Groups(processes, divided, lambda first: _free_address(), merge_found)


def _free_address() -> str:
    """Return an address of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def _read(crew: Crew, worker: int, data: bytes) -> Found:
    try:
        return read_found(data)
    except ValueError as error:
        raise ValueError(f"{crew.backend.name(worker)} is of another version: {error}") from None


def check_alike(crew: Crew, found: Sequence[Found]) -> None:
    """Refuse workers that are not what the driver and the first of them are."""
    here = versions()
    for worker, one in enumerate(found):
        name = crew.backend.name(worker)
        for what, version in one.versions.items():
            if version != here.get(what):
                raise ValueError(
                    f"{name} has {what} {version} and this process has {here.get(what)}: install the same everywhere."
                )
        first = found[0]
        if (one.platform, one.device_kind) != (first.platform, first.device_kind):
            raise ValueError(
                f"{name} has devices of kind {one.device_kind} ({one.platform}) and {crew.backend.name(0)} has "
                f"{first.device_kind} ({first.platform}): the meshes of one engine need devices of one kind."
            )
        if one.config.dtype != first.config.dtype:
            raise ValueError(
                f"{name} would compute in {one.config.dtype} and {crew.backend.name(0)} in {first.config.dtype}: "
                "name one dtype."
            )
        if replace(one.config, max_model_len=first.config.max_model_len) != first.config:
            raise ValueError(
                f"{name} finds other defaults for its devices, or other files, than {crew.backend.name(0)}: let the "
                "machines and the model's files be alike, or give buckets and lengths as options."
            )


def _agree(
    options: EngineOptions, model: ModelConfig, crew: Crew, found: Sequence[Found]
) -> tuple[EngineConfig, list[PoolSize]]:
    """Size all pools: with the least length that fits everywhere, unless one was asked for."""
    config = min((one.config for one in found), key=lambda config: config.max_model_len)
    budgets = {
        mesh: budget
        for place, one in zip(crew.places, found, strict=True)
        for mesh, budget in zip(place.meshes, one.budgets, strict=True)
    }
    meshes = config.topology.meshes
    models = [model_on(model, spec.tp) for spec in meshes]
    in_order = [budgets[mesh] for mesh in range(len(meshes))]
    return size_pools(config, models, in_order, found[0].staging_part, options.max_model_len)


def why_not(before: Found, data: bytes) -> str | None:
    """Return why a worker that was started again may not join: it is not as it was."""
    try:
        now = read_found(data)
    except ValueError as error:
        return str(error)
    if now.files != before.files:
        return "the model's files have changed since the engine started: start the engine anew."
    if now.versions != before.versions:
        return "another version was installed since the engine started: start the engine anew."
    if (now.platform, now.device_kind) != (before.platform, before.device_kind):
        return f"its devices are {now.device_kind} now and were {before.device_kind}."
    return None


def why_over(topology: Topology, gone: set[int]) -> str | None:
    """Return why an engine cannot go on without these meshes, None if it can."""
    missing = uncovered(spec.role for mesh, spec in enumerate(topology.meshes) if mesh not in gone)
    return None if missing is None else f"no mesh is left to {missing}"


def _checker(model: ModelConfig, config: EngineConfig, found: Found) -> Callable[[Mapping[str, Any]], None]:
    """Make what refuses parameters that cannot stand in for the present ones."""
    specs = abstract_params(model, jnp.dtype(config.dtype), found.kept).specs

    def check(new: Mapping[str, Any]) -> None:
        check_params(specs, new)
        for path, parameter in new.items():
            if isinstance(parameter, QuantizedArray):
                raise ValueError(
                    f"params[{path!r}] is quantised, which is not sent to workers: start the engine with "
                    "quantization='none', or without workers."
                )

    return check
