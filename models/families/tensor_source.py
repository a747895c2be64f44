"""The place of a decoder's parameter in a checkpoint: which rows of which tensor, and in which order.

A checkpoint stores a projection as [out, in] rows; the decoder keeps it as [in, out] (`layers.py` says why), with `out`
or `in` divided into heads. `Source` names the rows; `checkpoints/streaming.py` copies them, a block at a time. A
parameter that is a stack of matrices, experts, has a place for each of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Source:
    """The place of one matrix in a checkpoint: `rows` rows of a tensor from `first_row` on, each `row_step`-th.

    The tensor is seen as a matrix whose rows lie along its last axis; a vector is a matrix with one column.
    """

    tensor: str  # name
    shape: tuple[int, ...]  # of the tensor in the file (numpy order)
    transposed: bool = False  # whether the parameter is the transpose of the rows
    first_row: int = 0
    row_step: int = 1
    rows: int | None = None  # None: all rows
    first_column: int = 0
    column_step: int = 1  # the columns are each so-many-th from `first_column` on
    # Head size D if the file has the two halves of each rotary pair as neighbours (2i, 2i + 1); None: as halves of the
    # head (i, i + D / 2), like the decoder.
    rotary_pairs: int | None = None
    offset: float = 0.0  # added to every value

    @property
    def taken(self) -> tuple[int, int]:
        """Return how many rows and columns of the tensor these are."""
        first = self.shape[0] if len(self.shape) == 1 else math.prod(self.shape[:-1])
        columns = 1 if len(self.shape) == 1 else self.shape[-1]
        return first if self.rows is None else self.rows, len(range(self.first_column, columns, self.column_step))

    @property
    def is_moved(self) -> bool:
        """Return whether the values lie in the tensor in another order than in the parameter, or are changed."""
        is_sparse = self.row_step > 1 or self.column_step > 1
        return self.transposed or self.rotary_pairs is not None or self.offset != 0 or is_sparse


# The place of a parameter: of one matrix, or of each of those that its first axis counts.
type Places = Source | tuple[Source, ...]


def each(places: Places) -> tuple[Source, ...]:
    """Return the places of a parameter's matrices."""
    return (places,) if isinstance(places, Source) else places


def renamed(places: Places, name: Callable[[str], str]) -> Places:
    """Return the same places in tensors of other names."""
    if isinstance(places, Source):
        return replace(places, tensor=name(places.tensor))
    return tuple(replace(source, tensor=name(source.tensor)) for source in places)


def stacked(tensor: str, count: int, rows: int, columns: int) -> Places:
    """Name the places of `count` matrices [rows, columns] that are the transposes of a parameter's.

    They are tensors of their own if their name has a {} for the number of the matrix, and otherwise one tensor.
    """
    if "{}" in tensor:
        return tuple(Source(tensor.format(index), (rows, columns), transposed=True) for index in range(count))
    whole = Source(tensor, (count, rows, columns), transposed=True, rows=rows)
    return tuple(replace(whole, first_row=index * rows) for index in range(count))
