"""One worker's part of an engine: what it checks, and then loads and compiles, as one process does for all meshes.

The driver asks with `Asked`, every worker answers with `Found`, and what the driver makes of all answers, `Agreed`,
goes to every worker, also to one that is started again later. In bytes these are msgspec's, of one version of Twinmesh:
`Found` says which. Invariant: nothing is loaded before all have checked, and what is loaded is what was agreed.
"""

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
from jax.sharding import Mesh

from ...kernels_pallas.cpu import loader
from ...kernels_pallas.cpu.threads import lower_pool_priority
from ...models.checkpoints.base import DESCRIPTION
from ...models.checkpoints.catalog import resolve_model
from ...models.checkpoints.host_memory import FileMaps, Stamp
from ...models.checkpoints.open import open_checkpoint
from ..config import EngineConfig, GpuShare, PoolSize
from ..options import EngineOptions
from ..protocol.service import SLO
from ..protocol.worker import Member, Place
from ..sharding.mesh import build_part, mesh_of
from ..sharding.spanning import spanned_devices
from ..sharding.weights import load_weights
from ..sizing.defaults import Defaults
from ..sizing.device_memory import Share
from ..sizing.heads import check_tp, model_on
from ..sizing.memory_needs import request_bytes, transit_bytes
from ..sizing.temporaries import temporary_bytes
from ..sizing.weight_sizes import weight_bytes
from ..topology import MeshSpec, Topology
from ..worker.mesh_worker import MeshWorker
from .build import begin_compiling, configure, mesh_plan, mesh_workers
from .compilation import CompileCounter
from .decision_file import name_of
from .dtype import parse_dtype
from .gpu_memory import backend_has_started, check_share, request_share
from .memory import check_room, give_back_freed, memory_for_kv
from .program_key import hash_sources
from .quantization import Quantized, asked_of, choose, cpu_kernels

_PACKAGE = Path(__file__).resolve().parents[2]
_VERSIONS = ("jax", "jaxlib", "numpy")
# Options that are the driver's alone, or that cannot cross.
_STAY = (
    "policy", "decision_log", "devices", "workers", "workers_per_mesh", "worker_timeout", "ray_address", "mesh_hosts",
    "progress", "seed", "profile_dir",
)  # fmt: skip


class Asked(msgspec.Struct, frozen=True):
    """What a worker is asked to check."""

    options: dict[str, Any]  # of `EngineOptions`, as plain data
    is_gpu_share: bool = False  # whether their memory_fraction is a `GpuShare`


class Found(msgspec.Struct, frozen=True):
    """What a worker has found, before it loads anything."""

    versions: dict[str, str]  # of Twinmesh's sources, Python and what computes
    platform: str
    device_kind: str
    config: EngineConfig  # as its devices suggest, before memory shortens `max_model_len`
    staging_part: int
    budgets: tuple[int, ...]  # bytes of each of its meshes for KV pages and staging
    kept: dict[str, str]  # parameters that stay quantised, and each one's format
    files: str  # what tells that the model's files are the same as at its last start


class Agreed(msgspec.Struct, frozen=True):
    """What all workers load and compile."""

    config: EngineConfig
    pools: tuple[PoolSize, ...]  # of all meshes


# What processes of one mesh must have found alike.
_ALIKE = {
    "versions": "versions", "platform": "devices", "device_kind": "devices", "config": "defaults for its devices",
    "staging_part": "defaults for its devices", "kept": "quantised weights",
}  # fmt: skip
# Of a directory; others, such as results that somebody writes there, may come and go.
_MODEL_FILES = ("config.json", "*.index.json", "*.safetensors", "*.gguf", DESCRIPTION)
_ENCODER = msgspec.msgpack.Encoder()


def to_bytes(message: Asked | Found | Agreed) -> bytes:
    """Encode for the messages of `protocol/worker.py`."""
    return _ENCODER.encode(message)


def read_found(data: bytes) -> Found:
    """Decode what a worker has found.

    Raises:
        ValueError: it is of another version of Twinmesh.
    """
    try:
        return msgspec.msgpack.decode(data, type=Found)
    except msgspec.DecodeError as error:
        raise ValueError(
            f"what it has found cannot be read here ({error}): install the same version of Twinmesh everywhere."
        ) from None


def merge_found(data: Sequence[bytes]) -> bytes:
    """Make of what the processes of one mesh have found what the mesh has: no more than each of them.

    Raises:
        ValueError: they are not alike.
    """
    found = list(map(read_found, data))
    first = found[0]
    for index, one in enumerate(found):
        for name, what in _ALIKE.items():
            if (here := getattr(one, name)) != (there := getattr(first, name)):
                raise ValueError(
                    f"process {index} of one mesh has other {what} than process 0 ({str(here)[:80]}, and "
                    f"{str(there)[:80]}): let the machines and the model's files be alike."
                )
    budgets = tuple(map(min, zip(*(one.budgets for one in found), strict=True)))
    return to_bytes(msgspec.structs.replace(first, budgets=budgets, files=" ".join(one.files for one in found)))


def versions() -> dict[str, str]:
    """Describe what has to be the same in all processes of an engine."""
    sources = hash_sources(_PACKAGE, float("inf")) or "unknown"
    named = {name: metadata.version(name) for name in _VERSIONS}
    return {"Twinmesh": sources[:12], "Python": platform.python_version(), **named}


def asked_options(options: EngineOptions) -> Asked:
    """Write options as plain data, those that concern workers.

    Raises:
        ValueError: one holds something else.
    """
    plain: dict[str, Any] = {}
    for name in options.__dataclass_fields__:
        value = getattr(options, name)
        if name in _STAY or value is None:
            continue
        if name == "model" or name == "topology":
            value = str(value)
        elif name == "dtype" and not isinstance(value, str):
            value = jnp.dtype(value).name
        elif name == "slo":
            value = msgspec.to_builtins(value)
        elif isinstance(value, GpuShare):
            value = float(value)
        try:
            _ENCODER.encode(value)
        except TypeError as error:
            raise ValueError(
                f"{name}={value!r} cannot be sent to workers ({error}): use plain numbers, texts, lists and dicts."
            ) from None
        plain[name] = value
    return Asked(plain, isinstance(options.memory_fraction, GpuShare))


def read_options(asked: Asked) -> EngineOptions:
    """Read what `asked_options` wrote."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in asked.options.items()
    }
    if "slo" in given:
        given["slo"] = msgspec.convert(given["slo"], SLO)
    if asked.is_gpu_share:
        given["memory_fraction"] = GpuShare(given["memory_fraction"])
    return EngineOptions(**given)


@dataclass(frozen=True)
class Loaded:
    """A worker's meshes, ready to run."""

    meshes: dict[int, MeshWorker]  # by number
    maps: FileMaps | None
    compilations: CompileCounter


def _let_decode_go_first(meshes: Sequence[MeshSpec]) -> None:
    """Prompts of one mesh may not stop the tokens of another, here or in another process on the same cores."""
    if not any(spec.decodes for spec in meshes):
        lower_pool_priority(only=None)
    elif any(spec.prefills for spec in meshes):
        lower_pool_priority()


class WorkerPart:
    """The start of one worker: `check`, and later `load`."""

    def __init__(self, asked: bytes, place: Place, member: Member | None = None) -> None:
        self._options = read_options(msgspec.msgpack.decode(asked, type=Asked))
        self.place, self._member = place, member

    def check(self) -> Found:
        """Check all that can be checked before anything loads.

        Raises:
            ValueError: the model's files, the devices or the memory here do not do, in one sentence.
        """
        parse_dtype(self._options.dtype)
        path = resolve_model(self._options.model)
        checkpoint = self._checkpoint = open_checkpoint(path, self._options.hf_overrides)
        asked = asked_of(self._options.quantization, checkpoint.method, checkpoint.name)
        options = self._options = replace(self._options, quantization=asked)
        for spec in dict.fromkeys(options.parsed_topology.meshes):
            check_tp(checkpoint.config, spec)
        share = request_share(options.memory_fraction, os.environ, has_started=backend_has_started())
        self._meshes = self._build_meshes(options.parsed_topology)
        device = self._meshes[0].devices.flat[0]
        check_share(share, device.platform)
        config, defaults = configure(options, checkpoint.config, checkpoint.dtype, device)
        specs = tuple(dict.fromkeys(config.topology.meshes))
        quantized = self._quantized = choose(
            options.quantization, checkpoint.formats, checkpoint.config, device.platform, specs, options.activations
        )
        config = replace(config, formats=quantized.formats, activations=options.activations)
        budgets = self._budgets(config, defaults, share, quantized)
        return Found(
            versions(), device.platform, device.device_kind, config, defaults.staging_part, budgets,
            dict(quantized.kept), files_stamp(path),
        )  # fmt: skip

    def load(self, agreed: bytes) -> Loaded:
        """Load the weights and compile the programs of this worker's meshes.

        Raises:
            ValueError: a tensor cannot be read, or is not as it should be.
        """
        plan = msgspec.msgpack.decode(agreed, type=Agreed)
        config, options = plan.config, self._options
        specs = config.topology.meshes
        model, quantized = self._checkpoint.config, self._quantized
        plans = [
            mesh_plan(model, config, quantized, mesh, specs[number], plan.pools[number])
            for number, mesh in zip(self.place.meshes, self._meshes, strict=True)
        ]
        maps = FileMaps() if options.mmap else None
        compilation = begin_compiling(plans, options, config, None)
        try:
            weights = load_weights(
                self._checkpoint, jnp.dtype(config.dtype), self._meshes, quantized.kept,
                progress=False, allow_nonfinite=options.allow_nonfinite, maps=maps,
            )  # fmt: skip
            workers = mesh_workers(plans, weights, compilation, False)
        except BaseException:
            compilation.close()
            raise
        give_back_freed()
        if config.has_handoffs and self._is_cpu:
            _let_decode_go_first([config.topology.meshes[mesh] for mesh in self.place.meshes])
        return Loaded(dict(zip(self.place.meshes, workers, strict=True)), maps, CompileCounter(compilation))

    def _build_meshes(self, topology: Topology) -> list[Mesh]:
        if self._member is None:
            return build_part(topology, self.place.meshes)
        (spec,) = (topology.meshes[number] for number in self.place.meshes)
        return [mesh_of(spec, spanned_devices(spec.tp, self._member.count))]

    @property
    def _is_cpu(self) -> bool:
        return bool(self._meshes[0].devices.flat[0].platform == "cpu")

    def _budgets(self, config: EngineConfig, defaults: Defaults, share: Share, quantized: Quantized) -> tuple[int, ...]:
        """Return bytes of each mesh here for KV, weights that are to come taken off; refuse a model that does not
        fit."""
        model, options, place = self._checkpoint.config, self._options, self.place
        if self._is_cpu:
            loader.compile_ahead(*cpu_kernels(model, jnp.dtype(config.dtype), quantized, config.kv_dtypes))
        check_room(
            name_of(options.model), model, config, self._meshes, share, defaults.staging_part, options.max_model_len,
            quantized, place.on_machine if self._is_cpu else place.meshes,
        )  # fmt: skip
        specs = config.topology.meshes
        weights = [
            weight_bytes(model_on(model, specs[number].tp), config.dtype, specs[number].tp, quantized.kept)
            for number in place.on_machine
        ]  # of each device
        own, in_transit = [model_on(model, mesh.size) for mesh in self._meshes], transit_bytes(config)
        aside = [
            request_bytes(on_mesh, config) + in_transit + temporary_bytes(on_mesh, config, mesh.size, quantized.kept)
            for on_mesh, mesh in zip(own, self._meshes, strict=True)
        ]
        if not self._is_cpu:  # there a device's memory is its own
            here = [place.on_machine.index(number) for number in place.meshes]
            aside = [size + weights[index] for size, index in zip(aside, here, strict=True)]
        to_load = sum(size * specs[number].tp for size, number in zip(weights, place.on_machine, strict=True))
        to_load = to_load if self._is_cpu else 0
        most, on_host = options.kv_cache_bytes, len(place.on_machine)
        return tuple(memory_for_kv(self._meshes, most, aside, share, to_load, on_host))


def files_stamp(path: Path) -> str:
    """Return a text that changes when a model's file is written to or replaced; in a directory, those that say what the
    model is and hold its weights."""
    files = sorted(file for kind in _MODEL_FILES for file in path.glob(kind)) if path.is_dir() else [path]
    stamps = [(file.name, Stamp.of(file)) for file in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()
