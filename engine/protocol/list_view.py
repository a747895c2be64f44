"""The first items of a list that goes on growing, without a copy of them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np


class ListView[T](Sequence[T]):
    """Reads as a list of the first `count` items of `items`, to which others may be appended meanwhile, and nothing
    else may be done. `list(view)`, a slice or a pickle is a list of its own."""

    __slots__ = ("_count", "_items")
    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __init__(self, items: Sequence[T], count: int) -> None:
        """`count`: of the items that are there."""
        self._items, self._count = items, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._items[i] for i in range(*index.indices(self._count))]
        return self._items[range(self._count)[index]]

    def __iter__(self) -> Iterator[T]:
        return islice(self._items, self._count)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, list | ListView) else NotImplemented

    def __add__(self, other: Sequence[T]) -> list[T]:
        return [*self, *other]

    def __radd__(self, other: Sequence[T]) -> list[T]:
        return [*other, *self]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(list(self), dtype)

    def __reduce__(self) -> tuple[type[list[T]], tuple[list[T]]]:
        return list, (list(self),)

    def __repr__(self) -> str:
        return repr(list(self))
