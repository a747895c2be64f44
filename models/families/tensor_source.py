"""The place of a decoder's parameter in a checkpoint: which rows of which tensor, and in which order.

A checkpoint stores a projection as [out, in] rows; the decoder keeps it as [in, out] (`layers.py` says why), with `out`
or `in` divided into heads. `Source` names the rows; `checkpoints/streaming.py` copies them, a block at a time.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """The place of one parameter in a checkpoint: rows `first_row` to `first_row + rows - 1` of a tensor.

    The tensor is seen as a matrix; a vector is a matrix with one column.
    """

    tensor: str  # name
    shape: tuple[int, ...]  # of the tensor in the file (numpy order)
    transposed: bool = False  # whether the parameter is the transpose of the rows
    first_row: int = 0
    rows: int | None = None  # None: all rows
    # Head size D if the file has the two halves of each rotary pair as neighbours (2i, 2i + 1); None: as halves of the
    # head (i, i + D / 2), like the decoder.
    rotary_pairs: int | None = None
    offset: float = 0.0  # added to every value
