"""Compiled programs that outlast the process: executables, which need neither tracing nor lowering, or JAX's cache.

JAX finds a program in its own cache by what it was lowered to, so that every start traces and lowers each one again,
which takes most of such a start's time. What is kept here is found by what it depends on (`program_key.py`), in a
folder of its own (`program_folder.py`). Any doubt is a miss, and the program is compiled as if nothing were kept.

Meshes that differ in nothing but their devices share what is kept: the first of them compiles, and the others load its
programs onto devices of their own (`moved_program.py`).

Invariant: never both. An executable that JAX has read from its cache serialises without an error into one that loads
and then fails when it runs ("Function ... not found", seen on CPUs with jax 0.12.0.1).
"""

import os
import pickle
import re
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import jax
import jax.monitoring
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.stages import Compiled

from ...kernels_pallas.cpu import loader
from ..worker.compile_program import compile_program
from ..worker.mesh_plan import MeshPlan
from ..worker.unwritten import register
from .compilation import Make
from .moved_program import load_onto
from .program_folder import ProgramFolder
from .program_key import describe_plan, program_name, surroundings

# Names of the kernels that a serialised program calls, as `kernels_pallas/cpu/loader.py` makes them: a kernel, numbers
# that it was compiled for, and the hash of its code.
_KERNEL = re.compile(rb"(twinmesh\.([a-z][a-z0-9_]*)((?::\d+)*)\.[0-9a-f]{16})")
# Recorded with `jax.monitoring` for each program.
READ_EVENT, COMPILED_EVENT = "/twinmesh/kept_programs/read", "/twinmesh/kept_programs/compiled"


def kept_or_compiled(directory: Path, platform: str) -> Make:
    """Return what makes programs: reads those that are kept below `directory`, and compiles and keeps the others.

    JAX's own cache is in its place where the process has chosen one, on GPUs, where keeping executables was not tried,
    and where it cannot be said what programs depend on. Nothing is kept where that cache is turned off.
    """
    if jax.config.jax_enable_compilation_cache:
        has_cache = jax.config.jax_compilation_cache_dir is not None
        found = None if has_cache or platform != "cpu" else surroundings()
        if found is not None:
            register()  # programs that are read may call it
            return KeptPrograms(ProgramFolder(directory / f"executables-{os.geteuid()}"), found)
        use_cache(directory)
    return compile_program


def use_cache(directory: Path) -> None:
    """Let JAX keep compiled programs in `directory`, unless the program has chosen a cache of its own.

    A second start then reads them back instead of compiling. The setting is the process's: programs that its user
    compiles are kept there too. Where the directory cannot be written, JAX compiles as usual.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if jax.config.jax_compilation_cache_dir is None and os.access(directory, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class KeptPrograms:
    """Makes programs: reads what an earlier start has kept, or compiles it and keeps it."""

    def __init__(self, folder: ProgramFolder, surroundings: str) -> None:
        self._folder, self._surroundings = folder, surroundings
        self._described: dict[int, tuple[MeshPlan, str]] = {}  # by identity
        self._one_at_a_time: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by name

    def __call__(self, plan: MeshPlan, kind: str, /, *size: object) -> Compiled:
        """Make the program that `compile_program` would make."""
        if id(plan) not in self._described:
            self._described[id(plan)] = plan, describe_plan(plan)
        name = program_name(self._surroundings, self._described[id(plan)][1], kind, size)
        with self._one_at_a_time[name]:  # the same program of another mesh may be under way
            kept = self._folder.read(name)
            if kept is not None:
                with suppress(Exception):  # whatever it is, the program can be compiled
                    made = load(kept, plan)
                    jax.monitoring.record_event(READ_EVENT)
                    return made
            made = compile_program(plan, kind, *size)
            jax.monitoring.record_event(COMPILED_EVENT)
            with suppress(Exception):  # JAX does not serialise every program
                if jax.config.jax_compilation_cache_dir is None:  # by now
                    self._folder.write(name, dump(made, plan))
            return made


def dump(program: Compiled, plan: MeshPlan) -> bytes:
    """Serialise a program of this plan, with its devices' numbers; raises what JAX raises where it cannot."""
    return pickle.dumps(([device.id for device in plan.mesh.devices.flat], *serialize(program)))


def load(data: bytes, plan: MeshPlan) -> Compiled:
    """Load a program onto the devices of the mesh; `data`, of one whose plan is described alike, must be trusted.

    Kernels that it calls are made known to XLA first, which tracing would have done.

    Raises:
        LookupError: it calls a kernel of another version, or one that this process cannot have.
    """
    devices = list(plan.mesh.devices.flat)
    compiled_for, program, arguments, results = pickle.loads(data)
    for name, kernel, parameters in set(_KERNEL.findall(program)):
        own = loader.target(kernel.decode(), *map(int, parameters.split(b":")[1:]))
        if own != name.decode():
            raise LookupError(f"the program calls {name!r}, and this process has {own}")
    if compiled_for != [device.id for device in devices]:
        return load_onto(devices, compiled_for, program, arguments, results)
    loaded: Compiled = deserialize_and_load(
        program, arguments, results, backend=devices[0].client, execution_devices=devices
    )
    return loaded
