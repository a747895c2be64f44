"""What family files share: where a parameter comes from, and reading numbers from a checkpoint's metadata."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CheckpointError


def _unchanged(w: np.ndarray) -> np.ndarray:
    return w


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, its shape there (numpy order), and the function that makes the parameter of it."""

    tensor: str
    shape: tuple[int, ...]
    transform: Callable[[np.ndarray], np.ndarray] = _unchanged


def number(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number from GGUF metadata.

    Raises:
        CheckpointError: the key is absent and has no default, or its value is not one positive number.
    """
    found = metadata.get(key, default)
    if found is None:
        raise CheckpointError(f"The metadata has no {key!r}, which the architecture needs.")
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found <= 0:
        raise CheckpointError(f"{key} = {str(found)[:80]} is not implemented: one positive number is expected.")
    return found


def integer(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer from GGUF metadata; raises as `number` does."""
    found = number(metadata, key, default)
    if not isinstance(found, int):
        raise CheckpointError(f"{key} = {found} is not implemented: an integer is expected.")
    return found
