"""Puts a kernel into the process and at XLA's disposal: from disk, or compiled in a child process.

The name under which XLA knows a kernel holds a hash of all that its code depends on: the sources of this folder, the
versions of numba, llvmlite and Python, and the CPU's level. Programs that XLA keeps on disk name their kernels, so one
of another version is never run. No address, size or thread count of a process is in the code: they stand in words of
the loaded object (`jobs.PROCESS`), which are written here.

Where a kernel cannot be had, the reason is logged once, and XLA computes what it would have: numba absent or too old,
a CPU without the instructions, a compilation that fails, a self-test that does. A warm start needs llvmlite alone.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import frames, objects
from .checks import CHECKS
from .jobs import JOB_BYTES, JOBS, PROCESS, PROCESS_WORDS, RING, TASK, THREADS, TURN
from .kernels import Parameters
from .levels import MASK, NONE, Level, read_level
from .threads import process_cores

_log = logging.getLogger(__name__)
_NUMBA = (0, 68)  # the oldest that is known to work
_SECONDS = 300  # that a compilation may take
_COST = "Products and attention on the CPU run in plain XLA, which is up to several times slower for few requests."
_lock = threading.RLock()  # programs are traced by several threads
_ELF = b"\x7fELF"  # what an object file begins with
_AT_ONCE = 256  # jobs; a call that finds none of them free works alone


@dataclass(frozen=True)
class Toolchain:
    """What kernels are compiled by and for."""

    level: Level
    identity: str  # hash of everything that a kernel's code depends on


def target(name: str, *parameters: int) -> str | None:
    """Return the name under which XLA knows a kernel, which is loaded on its first use; None where XLA has to do.

    Args:
        name: one of `kernels.KERNELS`.
        parameters: what the kernel is compiled for besides the CPU's level.
    """
    with _lock:
        tools = toolchain()
        return None if tools is None else _load(tools, name, parameters)


def compile_ahead(*kernels: str) -> threading.Thread:
    """Begin to compile those kernels that are not on disk, in one child process, and return at once.

    Args:
        kernels: their names, each with its parameters behind colons.

    Returns:
        The thread that waits for the child. A kernel that is asked for meanwhile waits for it too.
    """
    thread = threading.Thread(target=_compile_missing, args=kernels, daemon=True)
    thread.start()
    return thread


def _compile_missing(*kernels: str) -> None:
    with _lock:
        tools = toolchain()
        missing = [] if tools is None else [name for name in kernels if _kept(tools, name) is None]
        if tools is None or not missing:
            return
        try:
            compiled = compile_in_child(tools.level, *missing)
        except UnusableKernel:
            return  # whoever asks for one of them is told
        for name, code in zip(missing, compiled, strict=True):
            _keep(tools, name, code)


def forget() -> None:
    """Look at everything anew when the next kernel is asked for; programs that have one keep it."""
    for known in (toolchain, _load, _warn_once):
        known.cache_clear()
    _unkept.clear()


def takes_bfloat16() -> bool:
    """Whether the kernels over bfloat16 weights take bfloat16 activations, and not float32."""
    tools = toolchain()
    return tools is not None and tools.level.has_bf16


registered_names: set[str] = set()  # XLA takes a name once in a process
_unkept: dict[tuple[Toolchain, str], bytes] = {}  # what could not be kept on disk


@functools.cache
def toolchain() -> Toolchain | None:
    """Look what this process can have kernels of; None, and one line in the log, where it can have none.

    Raises:
        ValueError: `TWINMESH_CPU_LEVEL` names no level.
    """
    if os.environ.get(MASK) == NONE:
        return None
    reason = _why_no_numba()
    if reason is not None:
        _log.warning("%s %s", reason, _COST)
        return None
    level = read_level()
    if level is None:
        _log.warning("This CPU has neither AVX2, AVX-512 nor NEON instructions. %s", _COST)
        return None
    return Toolchain(level, _identity(level))


def _why_no_numba() -> str | None:
    absent = "numba is not installed: `pip install numba` gives fast CPU kernels."
    try:
        found = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return absent
    version = re.match(r"(\d+)\.(\d+)", found)
    if version is None or tuple(map(int, version.groups())) < _NUMBA:
        return f"numba {found} is too old: `pip install 'numba>={'.'.join(map(str, _NUMBA))}'` gives fast CPU kernels."
    try:
        importlib.import_module("llvmlite.binding")
    except ImportError:
        return absent
    return None


def _identity(level: Level) -> str:
    known = hashlib.sha256()
    folder = Path(__file__).parent
    for source in [*sorted(folder.glob("*.py")), folder.parent / "block_tiles.py"]:
        known.update(source.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    known.update(repr((level.name, versions, sys.version_info[:2])).encode())
    return known.hexdigest()[:16]


@functools.cache
def _load(tools: Toolchain, name: str, parameters: Parameters) -> str | None:
    full = ":".join([name, *map(str, parameters)])
    try:
        handler = load_object(_object(tools, full))
        if not CHECKS[name](functools.partial(frames.call, handler), tools.level, *parameters):
            _log.warning("The CPU kernel %s computes wrong results in its self-test. %s", full, _COST)
            return None
        registered = f"twinmesh.{full}.{tools.identity}"
        if registered not in registered_names:
            jax.ffi.register_ffi_target(registered, jax.ffi.pycapsule(handler), platform="cpu")
            registered_names.add(registered)
    except (UnusableKernel, RuntimeError) as error:  # the latter are LLVM's and XLA's
        _log.warning("The CPU kernel %s cannot be used: %s. %s", full, error, _COST)
        return None
    return registered


class UnusableKernel(Exception):
    """Why a kernel cannot be had."""


def _object(tools: Toolchain, full: str) -> bytes:
    """Read a kernel's object file from the cache, or compile it and keep it there."""
    code = _kept(tools, full)
    if code is None:
        (code,) = compile_in_child(tools.level, full)
        _keep(tools, full, code)
    return code


def _kept(tools: Toolchain, full: str) -> bytes | None:
    """Return a kernel's object file if it is on disk, or was compiled by this process and could not be kept there."""
    return objects.read(_path(tools, full)) or _unkept.get((tools, full))


def _path(tools: Toolchain, full: str) -> Path:
    return objects.default_folder() / f"{full.replace(':', '-')}-{tools.identity}.o"


def _keep(tools: Toolchain, full: str, code: bytes) -> None:
    """Keep an object file on disk, or where that cannot be, for as long as the process lives."""
    path = _path(tools, full)
    try:
        objects.write(path, code)
    except OSError as error:
        _unkept[tools, full] = code
        where = f"they cannot be kept in {path.parent}: {error}"
        _warn_once(f"CPU kernels are compiled at every start, because {where}.")


@functools.cache
def _warn_once(sentence: str) -> None:
    _log.warning(sentence)


def compile_in_child(level: Level, *kernels: str) -> list[bytes]:
    """Compile kernels in a process of its own, which may be ended by what it compiles.

    Args:
        level: the level to compile for; the CPU at hand need not have it.
        kernels: their names, each with its parameters behind colons.

    Raises:
        UnusableKernel: they cannot be compiled.
    """
    command = [sys.executable or "python", "-P", "-m", f"{__package__}.build", level.name, *kernels]
    try:
        done = subprocess.run(
            command, env=_childs_environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UnusableKernel(f"it cannot be compiled ({error})") from error
    compiled = _divide(done.stdout)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise UnusableKernel(f"its compilation failed with exit code {done.returncode}: {said[-1]}")
    if compiled is None or len(compiled) != len(kernels):
        raise UnusableKernel(f"its compilation wrote something else than object files, beginning {done.stdout[:40]!r}")
    return compiled


def _childs_environment() -> dict[str, str]:
    """Return the environment of a child: this process's, without what it has set for its own use of Python and numba.

    The child finds modules where this process does, and puts no folder before them.
    """
    own = ("NUMBA_", "PYTHONWARNINGS", "PYTHONINSPECT")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    # Python looks into no entry that is not a string.
    folders = (path or os.getcwd() for path in sys.path if isinstance(path, str))
    return clean | {"PYTHONPATH": os.pathsep.join(folders), "JAX_PLATFORMS": "cpu"}


def _divide(written: bytes) -> list[bytes] | None:
    """Divide what a child has written into object files; None if it is anything else, such as a greeting."""
    found = []
    while written:
        end = 8 + int.from_bytes(written[:8], "little")
        if end > len(written) or written[8:12] != _ELF:
            return None
        found.append(written[8:end])
        written = written[end:]
    return found


def load_object(code: bytes) -> int:
    """Load an object file and tell it what belongs to this process; returns the address of its handler."""
    from llvmlite import binding

    engine = _new_engine()
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    handler, task = (engine.get_function_address(name) for name in ("handler", "task"))
    words = (ctypes.c_int64 * PROCESS_WORDS).from_address(engine.get_global_value_address(PROCESS))
    ring, turn = _ring()
    cores = process_cores()
    _keep_for_ever(cores)
    words[RING], words[JOBS], words[TURN], words[TASK] = ring, _AT_ONCE, turn, task
    words[THREADS] = cores.address
    return int(handler)


def _new_engine() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    _keep_for_ever(engine)
    return engine


@functools.cache
def _ring() -> tuple[int, int]:
    """Allocate the jobs that calls share with XLA's threads, and the word that counts turns."""
    room = np.zeros(_AT_ONCE * JOB_BYTES + 128, np.uint8)
    _keep_for_ever(room)
    start = (int(room.ctypes.data) + 63) // 64 * 64
    return start, start + _AT_ONCE * JOB_BYTES


def _keep_for_ever(thing: object) -> None:
    """Keep an object even while Python ends: XLA's threads may still look into it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
