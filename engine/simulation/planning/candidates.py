"""Which engines `search.py` considers on so many devices of one kind: the search space, stated in one place.

For each degree of tensor parallelism that is a power of two and fits the model, as many meshes as the devices make;
what is left over is idle, and costs like the rest. Of these meshes: a pool whose roles the planner moves, its meshes
that do both taking turns or fused; every split into meshes that prefill and meshes that decode (of more than 8 meshes
by eighths); all meshes doing both, taking turns or fused. Where meshes do both or are fused it is tried with a few
chunk sizes each, since a chunk is what tokens wait for there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ....models.config import ModelConfig
from ...scheduler.observations import Split
from ...sizing.heads import check_tp
from ...topology import MeshSpec, Role, Topology, TopologyError

CHUNKS = (512, 2048, 8192)  # tokens of a prefill step, where meshes do both; None beside them: the device's default
BUDGET, REQUESTS = 12, 2000  # engines that are simulated at most, and for how many requests each
_PARTS = 8  # of the meshes, in which splits are counted


@dataclass(frozen=True)
class Choice:
    """One engine, as far as the search distinguishes them."""

    topology: str
    split: Split  # of its meshes; of a pool, the roles that it begins with
    tp: int
    chunk: int | None = None  # tokens of a prefill step; None: the default of the device
    idle: int = 0  # devices that are left over

    @property
    def is_planned(self) -> bool:
        """Return whether the planner moves its roles."""
        return self.topology.startswith("pool")

    @property
    def meshes(self) -> int:
        """Return how many meshes it has."""
        return sum(self.split)

    def __str__(self) -> str:
        """Name it as options would."""
        chunk = f", chunks of {self.chunk}" if self.chunk is not None else ""
        return self.topology + chunk + (f", {self.idle} idle" if self.idle else "")


def choices(model: ModelConfig, devices: int) -> list[Choice]:
    """List the engines that so many devices allow, as far as the model's heads divide."""
    return [choice for tp in degrees(model, devices) for choice in _of_tp(devices, tp)]


def degrees(model: ModelConfig, devices: int) -> list[int]:
    """List the powers of two, 1 among them, that divide the model and are no more than the devices."""
    return [tp for tp in (1 << power for power in range(devices.bit_length())) if _divides(model, tp)]


def _divides(model: ModelConfig, tp: int) -> bool:
    try:
        check_tp(model, MeshSpec(Role.BOTH, tp))
    except TopologyError:
        return False
    return True


def _of_tp(devices: int, tp: int) -> Iterator[Choice]:
    (meshes, idle), size = divmod(devices, tp), f"xtp{tp}" if tp > 1 else ""
    together = Split(0, 0, meshes)
    if meshes > 1:
        yield Choice(f"pool={meshes}{size}", together, tp, idle=idle)
        for chunk in CHUNKS:
            yield Choice(f"pool(mode=fused)={meshes}{size}", together, tp, chunk, idle)
        parts = min(meshes, _PARTS)
        for prefill in dict.fromkeys(round(part * meshes / parts) for part in range(1, parts)):
            decode = meshes - prefill
            topology = f"prefill={prefill}{size},decode={decode}{size}"
            yield Choice(topology, Split(prefill, decode, 0), tp, idle=idle)
    for mode in ("", "(mode=fused)"):
        for chunk in CHUNKS:
            yield Choice(f"both{mode}={meshes}{size}", together, tp, chunk, idle)


def check_devices(devices: int) -> None:
    """Refuse a number of devices that no topology has; raises ValueError."""
    Topology.parse(f"both={devices}")
