"""Sizes of tiles, by kernel, architecture, head_dim, query heads of a key/value head, page size and length class.

`tiles.json` holds what `scripts/tune.py` measured; for what it does not hold there are defaults that fit the shared
memory and spill no registers. Nothing is measured here, and nothing depends on the number of requests in a call: the
split size decides in which order a request's sums are made.
"""

import functools
import importlib.resources
import json
from dataclasses import dataclass

HOPPER = "sm_90"
LENGTH_CLASSES = (2048, 8192, 32768, 131072)  # tokens that a request can have, at most; longer ones are in the last


@dataclass(frozen=True)
class DecodeTiles:
    """Tokens of a split, a multiple of 64, and tiles in each ring."""

    split: int
    stages: int


@dataclass(frozen=True)
class PrefillTiles:
    """Tokens of a tile, a multiple of 64, and tiles in the ring."""

    tile: int
    stages: int


def length_class(tokens: int) -> int:
    """The smallest class that holds so many tokens."""
    return next((limit for limit in LENGTH_CLASSES if tokens <= limit), LENGTH_CLASSES[-1])


def decode_tiles(head_dim: int, group: int, page_size: int, capacity: int) -> DecodeTiles:
    """For requests of up to `capacity` visible tokens."""
    measured = _measured().get(("decode", HOPPER, head_dim, group, page_size, length_class(capacity)))
    if measured is not None:
        return DecodeTiles(*measured)
    return DecodeTiles(max(512, length_class(capacity) // 64), {64: 4, 128: 2, 256: 2}[head_dim])


def prefill_tiles(head_dim: int, group: int, page_size: int, capacity: int) -> PrefillTiles:
    """For requests of up to `capacity` visible tokens."""
    measured = _measured().get(("prefill", HOPPER, head_dim, group, page_size, length_class(capacity)))
    if measured is not None:
        return PrefillTiles(*measured)
    return {64: PrefillTiles(128, 3), 128: PrefillTiles(128, 2), 256: PrefillTiles(64, 2)}[head_dim]


@functools.cache
def _measured() -> dict[tuple[str | int, ...], tuple[int, int]]:
    text = (importlib.resources.files(__package__) / "tiles.json").read_text()
    return {tuple(row[:-1]): tuple(row[-1]) for row in json.loads(text)}
