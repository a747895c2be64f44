"""What the CPU can do, as far as kernels differ by it, read before anything is compiled.

An instruction that LLVM cannot select for a target ends the process, and one that the CPU lacks ends it later: a kernel
is therefore compiled for a named level and never for "this machine", and loaded where LLVM says that the CPU has all
that the level needs. `TWINMESH_CPU_LEVEL` lowers the level, for tests of the others; nothing raises it.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

MASK = "TWINMESH_CPU_LEVEL"
NONE = "none"  # as a level: no kernels


@dataclass(frozen=True)
class Level:
    """A set of instructions that kernels are compiled for."""

    name: str
    machine: str  # as `platform.machine` has it
    cpu: str  # LLVM's name of a target that has what the level needs, and nothing else
    features: str  # what LLVM is to use besides
    needs: frozenset[str]  # LLVM's names of what the CPU at hand must have
    lanes: int  # of float32 in a register
    registers: int  # of vectors
    has_vnni: bool = False
    has_bf16: bool = False

    @property
    def triple(self) -> str:
        """LLVM's name of the machine and of its conventions."""
        return f"{self.machine}-unknown-linux-gnu"


_V3 = frozenset({"avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_VNNI, _BF16 = _V4 | {"avx512vnni"}, _V4 | {"avx512vnni", "avx512bf16"}
# The best first.
LEVELS = (
    Level("avx512_bf16", "x86_64", "x86-64-v4", "+avx512vnni,+avx512bf16", _BF16, 16, 32, True, True),
    Level("avx512_vnni", "x86_64", "x86-64-v4", "+avx512vnni", _VNNI, 16, 32, True),
    Level("avx512", "x86_64", "x86-64-v4", "", _V4, 16, 32),
    Level("avx2", "x86_64", "x86-64-v3", "", _V3, 8, 16),
    Level("neon", "aarch64", "generic", "+neon", frozenset({"neon"}), 4, 32),
)


def level_named(name: str) -> Level:
    """Return a level by its name.

    Raises:
        ValueError: there is none of that name.
    """
    for level in LEVELS:
        if level.name == name:
            return level
    names = ", ".join(level.name for level in LEVELS)
    raise ValueError(f"{MASK}={name!r} names no level of CPU kernels: use one of {names}, or {NONE}.")


def find_level(features: Mapping[str, bool], machine: str, mask: str = "") -> Level | None:
    """Find the best level for a CPU with these features, no higher than `mask` if that is not empty.

    Raises:
        ValueError: `mask` names no level.
    """
    if mask == NONE:
        return None
    allowed = LEVELS[LEVELS.index(level_named(mask)) :] if mask else LEVELS
    has = {name for name, present in features.items() if present}
    return next((level for level in allowed if level.machine == machine and level.needs <= has), None)


def read_level() -> Level | None:
    """Find the level of the CPU at hand; None if it has none of them.

    Raises:
        ImportError: llvmlite, which comes with numba, is not installed.
        ValueError: `TWINMESH_CPU_LEVEL` names no level.
    """
    from llvmlite import binding

    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this system
        features = {}
    return find_level(features, platform.machine(), os.environ.get(MASK, ""))
