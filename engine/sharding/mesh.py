"""From a topology to JAX meshes, and from logical axis names to shardings on them.

Each mesh has the single axis "tp". Heads, MLP columns and the vocabulary are split over it, everything else is
replicated. Which degrees a model allows is `tensor_parallel.py`'s business. No arrays are made here.
"""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...models.decoder import ParamSpec
from ..topology import Topology, TopologyError

AXIS = "tp"
_SPLIT = frozenset({"vocab", "q_heads", "kv_heads", "mlp"})


def build_meshes(topology: Topology, devices: Sequence[jax.Device] | None = None) -> list[Mesh]:
    """One mesh per `MeshSpec`, on `devices` in order (default: all of JAX's, made ready on CPU as the topology needs).

    `devices` may name a device twice, so that meshes share it; tests of several meshes on one GPU do.

    Raises:
        TopologyError: too few devices, a list of another length, or one that puts a device into one mesh twice.
    """
    if devices is None:
        _request_cpu_devices(topology.num_devices)
        devices = jax.devices()
        if len(devices) < topology.num_devices:
            raise TopologyError(_too_few(topology, devices))
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
        meshes.append(Mesh(np.array(own), (AXIS,)))
        first += spec.tp
    return meshes


def _request_cpu_devices(count: int) -> None:
    """Ask for CPU devices while no backend exists; once one does, JAX refuses, and what is there must do."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    current = jax.config.jax_num_cpu_devices
    if current < count:
        try:
            jax.config.update("jax_num_cpu_devices", count)
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
    """How an array with these logical axes, one name per dimension, lies on `mesh`. What is split must divide."""
    return NamedSharding(mesh, PartitionSpec(*(AXIS if axis in _SPLIT else None for axis in axes)))


def param_sharding(mesh: Mesh, spec: ParamSpec) -> NamedSharding:
    """How a parameter lies on `mesh`. A vocabulary that does not divide is kept whole on every device."""
    divides = (size % mesh.size == 0 for size in spec.value.shape)
    return sharding(mesh, [axis if ok else None for axis, ok in zip(spec.axes, divides, strict=True)])


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())


def replicate_logits(logits: jax.Array, mesh: Mesh) -> jax.Array:
    """While tracing: logits [R, V] as the head computes them, whole on every device from here on.

    They are first held split over the vocabulary: asked for whole at once, XLA would gather the head's weights instead.
    """
    if mesh.size == 1:
        return logits
    if logits.shape[1] % mesh.size == 0:
        logits = jax.lax.with_sharding_constraint(logits, sharding(mesh, (None, "vocab")))
    whole: jax.Array = jax.lax.with_sharding_constraint(logits, replicated(mesh))
    return whole
