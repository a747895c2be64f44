"""Converts rotary embeddings as checkpoints describe them to `Rope`. Static scaling is one factor per frequency.

Dynamic kinds (dynamic NTK, longrope), whose frequencies depend on the length of the prompt, and YaRN, which also scales
the scores, are refused by name.
"""

import math
from typing import Any

from ..config import Rope
from .raw_config import Settings


def rope_of(settings: Settings, theta: float, head_dim: int) -> Rope:
    """Read the rotary embedding from one of Hugging Face's objects (`rope_parameters`, `rope_scaling`).

    Args:
        settings: `rope_type` (or `type`), the settings of that type, and perhaps the base as `rope_theta`.
        theta: the base if `settings` has none.
        head_dim: size of a head.

    Raises:
        CheckpointError: a type that is not implemented, or a number that is missing or absurd.
    """
    settings.refuse("partial_rotary_factor", 1, 1.0)
    theta = settings.number("rope_theta", theta)
    kind: Any = settings.get("rope_type", settings.get("type", "default"))
    match kind:
        case "default":
            return Rope(theta)
        case "linear":
            return linear(theta, settings.number("factor"), head_dim)
        case "llama3":
            return _llama3(theta, settings, head_dim)
    raise settings.refusal("rope_type" if "rope_type" in settings else "type", "known are default, linear and llama3")


def linear(theta: float, factor: float, head_dim: int) -> Rope:
    """Divide positions by `factor` (position interpolation, Chen et al. 2023)."""
    return Rope(theta) if factor == 1 else Rope(theta, (float(factor),) * (head_dim // 2))


def stretched(max_position: int, rope: Rope) -> int:
    """Return the context of a model that was trained on `max_position` tokens before its frequencies were scaled.

    It grows as much as all frequencies are slowed: by the factor of linear scaling, as in vLLM. Llama 3's scaling
    leaves the highest ones alone, and its `max_position` counts the scaling already.
    """
    return max_position if rope.factors is None else max(1, int(max_position * min(rope.factors)))


def _llama3(theta: float, settings: Settings, head_dim: int) -> Rope:
    """Scale frequencies as Llama 3.1 does.

    Wavelengths above `original / low_freq_factor` are stretched by `factor`, those below `original / high_freq_factor`
    are kept, and those between are interpolated (Grattafiori et al. 2024; the formula is that of Meta's reference code,
    `apply_scaling`).
    """
    factor = settings.number("factor")
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    original = settings.number("original_max_position_embeddings")
    if high <= low:
        raise settings.refusal("high_freq_factor", f"it must be above low_freq_factor, {low}")

    def one(index: int) -> float:
        wavelength: float = 2 * math.pi * theta ** (2 * index / head_dim)
        if wavelength < original / high:
            return 1.0
        if wavelength > original / low:
            return float(factor)
        smooth = (original / wavelength - low) / (high - low)
        return 1 / ((1 - smooth) / factor + smooth)

    return Rope(theta, tuple(map(one, range(head_dim // 2))))
