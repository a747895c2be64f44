"""Published peaks of GPUs, for costs that nobody has measured yet (`roofline.py`), and what an hour of one costs.

Sources, per GPU: NVIDIA's data sheets of H100 SXM5 (2023), H200 SXM (2024) and of HGX B200 (2024): dense FLOP/s, that
is half of what is printed "with sparsity"; memory and its bandwidth; NVLink, of which one direction is half of the
printed sum. Dollars and watts: InferenceX's conventions as of 2026-11 (dollars an hour of owning one at a hyperscaler;
watts of a GPU with its share of the server, all in, 1.73 kW for H100). `launch` is what a kernel's start costs where
the host is ahead: some 2 us on Hopper in CUDA graphs, as XLA's command buffers replay them.
"""

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


_HOPPER = {"bfloat16": 989e12, "float16": 989e12, "float8": 1979e12, "float32": 494e12}  # float32 as TF32
_BLACKWELL = {"bfloat16": 2250e12, "float16": 2250e12, "float8": 4500e12, "float32": 1100e12}

DEVICES: Mapping[str, DevicePeaks] = {
    device.name: device
    for device in (
        DevicePeaks("h100", 80 * 10**9, 3.35e12, _HOPPER, 450e9, 2e-6, 1.30, 1730.0),
        DevicePeaks("h200", 141 * 10**9, 4.8e12, _HOPPER, 450e9, 2e-6, 1.41, 1730.0),
        DevicePeaks("b200", 180 * 10**9, 7.7e12, _BLACKWELL, 900e9, 2e-6, None, None),
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
