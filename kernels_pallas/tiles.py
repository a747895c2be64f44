"""Sizes of tiles."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeTiles:
    """Tokens of a split and tiles in each ring."""

    split: int
    stages: int


@dataclass(frozen=True)
class PrefillTiles:
    """Tokens of a tile and tiles in the ring."""

    tile: int
    stages: int
