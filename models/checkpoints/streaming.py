"""Loads parameters from tensor files onto devices, in bounded memory.

One parameter at a time gets a host buffer of its final shape and dtype; rows are read, dequantised, checked to be
finite and copied into it a block at a time; then every mesh takes its shards from it. Besides the parameters on the
devices (on CPU: in the same memory) there is never more than one such buffer and a few blocks. Files are read, not
mapped: mapped pages count as the process's memory as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from ..families.tensor_source import Source
from ..quantized import Described
from .finite import is_finite, refusal

# Bytes of a block in the float32 that dequantisation gives. As much as a core's cache holds, because most blocks are
# transposed: with 16 MiB a model in bfloat16 took twice as long to load.
BLOCK_BYTES = 1 << 20
# XLA CPU uses a host buffer that is aligned like this without copying it.
_ALIGNMENT = 64


class TensorFile(Protocol):
    """A file, or several, of tensors by name: a GGUF file, or the safetensors files of a directory."""

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop - 1` of tensor `name` as [stop - start, columns], dequantised.

        A vector has one column.

        Raises:
            CheckpointError: the file can no longer be read, or there is no dequantiser for the tensor's type.
        """
        ...

    def path_of(self, name: str) -> Path:
        """Return the file that holds tensor `name`, for messages."""
        ...


type Wanted = Mapping[str, Sequence[Described]]
"""Parameter path -> a description per mesh: the shape in the checkpoint's model, the wanted dtype, and a sharding; or
those of the arrays of a parameter that is to stay quantised, on every mesh alike."""


def stream(
    file: TensorFile,
    sources: Mapping[str, Source],
    wanted: Mapping[str, Sequence[jax.ShapeDtypeStruct]],
    *,
    allow_nonfinite: bool,
) -> Iterator[tuple[str, tuple[jax.Array, ...]]]:
    """Yield each wanted path with its arrays, one per mesh, in the order of `wanted`; see `Checkpoint.load`."""
    for path, places in wanted.items():
        host = read(file, sources[path], places[0], allow_nonfinite=allow_nonfinite)
        # Wait, so that the host buffer is freed before the next one is allocated.
        yield path, jax.block_until_ready(tuple(jax.device_put(host, place.sharding) for place in places))


def read(file: TensorFile, source: Source, like: jax.ShapeDtypeStruct, *, allow_nonfinite: bool) -> np.ndarray:
    """Read one parameter into a host array of the shape and dtype of `like`.

    Raises:
        CheckpointError: as `TensorFile.read_rows` does; or a value that is not finite, unless `allow_nonfinite`.
    """
    out = aligned(like.shape, like.dtype)
    rows = source.shape[0] if source.rows is None else source.rows
    matrix = out.reshape(-1, rows).T if source.transposed else out.reshape(rows, -1)  # [rows, columns]
    unit = source.rotary_pairs or 1
    step = max(1, BLOCK_BYTES // (4 * matrix.shape[1] * unit)) * unit
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            block = file.read_rows(source.tensor, source.first_row + start, source.first_row + stop)
            moved = block + np.float32(source.offset) if source.offset else block
            cast = np.ascontiguousarray(moved, out.dtype)  # before it is transposed: that is faster, too
        if not allow_nonfinite and not is_finite(cast):
            raise refusal(file.path_of(source.tensor), source.tensor, source.first_row + start, block, out.dtype)
        matrix[start:stop] = halves(cast, source.rotary_pairs) if source.rotary_pairs else cast
    return out


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows of whole heads: rotary pairs that are neighbours become halves of the head."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an uninitialised array whose memory XLA can use without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
