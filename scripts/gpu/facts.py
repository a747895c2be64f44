"""The report of `gpu_suite.py`: a tree of results, merged from pieces and saved on disk. No JAX."""

import json
import math
import os
from pathlib import Path
from typing import Any

type Facts = dict[str, Any]


def merge(facts: Facts, piece: Facts) -> None:
    """Add a piece to the report; tables of the same name become one."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(facts.get(key), dict):
            merge(facts[key], value)
        else:
            facts[key] = value


def line(piece: Facts) -> str:
    """Write a piece as one line of JSON; JSON has no NaN and no infinity, so they become null."""
    return json.dumps(_finite(piece), allow_nan=False)


def read(text: str) -> Facts:
    """Read a piece from its line; empty if the line is incomplete, like the last one of a process that was killed."""
    try:
        piece = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return piece if isinstance(piece, dict) else {}


def save(report: Facts, path: str | Path) -> None:
    """Replace the saved report atomically: a reader at the same time, or after a crash, finds the previous one."""
    beside = Path(f"{path}.new")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(beside, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
