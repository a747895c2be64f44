"""Where a parameter of the decoder comes from in a checkpoint: which rows of which tensor, and how they lie there.

A checkpoint stores a projection as [out, in] rows; the decoder keeps it as [in, out] (`layers.py` says why), with `out`
or `in` divided into heads. `Source` says what the rows are; `models/streaming.py` copies them, a block at a time.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """The place of one parameter in a checkpoint.

    Seen as a matrix of `rows` rows (a vector is one column of them), the parameter is rows `first_row` to
    `first_row + rows` of `tensor`, which has the shape `shape` in the file (numpy order), turned around where
    `transposed`. `rotary_pairs`: None, or the head size where the file keeps the two halves of each rotary pair as
    neighbours (2i, 2i + 1) and not as halves of the head (i, i + D / 2). `offset` is added to every value.
    """

    tensor: str
    shape: tuple[int, ...]
    transposed: bool = False
    first_row: int = 0
    rows: int | None = None  # None: all of them
    rotary_pairs: int | None = None
    offset: float = 0.0
