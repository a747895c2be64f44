"""Names for compiled programs: a hash of everything that a program depends on, found without tracing it.

Invariant: what is not known to be without influence is in the name. A name that differs for no reason costs a
compilation; one that fails to differ would run a wrong program. So the name covers the versions of JAX, jaxlib and what
else takes part in tracing, the platform and its devices, the CPU, its cores, XLA's flags, JAX's settings as Twinmesh
runs with them, Twinmesh's own sources, and the whole plan of the mesh.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ...kernels_pallas.cpu import loader
from ..topology import Topology
from ..worker.jax_settings import own_settings
from ..worker.mesh_plan import MeshPlan

_PACKAGE = Path(__file__).resolve().parents[2]
_TRACED = ("engine", "kernels_pallas", "models")  # folders whose sources take part in programs
_VERSIONS = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")
# Settings of JAX that say where programs are kept and what is logged.
_WITHOUT_INFLUENCE = (
    "jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache", "jax_log", "jax_debug_log",
    "jax_explain", "jax_dump",
)  # fmt: skip
_ANY = Topology.parse("both=1")
_VARIABLES = ("XLA_", "TF_XLA_", "LIBTPU_", "NPROC", "OMP_", "JAX_PLATFORM")


def surroundings() -> str | None:
    """Describe what every program of this process depends on; None if that cannot be said for sure.

    JAX must have found its devices.
    """
    sources = hash_sources(_PACKAGE, _started())
    if sources is None:
        return None
    client = jax.devices()[0].client
    with own_settings():
        settings = {name: value for name, value in jax.config.values.items() if not name.startswith(_WITHOUT_INFLUENCE)}
    facts: dict[str, Any] = {
        "sources": sources,
        "versions": [metadata.version(name) for name in _VERSIONS],
        "python": sys.version,
        "platform": (client.platform, client.platform_version),
        "devices": [(device.id, device.device_kind, device.process_index) for device in jax.devices()],
        "cpu": (platform.machine(), read_cpu()),
        "cores": len(os.sched_getaffinity(0)),
        "kernels": None if (tools := loader.toolchain()) is None else tools.identity,
        "variables": sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES)),
        "settings": sorted((name, repr(value)) for name, value in settings.items()),
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def describe_plan(plan: MeshPlan) -> str:
    """Describe what the programs of one mesh depend on besides.

    They do not depend on what only decides which programs there are, so that engines of several topologies, and
    prompts of several lengths, share them, nor on which devices of a kind the mesh has; a test compares the programs.
    """
    config = replace(
        plan.config, topology=_ANY, prefill_buckets=(1,), decode_buckets=plan.config.decode_buckets[-1:],
        handoff_factor=2, prefix_cache=False, max_retries=0,
        roles=(), slo=None, age_seconds=1.0, max_waiting=None, max_waiting_tokens=None,
    )  # fmt: skip
    return "\n".join(
        [
            repr(plan.model), repr(config), f"{plan.mesh} {plan.mesh.axis_names}", f"sent as {plan.converted_to}",
            *(device.device_kind for device in plan.mesh.devices.flat),
            *_leaves(plan.state),
            *(f"{path} {spec.axes} {line}" for path, spec in plan.params.specs.items() for line in _leaves(spec.value)),
        ]
    )  # fmt: skip


def program_name(surroundings: str, plan: str, kind: str, size: tuple[object, ...]) -> str:
    """Name the program of this kind and size in these surroundings, of a mesh with this plan, both as described."""
    parts = "\0".join((surroundings, plan, kind, *map(str, size)))
    return f"{kind}-{hashlib.sha256(parts.encode()).hexdigest()}"


def _leaves(tree: Any) -> Iterator[str]:
    leaves, structure = jax.tree.flatten(tree)
    yield str(structure)
    yield from map(repr, leaves)


def read_cpu(path: Path = Path("/proc/cpuinfo")) -> str:
    """Describe the CPU's model and instruction sets in Linux's words; elsewhere in Python's."""
    try:
        first = path.read_text().partition("\n\n")[0].splitlines()
    except (OSError, UnicodeDecodeError):
        return platform.processor()
    changing = ("processor", "cpu MHz", "core id", "apicid", "initial apicid", "bogomips", "physical id")
    return "\n".join(line for line in first if line.partition("\t")[0].strip() not in changing)


def hash_sources(package: Path, started: float | None) -> str | None:
    """Hash the sources that programs are traced from.

    None if some cannot be read, or have changed since the process `started`: what it runs is not what is there now.
    """
    found = hashlib.sha256()
    try:
        files = sorted(file for folder in _TRACED for file in (package / folder).rglob("*.py"))
        for file in files:
            if started is None or file.stat().st_ctime > started:
                return None
            found.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    except OSError:
        return None
    return found.hexdigest() if files else None


def _started() -> float | None:
    """Return when this process started, in seconds of the clock that stamps files; None where Linux does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return boot + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
