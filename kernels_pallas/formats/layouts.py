"""The formats that weights are kept in, as rows of data: how many bits, how many inputs share a scale, what 0 is.

GGUF's formats have the names that it gives them. Those of Hugging Face's checkpoints are named KIND-GROUP-DTYPE, such
as UINT4-128-float16, by the kind of their values, the inputs that share a scale, and the type of the scales:

    FP8     floats of 8 bits (e4m3fn, whose NaN no file may hold)
    INT8    integers, kept as u = value + 128
    INT4    integers, kept as u = value + 8
    UINT8   u >= 0, and for each group the u that stands for 0 ("zero point")
    UINT4   likewise

A scale for a whole output, or for a matrix, is kept once for each group: 1/16 of a byte of float32 a weight with groups
of 128. `kernels_pallas/block_tiles.py` has the layout of the arrays. Not here: how files hold such weights.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

type Kind = Literal["FP8", "INT8", "INT4", "UINT8", "UINT4"]

WITH_ZEROS: Mapping[Kind, Kind] = {"INT8": "UINT8", "INT4": "UINT4"}  # what integers are where they have zero points

_BITS = {"uint8": 8, "float16": 16, "bfloat16": 16, "float32": 32}


class Layout(NamedTuple):
    """How a format's values are kept."""

    bits: int  # of a value
    group: int  # inputs that share a scale
    zero: int  # the value that stands for 0, or for the smallest value if there are mins
    has_mins: bool
    scale_dtype: str  # holds the scales without rounding; uint8: they are exponents
    codes: tuple[float, ...] | None = None  # the number that each value stands for; None: the value less `zero`
    float_dtype: str | None = None  # of 8 bits: the values are floats of this type; None: they are none
    has_zeros: bool = False  # the mins are uint8, and each is the value that stands for 0 in its group

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of a weight with its part of scales and mins."""
        scale = _BITS[self.scale_dtype]
        mins = _BITS["uint8"] if self.has_zeros else scale
        return self.bits + (scale + (mins if self.has_mins else 0)) / self.group


# Of FP4 (E2M1): a sign, and a number of four bits' other three (OCP Microscaling Formats 1.0).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP8 = "float8_e4m3fn"
OUTPUTS, BLOCK = 16, 32  # of a tile, which lies together: outputs, and inputs of each of its blocks
GROUPS = (128, 64, 32)
_SCALES = ("float16", "bfloat16", "float32")
_DEVICES = 8  # that a matrix with one scale for all inputs stays divisible over


def _grouped(group: int, scale_dtype: str) -> dict[Kind, Layout]:
    return {
        "FP8": Layout(8, group, 0, has_mins=False, scale_dtype=scale_dtype, float_dtype=FP8),
        "INT8": Layout(8, group, 128, has_mins=False, scale_dtype=scale_dtype),
        "INT4": Layout(4, group, 8, has_mins=False, scale_dtype=scale_dtype),
        "UINT8": Layout(8, group, 0, has_mins=True, scale_dtype=scale_dtype, has_zeros=True),
        "UINT4": Layout(4, group, 0, has_mins=True, scale_dtype=scale_dtype, has_zeros=True),
    }


def layout_name(kind: Kind, group: int, scale_dtype: str) -> str:
    """Name a format of `LAYOUTS` by its kind, its group and the type of its scales."""
    return f"{kind}-{group}-{scale_dtype}"


def kept_layout(kind: Kind, group: int, inputs: int, scale_dtype: str) -> str | None:
    """Name the layout that holds a matrix of a checkpoint without loss; None: there is none.

    Args:
        kind: of its values.
        group: its inputs that share a scale; as many as there are, or more: all do.
        inputs: of the matrix.
        scale_dtype: of its scales.
    """
    if inputs % BLOCK:
        return None
    kept = next((size for size in GROUPS if inputs % size == 0 and group % size == 0), None)
    if group >= inputs:
        kept = repeated_group(inputs, LAYOUTS[layout_name(kind, BLOCK, scale_dtype)].bits, _BITS[scale_dtype])
    return None if kept is None else layout_name(kind, kept, scale_dtype)


def repeated_group(inputs: int, bits: int, scale_bits: int) -> int | None:
    """Return for how many inputs a scale that all of them share is kept, once for each group.

    So many that the matrix stays divisible over up to eight devices as far as its blocks are, if that costs no more
    than an eighth of the values' bytes. None: the inputs are no whole blocks.
    """
    dividing = [group for group in GROUPS if inputs % group == 0]
    cheap = [group for group in dividing if 8 * scale_bits <= group * bits] or dividing
    least = min(GROUPS)
    fine = [group for group in cheap if inputs // group % math.gcd(inputs // least, _DEVICES) == 0]
    return next(iter(fine or cheap[-1:]), None)


LAYOUTS: Mapping[str, Layout] = {
    "Q8_0": Layout(8, 32, 128, has_mins=False, scale_dtype="float16"),
    "Q5_0": Layout(5, 32, 16, has_mins=False, scale_dtype="float16"),
    "Q4_0": Layout(4, 32, 8, has_mins=False, scale_dtype="float16"),
    "Q4_1": Layout(4, 32, 0, has_mins=True, scale_dtype="float16"),
    "Q6_K": Layout(6, 16, 32, has_mins=False, scale_dtype="float32"),
    "Q4_K": Layout(4, 32, 0, has_mins=True, scale_dtype="float32"),
    "MXFP4": Layout(4, 32, 0, has_mins=False, scale_dtype="uint8", codes=_FP4),
} | {
    layout_name(kind, group, dtype): layout
    for group in GROUPS
    for dtype in _SCALES
    for kind, layout in _grouped(group, dtype).items()
}
