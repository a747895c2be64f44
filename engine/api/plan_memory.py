"""`twinmesh.plan_memory`: what each device would hold of an engine, before a byte of its weights is read."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...models.checkpoints.catalog import CATALOG, cache_directory
from ...models.checkpoints.known_models import NamedModel, named_model
from ..options import EngineOptions
from ..simulation.capacity import DeviceMemory, Planned
from ..simulation.capacity import plan_memory as divide
from ..simulation.costs.devices import DevicePeaks, device_named
from ..simulation.planning.memory_plan import Analysed, MemoryPlan, StepMemory
from ..topology import MeshSpec

if TYPE_CHECKING:
    import jax

_CPU = "cpu"
_HOPPER = ("h100", "h200")  # for which the H100's compiler speaks


@dataclass(frozen=True)
class _Where:
    """The devices that are planned for."""

    memory: DeviceMemory
    present: "tuple[jax.Device, ...]" = ()  # those that are there


def plan_memory(
    options: EngineOptions,
    *,
    device: str | None = None,
    compiles: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> MemoryPlan:
    """Plan the memory of an engine's devices; the arithmetic is that of its start.

    Args:
        options: the engine's. Of its model config.json is enough, or a GGUF file's header, or a name that is known.
        device: h100, h200, b200, or cpu for this host; None: the devices that are here.
        compiles: whether the largest steps are compiled, which takes minutes: for the devices that are here, or for
            an H100 by JAX's CUDA plugin where that is installed.
        say: is told what is being done.

    Raises:
        ValueError: something is unknown or unusable, or the model does not fit, with the arithmetic.
        EngineError: the compiler for an absent H100 fails.
    """
    if options.is_auto:
        raise ValueError("topology='auto' is chosen when an engine starts: name the meshes whose memory is planned.")
    named, where = _model(options.model), _where(options, device)
    dtype = _dtype(options, named, where)
    kept, notes = _kept(options, named, where, dtype)
    planned = divide(
        named.config, options, where.memory, dtype, name=named.name, kept=kept, stored=named.formats,
        has_kernels=_has_kernels(where),
    )  # fmt: skip
    analysed = _analysed(options, named, where, planned, kept, say) if compiles else None
    size = where.memory.bytes
    return MemoryPlan(named.name, named.config, where.memory.kind, size, planned, analysed, notes)


def _model(model: str | Path) -> NamedModel:
    """Find the model; of a name that `twinmesh fetch` knows, the file that it has fetched."""
    known = CATALOG.get(str(model))
    fetched = None if known is None else known.cached(cache_directory())
    return named_model(fetched if fetched is not None and fetched.exists() else model)


def _where(options: EngineOptions, device: str | None) -> _Where:
    if device is not None and device.lower() != _CPU:
        peaks: DevicePeaks = device_named(device)
        return _Where(DeviceMemory(peaks.name, peaks.memory))
    from ..sharding.mesh import build_meshes
    from ..startup.auto_topology import device_memory
    from ..startup.gpu_memory import backend_has_started, check_share, request_share
    from ..startup.memory import available_memory

    share = request_share(options.memory_fraction, {}, has_started=backend_has_started())
    meshes = build_meshes(options.parsed_topology, options.devices)
    found = tuple(one for mesh in meshes for one in mesh.devices.flat)
    if device is not None and found[0].platform != _CPU:
        return _Where(DeviceMemory(_CPU, available_memory(), _CPU))
    check_share(share, found[0].platform)
    if found[0].platform == _CPU:
        return _Where(DeviceMemory(_CPU, available_memory(), _CPU), found)
    return _Where(device_memory(found[0], share), found)


def _dtype(options: EngineOptions, named: NamedModel, where: _Where) -> str:
    from ..sizing.defaults import engine_config
    from ..startup.dtype import choose_dtype, read_cpu_flags

    slots = engine_config(options, named.config, where.memory.defaults, "float32").max_num_seqs
    return choose_dtype(
        options.dtype, named.config, "bfloat16", platform=where.memory.platform, cpu_flags=read_cpu_flags(),
        max_num_seqs=slots, deterministic=options.deterministic,
    ).name  # fmt: skip


def _has_kernels(where: _Where) -> bool:
    if where.memory.platform != _CPU:
        return False
    from ...kernels_pallas.cpu import loader

    return loader.toolchain() is not None


def _kept(
    options: EngineOptions, named: NamedModel, where: _Where, dtype: str
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Choose the weights that stay quantised, as start-up does; with what is to be said of the others."""
    from ..startup.quantization import choose

    stored, meshes = named.formats, options.parsed_topology.meshes
    memory, absent = where.memory, None if where.present else where.memory.kind
    chosen = choose(options.quantization, stored, named.config, memory.platform, meshes, options.activations, absent)
    lost = Counter(form for path, form in stored.items() if path not in chosen.kept)
    if not lost:
        return chosen.kept, ()
    counts = ", ".join(f"{count} in {form}" for form, count in lost.items())
    return chosen.kept, (f"Parameters that become {dtype}: {counts}; {'; '.join(chosen.reasons)}.",)


def _analysed(
    options: EngineOptions,
    named: NamedModel,
    where: _Where,
    planned: Planned,
    kept: Mapping[str, str],
    say: Callable[[str], None],
) -> Analysed | None:
    """Compile the largest steps where something can; None: nothing can."""
    from ..startup import step_temporaries as steps

    is_absent_hopper = not where.present and where.memory.kind in _HOPPER and steps.can_compile_for_h100()
    if not where.present and not is_absent_hopper:
        return None
    how = "compiled for an H100 that is not here" if is_absent_hopper else f"compiled for this {where.memory.kind}"
    config = replace(planned.config, activations=options.activations)
    found: dict[MeshSpec, list[StepMemory]] = {}
    for spec, pool in zip(config.topology.meshes, planned.pools, strict=True):
        if spec in found:
            continue
        asked = steps.Asked(named.config, config, spec, pool.pages, kept, options.activations)
        makes = steps.temporaries_on_h100(asked) if is_absent_hopper else steps.temporaries_on(asked, where.present)
        found[spec] = _told(makes, steps.programs(config, spec), f"{spec.role} mesh", say)
    return Analysed(found, how)


def _told(
    makes: Iterator[StepMemory], programs: Sequence[str], mesh: str, say: Callable[[str], None]
) -> list[StepMemory]:
    """Collect what each program takes as it is compiled, and say how far that has come."""
    found = list[StepMemory]()
    without = "compiles=False or --no-compile does without"
    say(f"{mesh}: {len(programs)} programs to compile, the first is {programs[0]} ({without})")
    for step in makes:
        found.append(step)
        say(f"{mesh}: {len(found)} of {len(programs)} compiled, {step.program}: {step.bytes / 1e6:,.0f} MB")
    return found
