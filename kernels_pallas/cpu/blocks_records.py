"""The buffer in which a product with quantised weights keeps its activations: a record for each block of 8 rows.

Rounded, a record has the block's 32 numbers of each row, then a scale for each row, then for each group of the block
and each row what its sum of activations is needed for. A number of 16 bits is two of 8, `255 * high + low`, and a row
has all high ones before the low ones. As floats a record has the numbers alone.
"""

from typing import Literal

from ..block_tiles import BLOCK, Layout

ROWS = 8  # of activations, which a record has side by side
PER_ROW = 4 * ROWS  # bytes of a number for each row
_LINE = 64

type Activations = Literal["int8", "int16", "float"]
"""What a product with quantised weights multiplies: activations rounded by blocks to 8 or 16 bits, or as they are."""

NUMBER_BYTES: dict[Activations, int] = {"int8": 1, "int16": 2, "float": 4}  # by the number that kernels know a kind by


def rounded_to(layout: Layout, activations: Activations) -> Activations:
    """Return what activations become where weights of a layout multiply them: floats of 8 bits take floats only."""
    return activations if layout.float_dtype is None else "float"


def record_bytes(layout: Layout, activations: Activations) -> int:
    """Count the bytes of a record."""
    numbers = ROWS * BLOCK * NUMBER_BYTES[activations]
    if activations == "float":
        return numbers
    return -(-(numbers + (1 + max(1, BLOCK // layout.group)) * PER_ROW) // _LINE) * _LINE


def room_bytes(rows: int, inputs: int, layout: Layout, activations: Activations) -> int:
    """Count the bytes of the buffer of a call with [rows, inputs] activations."""
    return -(-rows // ROWS) * (inputs // BLOCK) * record_bytes(layout, activations)
