"""Calls a kernel as XLA would, with a frame made by hand: for self-tests at load, where no program is compiled yet.

There is no thread pool behind such a call, so it works on the calling thread alone.
"""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np

# (arguments, results, attributes): calls a kernel, which fills the results
type Call = Callable[[Sequence[np.ndarray], Sequence[np.ndarray], Sequence[int]], None]


def call(
    handler: int, arguments: Sequence[np.ndarray], results: Sequence[np.ndarray], attributes: Sequence[int]
) -> None:
    """Call the handler at an address.

    Args:
        handler: the C function's address.
        arguments: contiguous arrays; a bfloat16 one may be given as uint16.
        results: contiguous arrays that the kernel fills.
        attributes: in the order of their names.
    """
    held: list[np.ndarray] = []

    def words(*values: int) -> int:
        held.append(np.array(values, np.int64))
        return int(held[-1].ctypes.data)

    def buffers(arrays: Sequence[np.ndarray]) -> list[int]:
        described = [words(48, 0, 0, array.ctypes.data, array.ndim, words(*array.shape)) for array in arrays]
        return [40, 0, len(arrays), 0, words(*described)]

    scalars = [words(0, words(value)) for value in attributes]
    frame = [176, 0, 0, 0, 3, *buffers(arguments), *buffers(results), 48, 0, len(scalars), 0, 0, words(*scalars), 0]
    ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(handler)(words(*frame))
