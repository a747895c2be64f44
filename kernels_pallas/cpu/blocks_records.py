"""The buffer in which a product with quantised weights keeps its activations: a record for each block of 8 rows.

Rounded to int8, a record has the block's 32 numbers of each row, then a scale for each row, then for each group of the
block and each row what its sum of activations is needed for. As floats it has the numbers alone.
"""

from ..block_tiles import BLOCK, Layout

ROWS = 8  # of activations, which a record has side by side
ACTIVATIONS = ROWS * BLOCK  # bytes of the numbers in int8
PER_ROW = 4 * ROWS  # bytes of a number for each row
_LINE = 64


def record_bytes(layout: Layout, is_float: bool) -> int:
    """Count the bytes of a record."""
    if is_float:
        return 4 * ACTIVATIONS
    return -(-(ACTIVATIONS + (1 + BLOCK // layout.group) * PER_ROW) // _LINE) * _LINE


def room_bytes(rows: int, inputs: int, layout: Layout, is_float: bool) -> int:
    """Count the bytes of the buffer of a call with [rows, inputs] activations."""
    return -(-rows // ROWS) * (inputs // BLOCK) * record_bytes(layout, is_float)
