"""What the GPUs of this machine draw over a run, as NVML counts it: the energy of the boards, not their name plate.

NVML keeps a counter of millijoules for each GPU since its driver was loaded (Volta and newer); two readings give the
energy between them, so nothing is sampled. All GPUs of the machine count that the run's meshes have.
"""

import time
from typing import NamedTuple, Protocol

from ..extras import need
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


class NvmlMeter:
    """The energy counters of the first so many GPUs."""

    def __init__(self, gpus: int) -> None:
        """Open NVML.

        Raises:
            ValueError: nvidia-ml-py is not installed.
        """
        self._nvml, self._gpus = need("pynvml", "power", "Measuring power"), gpus

    def start(self) -> Reading | None:
        """Read the counters; None: there is no such GPU, or it does not count."""
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(self._gpus)]
            joules = sum(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1000
        except nvml.NVMLError:
            return None
        return Reading(time.monotonic(), joules)

    def stop(self, started: Reading) -> Power | None:
        """Return the mean power of a GPU since then."""
        now = self.start()
        if now is None or now.seconds <= started.seconds:
            return None
        watts = (now.joules - started.joules) / (now.seconds - started.seconds) / self._gpus
        return Power(watts=watts, basis="board")
