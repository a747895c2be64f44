"""Reading numbers from a checkpoint's own settings: GGUF metadata or a Hugging Face config.json."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError


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
