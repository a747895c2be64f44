"""Programs that the engines of one test process share; those that few tests call are compiled when one is called.

    patch.setattr(build, "kept_or_compiled", lambda directory, platform: SharedPrograms())

Compiling takes nearly all the time of a test that starts an engine. Tests of compilation itself, and of programs on
disk, put something else in this one's place.

Invariant: an engine runs the program that it would have compiled. A program is found by the devices and the plan of its
mesh, as those that outlast a process are by the plan (`program_key.py`), by JAX's settings, the level of CPU kernels
and the environment's flags, and by what stands in the modules that programs are traced from: after a test has replaced
something there, engines compile their own. What is compiled late is no compilation to `Counter`: everything else is.
"""

import os
import sys
import threading

import jax
from twinmesh.engine.startup.compilation import CompileCounter
from twinmesh.engine.startup.program_key import describe_plan
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.engine.worker.jax_settings import own_settings
from twinmesh.kernels_pallas.cpu import loader

_TRACED = ("kernels_pallas", "models", "engine.config", "engine.sampling", "engine.sharding", "engine.worker")
_VARIABLES = ("XLA_", "TF_XLA_", "JAX_", "TWINMESH_", "NPROC", "OMP_")
_WITHOUT_INFLUENCE = ("__doc__", "__annotations__", "__warningregistry__", "__dict__", "__weakref__")
_MOST = 250  # programs; each takes some of the mappings of memory that Linux lets a process have
# Steps and hand-offs are there from the start: where one of them is late, what runs beside it is late as well, and some
# tests are about that.
_LATE = {"sample", "score", "load_dense", "copy_page"}

_lock = threading.Lock()
_programs = {}  # by what they depend on; what was used longest ago comes first
_generations = []  # what has stood in the modules; alive, so that no other object takes the place of one in memory
_compiling = threading.local()


class SharedPrograms:
    """Makes the programs of one engine."""

    def __init__(self):
        self.surroundings = _surroundings()
        self._plans = {}  # by identity

    def __call__(self, plan, kind, /, *size):
        if id(plan) not in self._plans:
            devices = [device.id for device in plan.mesh.devices.flat]
            self._plans[id(plan)] = plan, f"{devices} {describe_plan(plan)}"
        key = self.surroundings, self._plans[id(plan)][1], kind, size
        if kind in _LATE:
            return LateProgram(key, plan)
        return _find_or_compile(key, plan)


class LateProgram:
    """A program that is compiled, or found compiled, as soon as it is called or asked for something."""

    def __init__(self, key, plan):
        self.key, self._plan = key, plan
        self._own, self._program = threading.Lock(), None

    def __call__(self, *arguments):
        return self.compiled(*arguments)

    def __getattr__(self, name):
        return getattr(self.compiled, name)

    @property
    def compiled(self):
        with self._own:
            if self._program is None:
                # What a test has replaced since the engine started is not to get to others.
                is_to_share = _surroundings() == self.key[0]
                _compiling.late = True
                try:
                    self._program = _find_or_compile(self.key, self._plan, is_to_share=is_to_share)
                finally:
                    _compiling.late = False
            return self._program


def _find_or_compile(key, plan, *, is_to_share=True):
    with _lock:
        made = _programs.pop(key, None)
    if made is None:
        _, _, kind, size = key
        made = compile_program(plan, kind, *size)
        if not is_to_share:
            return made
    with _lock:
        _programs[key] = made
        if len(_programs) > _MOST:
            del _programs[next(iter(_programs))]
    return made


class Counter(CompileCounter):
    """Counts compilations but those of late programs."""

    def _on_event(self, event, duration_secs, **kwargs):
        if not getattr(_compiling, "late", False):
            super()._on_event(event, duration_secs, **kwargs)


def _surroundings():
    with own_settings():
        settings = sorted((name, repr(value)) for name, value in jax.config.values.items())
    variables = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
    return f"{settings} {variables} {loader.toolchain()} {_generation()}"


def _generation():
    """Number what stands in the modules now: the same number for the same objects."""
    now = list(_objects())
    with _lock:
        for number, known in enumerate(_generations):
            if len(known) == len(now) and all(one is other for one, other in zip(known, now, strict=True)):
                return number
        _generations.append(now)
        return len(_generations) - 1


def _objects():
    for module in _MODULES:
        for value in _values(vars(module)):
            yield value
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield from _values(vars(value))
            elif isinstance(value, dict):
                yield from value.values()
            elif isinstance(value, list | set):
                yield from value


def _values(names):
    return [value for name, value in list(names.items()) if name not in _WITHOUT_INFLUENCE]


_PREFIXES = tuple(f"twinmesh.{name}" for name in _TRACED)
_MODULES = [module for name, module in sorted(sys.modules.items()) if name.startswith(_PREFIXES)]
