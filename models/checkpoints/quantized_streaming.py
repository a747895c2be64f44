"""Loads parameters that stay quantised from their files onto devices, in bounded memory, as `streaming.py` does floats.

The arrays of one parameter at a time get host buffers of their final shape; rows are read, packed into
tiles, checked to have finite scales and copied into them; then every mesh takes its shards. A loaded parameter also
becomes floats here, for devices that are to have those.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import numpy as np

from ...kernels_pallas.block_tiles import LAYOUTS, OUTPUTS, Parts, Tiles, pack_parts, scale_values
from ...kernels_pallas.quantized import QuantizedArray, dequantize
from .. import placing
from ..families.tensor_source import Places, Source, each
from ..quantized import Weight
from .finite import is_finite, refusal
from .host_memory import FileMaps, aligned_empty
from .streaming import (
    BLOCK_BYTES,
    Report,
    StreamedTensors,
    TensorFile,
    Wanted,
    WantedQuantized,
    bytes_of,
    check_files,
    divide,
    halves,
    ignore,
)


class BlockFile(TensorFile, Protocol):
    """A file whose tensors can also be read as they are quantised."""

    def read_parts(self, name: str, start: int, stop: int, group: int) -> Parts:
        """Read rows `start` to `stop - 1` of matrix `name`: values, and scales and mins for each `group` inputs.

        Raises:
            CheckpointError: the file can no longer be read.
        """
        ...


class StreamedWeights[File: TensorFile](StreamedTensors[File]):
    """As `StreamedTensors`, and of blocks too, where parameters stay quantised."""

    _blocks: BlockFile | None  # the files; None: all that they hold is floats here

    def load(
        self,
        wanted: Wanted,
        *,
        allow_nonfinite: bool = False,
        maps: FileMaps | None = None,
        report: Report = ignore,
    ) -> Iterator[tuple[str, tuple[Weight, ...]]]:
        """Load parameters straight onto devices, those of floats first; see `Checkpoint.load`."""
        yield from super().load(wanted, allow_nonfinite=allow_nonfinite, maps=maps, report=report)
        if self._blocks is not None:
            _, quantized = divide(wanted)
            yield from _stream(self._blocks, self._sources, quantized, allow_nonfinite=allow_nonfinite, report=report)


def _stream(
    file: BlockFile, sources: Mapping[str, Places], wanted: WantedQuantized, *, allow_nonfinite: bool, report: Report
) -> Iterator[tuple[str, tuple[Weight, ...]]]:
    """Yield each wanted path with its parameter on every mesh, in the order of `wanted`; see `Checkpoint.load`."""
    for path, places in wanted.items():
        host = _read(file, sources[path], places[0], allow_nonfinite=allow_nonfinite, report=report)
        yield path, jax.block_until_ready(tuple(put(host, place) for place in places))
    check_files(file, (sources[path] for path in wanted))


def put(host: QuantizedArray, place: QuantizedArray) -> QuantizedArray:
    """Put a parameter's arrays where `place` describes them."""
    placed: QuantizedArray = jax.tree.map(lambda array, like: placing.put(array, like.sharding), host, place)
    return placed


def _read(
    file: BlockFile, places: Places, like: QuantizedArray, *, allow_nonfinite: bool, report: Report
) -> QuantizedArray:
    """Read one parameter into host arrays as `like` describes them.

    Raises:
        CheckpointError: as `BlockFile.read_parts` does; or a scale that is not finite, unless `allow_nonfinite`.
    """
    out: QuantizedArray = jax.tree.map(lambda array: aligned_empty(array.shape, array.dtype), like)
    for index, source in enumerate(each(places)):
        part = out.matrix_at(index) if out.stacked else out
        _read_matrix(file, source, part, allow_nonfinite=allow_nonfinite, report=report)
    return out


def _read_matrix(
    file: BlockFile, source: Source, out: QuantizedArray, *, allow_nonfinite: bool, report: Report
) -> None:
    """Read one matrix into its host arrays."""
    (rows, columns), unit = out.matrix, math.lcm(OUTPUTS, source.rotary_pairs or 1)
    step = max(1, BLOCK_BYTES // (4 * columns * unit)) * unit
    for start in range(0, rows, step):
        every, count = source.row_step, min(start + step, rows) - start
        first = source.first_row + start * every
        last = first + (count - 1) * every + 1
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            parts = file.read_parts(source.tensor, first, last, out.block)
            packed = pack_parts(out.format, _in_order(parts, source, every))
        if not allow_nonfinite and not _are_finite(out.format, packed):
            floats = file.read_rows(source.tensor, first, last)[::every]
            path, dtype = file.path_of(source.tensor), np.dtype(np.float32)
            raise refusal(path, source.tensor, first, floats, dtype, row_step=every)
        tiles = slice(start // OUTPUTS, start // OUTPUTS + packed.values.shape[0])
        for (_, array), part in zip(out.parts(), packed, strict=False):
            array[tiles] = part
        report(bytes_of(file, source, count))


def _in_order(parts: Parts, source: Source, every: int) -> Parts:
    """Take every so-manieth row, in the order of the parameter."""
    pairs = source.rotary_pairs

    def ordered(rows: np.ndarray) -> np.ndarray:
        return rows[::every] if pairs is None else halves(rows[::every], pairs)

    mins = None if parts.mins is None else ordered(parts.mins)
    return Parts(ordered(parts.values), ordered(parts.scales), mins)


def _are_finite(format_name: str, packed: Tiles) -> bool:
    """Return whether scales are finite, and so small that the numbers of four bits that they multiply stay so."""
    scales = scale_values(format_name, packed.scales)
    codes = LAYOUTS[format_name].codes
    if codes is not None:
        with np.errstate(over="ignore"):
            scales = scales * np.float32(max(codes))
    return all(is_finite(x) for x in (scales, packed.mins) if x is not None)


def as_floats(w: QuantizedArray, dtype: np.dtype) -> np.ndarray:
    """Dequantise a parameter on the host, `BLOCK_BYTES` of float32 at a time: [*shape] of `dtype`."""
    out = aligned_empty(w.shape, dtype)
    for index in range(w.shape[0]) if w.stacked else ():
        _dequantize_into(out[index], w.matrix_at(index))
    if not w.stacked:
        _dequantize_into(out, w)
    return out


def _dequantize_into(out: np.ndarray, w: QuantizedArray) -> None:
    n, k = w.matrix
    matrix = out.reshape(k, n).T if w.inputs else out.reshape(n, k)
    step = max(1, BLOCK_BYTES // (4 * k * OUTPUTS))
    for start in range(0, w.values.shape[0], step):
        tiles, first = slice(start, start + step), start * OUTPUTS
        with np.errstate(over="ignore", invalid="ignore"):
            rows = dequantize(jax.tree.map(lambda array, tiles=tiles: array[tiles], w)).astype(out.dtype)
        matrix[first : first + len(rows)] = rows[: n - first]
