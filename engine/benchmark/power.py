"""What the GPUs of this machine draw over a run, as NVML counts it: the energy of the boards, not their name plate.

NVML keeps a counter of millijoules for each GPU since its driver was loaded (Volta and newer); two readings give the
energy between them, so nothing is sampled. All GPUs of the run's meshes count, with all that runs on their boards.
Where it is not sure which boards these are, or one does not count, nothing is said: no figure is made up.
"""

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ..host.extras import need
from ..metrics.load_report import Power


class Reading(NamedTuple):
    """The counters at one time."""

    seconds: float
    joules: float  # of all GPUs


class Meter(Protocol):
    """Measures the power of the GPUs of one run."""

    def start(self) -> Reading | None:
        """Read the counters; None: they cannot be read."""
        ...

    def stop(self, started: Reading) -> Power | None:
        """Return the mean power of a GPU since then; None: it is not known."""
        ...


class Device(Protocol):
    """What tells of a device of JAX which GPU it is."""

    platform: str
    device_kind: str
    local_hardware_id: int | None


class NvmlMeter:
    """The energy counters of some GPUs."""

    def __init__(self, gpus: int | Sequence[int]) -> None:
        """Measure the first so many GPUs of those that CUDA sees, or those at these places among them.

        Raises:
            ValueError: nvidia-ml-py is not installed.
        """
        self._nvml = need("pynvml", "power", "Measuring power")
        places = range(gpus) if isinstance(gpus, int) else gpus
        self._boards = boards(places, os.environ.get("CUDA_VISIBLE_DEVICES")) or []

    @classmethod
    def of(cls, devices: Sequence[Device]) -> "NvmlMeter":
        """Measure these devices.

        Raises:
            ValueError: they are no NVIDIA GPUs, or nvidia-ml-py is not installed.
        """
        places = [device.local_hardware_id for device in devices if device.platform == "gpu"]
        if len(places) < len(devices) or not devices or None in places:
            kinds = ", ".join(dict.fromkeys(device.device_kind for device in devices))
            raise ValueError(f"power is read of NVIDIA GPUs alone, and these devices are {kinds}: leave --power out.")
        return cls([place for place in places if place is not None])

    def start(self) -> Reading | None:
        """Read the counters; None: there is no such GPU, or it does not count."""
        nvml = self._nvml
        if not self._boards:
            return None
        try:
            nvml.nvmlInit()
            try:
                joules = sum(map(nvml.nvmlDeviceGetTotalEnergyConsumption, map(self._handle, self._boards))) / 1000
            finally:
                nvml.nvmlShutdown()
        except nvml.NVMLError:
            return None
        return Reading(time.monotonic(), joules)

    def stop(self, started: Reading) -> Power | None:
        """Return the mean power of a GPU since then; None: a counter cannot be read, or it has begun anew."""
        now = self.start()
        if now is None or now.seconds <= started.seconds or now.joules < started.joules:
            return None
        watts = (now.joules - started.joules) / (now.seconds - started.seconds) / len(self._boards)
        return Power(watts=watts, basis="board")

    def _handle(self, board: int | str) -> Any:
        if isinstance(board, int):
            return self._nvml.nvmlDeviceGetHandleByIndex(board)
        return self._nvml.nvmlDeviceGetHandleByUUID(board)


def boards(places: Sequence[int], visible: str | None) -> list[int | str] | None:
    """Return NVML's indices, or UUIDs, of GPUs by their places among those that CUDA sees; None: not known.

    NVML counts all GPUs of the machine and heeds no CUDA_VISIBLE_DEVICES, which is `visible`; None: it is not set.
    Parts of a GPU (MIG) have no counter of their own. CUDA's order is taken to be NVML's: it is where GPUs are alike.
    """
    if visible is None:
        return list(places)
    named = [name.strip() for name in visible.split(",")]
    if any(place >= len(named) for place in places):
        return None
    chosen = [named[place] for place in places]
    if not all(name.isdecimal() or name.startswith("GPU-") for name in chosen):
        return None
    return [int(name) if name.isdecimal() else name for name in chosen]
