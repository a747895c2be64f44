"""How much of a GPU's memory an engine may take: what JAX is asked for before it starts.

JAX's allocator holds one part of each GPU's memory, from which every array comes: three quarters, unless an environment
variable says otherwise before the backend starts. `bytes_limit`, which devices report, is that part and not the memory
of the card. So `request_share` asks for more where it still can, and the rest counts in parts of the card, in the
meaning of vLLM's `gpu_memory_utilization`: weights, KV and temporaries together.

Pure functions of numbers, but for `backend_has_started`. Read in XLA's sources; not yet tried on a GPU.
"""

import warnings
from collections.abc import MutableMapping

import jax

from ..config import GpuShare
from ..sizing.device_memory import FRACTION, Share

_JAX_FRACTION = 0.75  # what JAX's allocator holds where nobody says otherwise
VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


def backend_has_started() -> bool:
    """Whether JAX has begun to use devices, after which it does not read its environment any more.

    It has no function that tells; but it then refuses to change the number of CPU devices.
    """
    current = jax.config.jax_num_cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", max(current, 0) + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", current)
    return False


def request_share(asked: float | None, environment: MutableMapping[str, str], *, has_started: bool) -> Share:
    """Have JAX's allocator hold what was asked for, or `FRACTION`, of each GPU where it is not too late.

    A variable that the user has set stays as it is.

    Raises:
        ValueError: such a variable is not a number above 0.
    """
    preallocates = environment.get(_PREALLOCATE, "") not in ("false", "False", "0")
    for name in VARIABLES:
        if environment.get(name):
            return Share(_read(name, environment[name]), asked, preallocates=preallocates)
    if has_started:
        return Share(_JAX_FRACTION, asked, came_late=True, preallocates=preallocates)
    held = FRACTION if asked is None else asked
    environment[VARIABLES[0]] = str(held)
    return Share(held, asked, preallocates=preallocates)


def _read(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{name}={text} in the environment is not a number above 0: correct it, or remove it.")
    return value


def check_share(share: Share, platform: str) -> None:
    """Refuse a `memory_fraction` that cannot be had; warn where JAX keeps the engine from most of a GPU.

    Raises:
        ValueError: says why, and what to use.
    """
    if platform == "cpu":
        if share.asked is not None and not isinstance(share.asked, GpuShare):
            raise ValueError(
                f"memory_fraction={share.asked} is a part of a GPU's memory, and this engine runs on a CPU: "
                "use kv_cache_bytes."
            )
        return
    remedy = f"set {VARIABLES[0]}={share.asked or FRACTION} in the environment before JAX is used"
    if share.asked is not None and share.asked > share.held:
        raise ValueError(
            f"memory_fraction={share.asked} cannot be had, because JAX's allocator holds {share.held:g} of each GPU: "
            f"lower it, or {remedy}."
        )
    if share.came_late and share.asked is None:
        warnings.warn(
            f"JAX was in use before the engine started, and its allocator holds {share.held:g} of each GPU: "
            f"for more room for KV start the engine first, or {remedy}.",
            stacklevel=2,
        )
