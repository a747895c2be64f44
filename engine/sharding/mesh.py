"""Builds JAX meshes from a topology, and shardings on them from logical axis names.

Each mesh has the axis "tp", and one whose experts are divided "ep" in front of it; `rules.py` says which logical axes
are divided over them, everything else is replicated. No arrays are made here; `sizing/heads.py` checks which degrees a
model allows.
"""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ...kernels_pallas.cpu.blocks_records import Activations
from ...kernels_pallas.matmul import Products
from ...kernels_pallas.quantized import QuantizedArray
from ...models.decoder import ParamSpec
from ...models.quantized import Described, placed
from ..topology import MeshSpec, Topology, TopologyError
from .rules import EP, EXPERT_PARALLEL, TENSOR_PARALLEL, TP, MeshAxis, ShardingRules, axes_of

# The fewest and the most CPU devices that a process gets where its topology needs no more.
_FEWEST, _MOST = 2, 8
_MOST_DEVICES = 1024  # more are a slip of the pen


def build_meshes(topology: Topology, devices: Sequence[jax.Device] | None = None) -> list[Mesh]:
    """Build one mesh per `MeshSpec` on `devices`, in order.

    Args:
        topology: the meshes to build.
        devices: as many as the topology needs; a device may appear twice, so that meshes share it, as in tests of
            several meshes on one GPU. None: all of JAX's devices, of which as many as needed are created on a CPU.

    Raises:
        TopologyError: JAX has no devices, or too few; a list of something else or of another length, or one that puts a
            device into one mesh twice.
    """
    if topology.num_devices > _MOST_DEVICES:
        raise TopologyError(
            f"topology {topology} asks for {topology.num_devices} devices: use at most {_MOST_DEVICES}; only a "
            "simulation has room for more."
        )
    if devices is None:
        request_cpu_devices(topology.num_devices)
        devices = find_devices()
        if len(devices) < topology.num_devices:
            raise TopologyError(_too_few(topology, devices))
    elif not all(hasattr(device, "platform") for device in devices):
        raise TopologyError(f"devices={list(devices)!r} are not JAX's: give some of jax.devices().")
    elif len(devices) != topology.num_devices:
        raise TopologyError(f"topology {topology} needs {topology.num_devices} devices: devices= lists {len(devices)}.")
    meshes, first = [], 0
    for spec in topology.meshes:
        own = list(devices[first : first + spec.tp])
        if len(set(own)) < spec.tp:
            raise TopologyError(
                f"devices= gives the {spec.role} mesh at {first} to {first + spec.tp - 1} a device twice: "
                "meshes may share devices, but the devices of one mesh must all differ."
            )
        meshes.append(mesh_of(spec, own))
        first += spec.tp
    return meshes


def build_part(topology: Topology, part: Sequence[int]) -> list[Mesh]:
    """Build the meshes of a topology whose numbers are given, on this process's devices in order.

    Raises:
        TopologyError: JAX has no devices, or too few.
    """
    specs = [topology.meshes[number] for number in part]
    count = sum(spec.tp for spec in specs)
    request_cpu_devices(count)
    devices = find_devices()
    if len(devices) < count:
        named = ", ".join(map(str, part))
        raise TopologyError(
            f"mesh {named} of topology {topology} needs {count} devices here and JAX has {len(devices)} "
            f"({devices[0].platform}): ask for fewer meshes, or run where there are more."
        )
    firsts = [sum(spec.tp for spec in specs[:index]) for index in range(len(specs))]
    return [mesh_of(spec, devices[first : first + spec.tp]) for spec, first in zip(specs, firsts, strict=True)]


def _shape(spec: MeshSpec) -> tuple[int, ...]:
    return (spec.ep, spec.tp // spec.ep) if spec.ep > 1 else (spec.tp,)


def _axes(spec: MeshSpec) -> tuple[str, ...]:
    return (EP, TP) if spec.ep > 1 else (TP,)


def mesh_of(spec: MeshSpec, devices: Sequence[jax.Device]) -> Mesh:
    """Build the mesh of a specification on as many devices as it has."""
    return Mesh(np.array(devices).reshape(_shape(spec)), _axes(spec))


def abstract_mesh(spec: MeshSpec) -> AbstractMesh:
    """Describe the mesh of a specification without devices."""
    return AbstractMesh(_shape(spec), _axes(spec))


def rules_of(mesh: Mesh | AbstractMesh) -> ShardingRules:
    """Return the rules by which a mesh of these axes divides a model."""
    return EXPERT_PARALLEL if EP in mesh.axis_names else TENSOR_PARALLEL


def ways(mesh: Mesh | AbstractMesh, axis: MeshAxis | None) -> int:
    """Return into how many parts an entry of a partition divides a dimension."""
    return math.prod(mesh.shape[one] for one in axes_of(axis))


def find_devices() -> list[jax.Device]:
    """Return the devices that JAX uses in this process.

    Raises:
        TopologyError: it cannot use the platform that it was asked to.
    """
    try:
        return list(jax.devices())
    except Exception as error:  # RuntimeError with a reason, or AssertionError without one
        raise TopologyError(_no_devices(error)) from error


def _no_devices(error: Exception) -> str:
    """Say what was asked for, what JAX says, and what to do."""
    names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
    asked = {name: os.environ[name] for name in names if os.environ.get(name)}
    platform = jax.config.jax_platforms
    if not asked and platform:
        asked = {"jax_platforms": platform}
    reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
    said = f" ({reason})" if reason else ""
    if not asked:
        return f"JAX finds no device to run on{said}: set JAX_PLATFORMS=cpu to run on the CPU."
    shown = " and ".join(f"{name}={value}" for name, value in asked.items())
    return (
        f"JAX cannot use the devices that {shown} asks for{said}: install their plugin, such as twinmesh[cuda12], and "
        "see that their driver runs; or set JAX_PLATFORMS=cpu to run on the CPU."
    )


def request_cpu_devices(count: int) -> None:
    """Ask JAX for CPU devices; it refuses once a backend exists, and then the devices that exist must suffice.

    JAX keys compiled programs by the number of devices. One number for all topologies of a few devices lets them find
    each other's; no more than cores, because XLA has a thread for each.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    current = jax.config.jax_num_cpu_devices  # -1: nobody has chosen
    usual = min(max(os.cpu_count() or 1, _FEWEST), _MOST)
    if current < count:
        try:
            jax.config.update("jax_num_cpu_devices", max(count, usual) if current < 1 else count)
        except RuntimeError:
            return


def _too_few(topology: Topology, devices: Sequence[jax.Device]) -> str:
    need, have, platform = topology.num_devices, len(devices), devices[0].platform
    start = f"topology {topology} needs {need} devices and JAX has {have} ({platform})"
    if platform == "cpu":
        return (
            f"{start}, because it was already in use when the engine started: put "
            f'`import jax; jax.config.update("jax_num_cpu_devices", {need})` first in the program.'
        )
    return f"{start}: ask for fewer meshes, or run where there are more."


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Make the sharding on `mesh` of an array with these logical axes, one name (or None) per dimension.

    Dimensions that are split must divide by the number of their parts.
    """
    return NamedSharding(mesh, rules_of(mesh).spec(axes))


def param_sharding(mesh: Mesh, spec: ParamSpec) -> NamedSharding:
    """Make the sharding of a parameter of floats. A vocabulary that does not divide is whole on every device."""
    rules = rules_of(mesh)
    divides = [size % ways(mesh, rules.axis(axis)) == 0 for size, axis in zip(spec.value.shape, spec.axes, strict=True)]
    return sharding(mesh, [axis if ok else None for axis, ok in zip(spec.axes, divides, strict=True)])


def products_on(mesh: Mesh | AbstractMesh, activations: Activations = "int16") -> Products:
    """Describe how a mesh's programs multiply by weights that are divided, or would if it had devices."""
    if mesh.size == 1:
        return Products(activations)
    expert_axis = EP if EP in mesh.axis_names else None
    return Products(activations, mesh, TP, frozenset(rules_of(mesh).over(TP)), expert_axis)


def param_on(mesh: Mesh, spec: ParamSpec) -> Described:
    """Describe a parameter as it lies on `mesh`: arrays of a quantised one are divided along one axis, all the same."""
    value = spec.value
    if not isinstance(value, QuantizedArray):
        return placed(value, lambda _: param_sharding(mesh, spec))
    axes = products_on(mesh).partition(spec.axes, value)
    return placed(value, lambda _: NamedSharding(mesh, axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Make the sharding that keeps a whole copy on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())


def replicate_logits(logits: jax.Array, mesh: Mesh) -> jax.Array:
    """Constrain logits [R, V], while tracing, to be whole on every device from here on.

    They are constrained to be split over the vocabulary first: without that, XLA gathers the head's weights instead.
    """
    if mesh.size == 1:
        return logits
    if logits.shape[1] % mesh.size == 0:
        logits = jax.lax.with_sharding_constraint(logits, sharding(mesh, (None, "vocab")))
    whole: jax.Array = jax.lax.with_sharding_constraint(logits, replicated(mesh))
    return whole
