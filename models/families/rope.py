"""Converts rotary embeddings as checkpoints describe them to `Rope`. Static scaling is one factor per frequency.

YaRN also scales the scores: `Rope.magnitude`. Dynamic kinds (dynamic NTK, longrope), whose frequencies depend on the
length of the prompt, are refused by name.
"""

import math
from dataclasses import dataclass
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
    match kind_of(settings):
        case "default":
            return Rope(theta)
        case "linear":
            return linear(theta, settings.number("factor"), head_dim)
        case "llama3":
            return _llama3(theta, settings, head_dim)
        case "yarn":
            for key in ("mscale", "mscale_all_dim"):  # DeepSeek's
                settings.refuse(key)
            magnitude = settings.number("attention_factor") if "attention_factor" in settings else None
            correction = Correction(
                settings.number("beta_fast", 32.0), settings.number("beta_slow", 1.0), settings.flag("truncate", True)
            )
            original = settings.number("original_max_position_embeddings")
            return yarn(theta, settings.number("factor"), original, head_dim, correction, magnitude)
    known = "known are default, linear, llama3 and yarn"
    raise settings.refusal("rope_type" if "rope_type" in settings else "type", known)


def kind_of(settings: Settings) -> Any:
    """Return the type of rope scaling that one of Hugging Face's objects names, unchecked."""
    return settings.get("rope_type", settings.get("type", "default"))


def linear(theta: float, factor: float, head_dim: int) -> Rope:
    """Divide positions by `factor` (position interpolation, Chen et al. 2023)."""
    return Rope(theta) if factor == 1 else Rope(theta, (float(factor),) * (head_dim // 2))


def stretched(max_position: int, rope: Rope) -> int:
    """Return the context of a model that was trained on `max_position` tokens before its frequencies were scaled.

    It grows as much as all frequencies are slowed: by the factor of linear scaling, as in vLLM. Llama 3's scaling
    leaves the highest ones alone, and its `max_position` counts the scaling already.
    """
    return max_position if rope.factors is None else max(1, int(max_position * min(rope.factors)))


@dataclass(frozen=True)
class Correction:
    """Which frequencies YaRN leaves alone, and which it slows in full: by turns within the original context."""

    fast: float = 32.0  # from so many turns on: left alone
    slow: float = 1.0  # up to so many turns: slowed by the factor
    is_truncated: bool = True  # whether the bounds are rounded outwards to whole dimensions


def yarn(
    theta: float,
    factor: float,
    original: float,
    head_dim: int,
    correction: Correction,
    magnitude: float | None = None,
) -> Rope:
    """Scale frequencies and scores as YaRN does (Peng et al. 2023, section 3.4, in the form of Hugging Face).

    Args:
        theta: the base.
        factor: how much longer the context is than the original one.
        original: the original context in tokens.
        head_dim: size of a head.
        correction: which frequencies are slowed.
        magnitude: of rotated queries and keys; None: 0.1 ln(factor) + 1.
    """

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(correction.fast), dimension(correction.slow)
    if correction.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001

    def one(index: int) -> float:
        slowed = min(max((index - low) / width, 0.0), 1.0)
        return 1 / (slowed / factor + 1 - slowed)

    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return Rope(theta, tuple(map(one, range(head_dim // 2))), usual if magnitude is None else float(magnitude))


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
