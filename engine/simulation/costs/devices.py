"""Published peaks of GPUs, for costs that nobody has measured yet (`roofline.py`), and what an hour of one costs.

Sources, per GPU: NVIDIA's data sheets of H100 SXM5 (2023), H200 SXM (2024) and HGX B200 (2024) for FLOP/s, which are
dense, that is half of what is printed "with sparsity", for memory bandwidth, and for NVLink, of which one direction is
half of the printed sum. Bytes of memory are what CUDA reports, which is less than the chips have. Dollars (of owning
one, at a hyperscaler) and watts (by name plate, with the GPU's share of its server) are InferenceX's conventions as of
2026-11. `launch` is the time between the starts of two kernels that a CUDA graph replays.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class DevicePeaks:
    """What one device can do at most."""

    name: str
    memory: int  # bytes
    bandwidth: float  # of its memory, bytes/s
    flops: Mapping[str, float]  # dense FLOP/s by the dtype of what is multiplied
    link: float  # bytes/s to another device of the host, one direction
    launch: float  # seconds between the starts of two kernels
    dollars: float | None  # an hour; None: no figure is published that we know
    watts: float | None  # all in; None: likewise


_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}  # float32 as TF32
_BLACKWELL = {"bfloat16": 2250e12, "float16": 2250e12, "float32": 1125e12}

DEVICES: Mapping[str, DevicePeaks] = {
    device.name: device
    for device in (
        DevicePeaks("h100", 84_942_979_072, 3.35e12, _HOPPER, 450e9, 2e-6, 1.30, 1730.0),
        DevicePeaks("h200", 139 << 30, 4.8e12, _HOPPER, 450e9, 2e-6, 1.41, 1730.0),
        DevicePeaks("b200", 178 << 30, 7.7e12, _BLACKWELL, 900e9, 2e-6, None, None),
    )
}


def device_named(name: str) -> DevicePeaks:
    """Return the device of this name, in whatever case.

    Raises:
        ValueError: there is none; names the nearest.
    """
    found = DEVICES.get(name.strip().lower())
    if found is not None:
        return found
    near = get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.0)[0]
    raise ValueError(f"device {name!r} is not known: the devices are {', '.join(DEVICES)}; the nearest is {near!r}.")


def peaks_of(kind: str) -> DevicePeaks | None:
    """Find the published peaks of a device by its kind as JAX names it, as in "NVIDIA H100 80GB HBM3"."""
    words = re.findall(r"\w+", kind.lower())
    return next((peaks for name, peaks in DEVICES.items() if name in words), None)
