"""An engine to be simulated, from what a user names: a model's sizes, options, a kind of device, perhaps a profile."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...models.config import ModelConfig
from ..scheduler.policy import Policy
from ..sizing.asked import Asked
from ..sizing.weight_sizes import kept_on_gpus
from .capacity import DeviceMemory, plan_memory
from .costs.devices import DevicePeaks, device_named, peaks_of
from .costs.profile import Profile, check_profile
from .costs.roofline import roofline
from .simulator import SimulatedEngine


@dataclass(frozen=True)
class Source:
    """Where the costs of steps come from: a profile, or the published peaks of a device."""

    device: str  # its kind, as asked for or as the profile has it
    peaks: DevicePeaks | None  # None: nothing is published of it, as of CPUs
    profile: Profile | None

    @property
    def dtype(self) -> str:
        """Return the dtype that the costs are of."""
        return "bfloat16" if self.profile is None else self.profile.dtype

    @property
    def memory(self) -> DeviceMemory:
        """Return how much memory such a device has."""
        is_gpu = self.peaks is not None
        return DeviceMemory(self.device, self.peaks.memory if self.peaks else None, "gpu" if is_gpu else "cpu")

    @property
    def note(self) -> str:
        """Say how far the costs can be trusted."""
        if self.profile is None or self.profile.source == "roofline":
            return "roofline only: step times from published peaks, never measured"
        worst = max((error.worst for error in self.profile.errors), default=None)
        known = "" if worst is None else f", held-out steps within {worst:.0%}"
        return f"step times {'measured' if self.profile.source == 'measured' else 'of a decision log'}{known}"


def source_of(device: str | None, profile: Profile | None, name: str = "the profile") -> Source:
    """Find where costs come from; `name` is the profile's in messages.

    Raises:
        ValueError: neither a device nor a profile is given, the device is not known, or the profile is of another.
    """
    if profile is None:
        if device is None:
            raise ValueError("nobody says what a step costs: give a device, such as h100, or a profile.")
        peaks = device_named(device)
        return Source(peaks.name, peaks, None)
    found = peaks_of(profile.device)
    if device is not None and device.lower() not in (profile.device.lower(), found.name if found else ""):
        raise ValueError(
            f"{name} is of another device: it has {profile.device}, and {device} is asked for: make one with "
            "'twinmesh profile', or ask for what it has."
        )
    return Source(profile.device, found, profile)


def assemble(
    name: str,
    model: ModelConfig,
    asked: Asked,
    source: Source,
    policy: Policy,
    profile_name: str = "the profile",
    formats: Mapping[str, str] | None = None,
) -> SimulatedEngine:
    """Make the engine. It has the weights quantised that a profile's engine kept so, or that a GPU would keep.

    Args:
        name: the model's, as profiles have it.
        model: its sizes.
        asked: the engine's options.
        source: of the costs.
        policy: the scheduler's.
        profile_name: of the profile, in messages.
        formats: path -> format, of what the model's files hold quantised; None: they are not at hand.

    Raises:
        ValueError: something does not fit into memory, or the profile is of something else.
    """
    profile = source.profile
    # Where a profile has the bucket of one row, the engine that was measured had kernels for it.
    has_kernels = profile is not None and profile.decode_buckets[0] == 1
    stored = formats or {}
    if profile is None:
        kept = kept_on_gpus(asked.quantization, stored, source.device)
    else:
        kept = {path: kind for path, kind in stored.items() if kind in profile.formats}
    planned = plan_memory(
        model, asked, source.memory, source.dtype, name=name, kept=kept, stored=stored, has_kernels=has_kernels
    )
    config, pools = planned.config, planned.pools
    if profile is None:
        assert source.peaks is not None
        return SimulatedEngine(config, pools, roofline(model, config, source.peaks, formats=kept), policy)
    config = replace(config, formats=profile.formats)  # whatever they are, the costs are of them
    check_profile(profile, config, model=name, device=profile.device, name=profile_name)
    return SimulatedEngine(config, pools, profile.costs, policy)
