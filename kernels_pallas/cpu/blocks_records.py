"""The buffer in which a product with quantised weights keeps its activations: a record for each block of 8 rows.

Rounded to int8, a record has the block's 32 numbers of each row, then a scale for each row, then for each group of the
block and each row what its sum of activations is needed for. Rounded to 16 bits, it has 32 high parts of each row, then
the low parts, and then the same. As floats it has the numbers alone.
"""

from typing import Literal

from ..block_tiles import BLOCK, Layout

type Activations = Literal["int8", "int16", "float"]
"""What a product with quantised weights multiplies: activations rounded to 8 or 16 bits by blocks, or as they are."""

KINDS: tuple[Activations, ...] = ("int8", "int16", "float")  # a kernel's parameter is an index here
ROWS = 8  # of activations, which a record has side by side
ACTIVATIONS = ROWS * BLOCK  # bytes of the numbers in int8, or of the high or low parts
PER_ROW = 4 * ROWS  # bytes of a number for each row
LARGEST = {"int8": 127, "int16": 127 * 255 + 127}  # what a block's largest number becomes
LOW = 255  # 16 bits are LOW times the high part plus the low part, each from -127 to 127
_LINE = 64
_BYTES = {"int8": 1, "int16": 2, "float": 4}


def numbers_bytes(activations: Activations) -> int:
    """Count the bytes of a record's numbers."""
    return ACTIVATIONS * _BYTES[activations]


def record_bytes(layout: Layout, activations: Activations) -> int:
    """Count the bytes of a record."""
    numbers = numbers_bytes(activations)
    if activations == "float":
        return numbers
    return -(-(numbers + (1 + BLOCK // layout.group) * PER_ROW) // _LINE) * _LINE


def room_bytes(rows: int, inputs: int, layout: Layout, activations: Activations) -> int:
    """Count the bytes of the buffer of a call with [rows, inputs] activations."""
    return -(-rows // ROWS) * (inputs // BLOCK) * record_bytes(layout, activations)
