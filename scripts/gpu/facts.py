"""The report of `gpu_suite.py`: a tree of what was found, put together from pieces and kept on disk. No JAX."""

import json
import math
import os
from pathlib import Path
from typing import Any

type Facts = dict[str, Any]


def merge(facts: Facts, piece: Facts) -> None:
    """Add a piece to what was found; tables of the same name become one."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(facts.get(key), dict):
            merge(facts[key], value)
        else:
            facts[key] = value


def line(piece: Facts) -> str:
    """A piece as JSON in one line; JSON has no NaN and no infinity, so they become null."""
    return json.dumps(_finite(piece), allow_nan=False)


def read(text: str) -> Facts:
    """A piece from its line; nothing where the line is not whole, as the last one of a process that was killed."""
    try:
        piece = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return piece if isinstance(piece, dict) else {}


def save(report: Facts, path: str | Path) -> None:
    """Write the report, whole or not at all: a reader meanwhile, or after a crash, finds the one before."""
    beside = Path(f"{path}.new")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(beside, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
