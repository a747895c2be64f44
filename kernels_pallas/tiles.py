"""Sizes of tiles by kernel, architecture, head_dim, query heads per key/value head, page size and length class.

`tiles.json` holds the sizes that `scripts/tune.py` measured; defaults for all others fit in shared memory and spill no
registers. Nothing is measured here, and no size depends on the number of requests in a call: the split size determines
the order in which a request's values are added.
"""

import functools
import importlib.resources
import json
from dataclasses import dataclass

HOPPER = "sm_90"
LENGTH_CLASSES = (2048, 8192, 32768, 131072)  # the most tokens of a request; longer requests are in the last class


@dataclass(frozen=True)
class DecodeTiles:
    """Sizes of the decode kernel."""

    split: int  # tokens of a split, a multiple of 64
    stages: int  # tiles in each ring


@dataclass(frozen=True)
class PrefillTiles:
    """Sizes of the prefill kernel."""

    tile: int  # tokens of a tile, a multiple of 64
    stages: int  # tiles in the ring


def length_class(tokens: int) -> int:
    """Find the smallest class for a request of `tokens` tokens."""
    return next((limit for limit in LENGTH_CLASSES if tokens <= limit), LENGTH_CLASSES[-1])


def decode_tiles(
    head_dim: int, group: int, page_size: int, capacity: int, *, is_quantized: bool = False
) -> DecodeTiles:
    """Look up the decode kernel's sizes for requests of up to `capacity` visible tokens.

    With pages of 8 bits, raw tiles take their part of shared memory; those sizes are not measured.
    """
    split = max(512, length_class(capacity) // 64)
    if is_quantized:
        return DecodeTiles(split, {64: 4, 128: 2, 256: 1}[head_dim])
    measured = _measured().get(("decode", HOPPER, head_dim, group, page_size, length_class(capacity)))
    if measured is not None:
        return DecodeTiles(*measured)
    return DecodeTiles(split, {64: 4, 128: 2, 256: 2}[head_dim])


def prefill_tiles(
    head_dim: int, group: int, page_size: int, capacity: int, *, is_quantized: bool = False
) -> PrefillTiles:
    """Look up the prefill kernel's sizes for requests of up to `capacity` visible tokens; 8 bits as in decode.

    There are none for pages of 8 bits with head_dim 256.
    """
    if is_quantized:
        return {64: PrefillTiles(128, 3), 128: PrefillTiles(64, 3)}[head_dim]
    measured = _measured().get(("prefill", HOPPER, head_dim, group, page_size, length_class(capacity)))
    if measured is not None:
        return PrefillTiles(*measured)
    return {64: PrefillTiles(128, 3), 128: PrefillTiles(128, 2), 256: PrefillTiles(64, 2)}[head_dim]


@functools.cache
def _measured() -> dict[tuple[str | int, ...], tuple[int, int]]:
    text = (importlib.resources.files(__package__) / "tiles.json").read_text()
    return {tuple(row[:-1]): tuple(row[-1]) for row in json.loads(text)}
