"""Loads parameters from tensor files onto devices, in bounded memory.

One parameter at a time gets a host buffer of its final shape and dtype; rows are read, dequantised, checked to be
finite and copied into it a block at a time; then every mesh takes its shards from it. Besides the parameters on the
devices (on CPUs: in the same memory) there is never more than one such buffer and a few blocks. On CPUs a large
parameter that lies in its file as it is needed can be mapped instead (`host_memory.py`), and is only checked.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ...kernels_pallas.quantized import QuantizedArray
from ..families.tensor_source import Places, Source, each
from ..placing import own_rows, put
from ..quantized import Described, Weight
from .finite import is_finite, refusal
from .host_memory import ALIGNMENT, FEWEST_MAPPED_BYTES, FileMaps, Stamp, aligned_empty, check_unchanged

# Bytes of a block in the float32 that dequantisation gives. As much as a core's cache holds, because most blocks are
# transposed: with 16 MiB a model in bfloat16 took twice as long to load.
BLOCK_BYTES = 1 << 20


class Plain(NamedTuple):
    """The place of a tensor whose bytes are its values."""

    path: Path
    offset: int  # bytes from the start of the file
    dtype: np.dtype[Any]


class Packed(NamedTuple):
    """How the files hold a parameter that is quantised."""

    format: str  # as GGUF calls it
    nbytes: int  # of its values and scales


class TensorFile(Protocol):
    """A file, or several, of tensors by name: a GGUF file, or the safetensors files of a directory."""

    @property
    def stamps(self) -> Mapping[Path, Stamp]:
        """Return what each file looked like when its header was read."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop - 1` of tensor `name` as [stop - start, columns], dequantised.

        Rows lie along the last axis, whatever the number of axes; a vector has one column.

        Raises:
            CheckpointError: the file can no longer be read, or there is no dequantiser for the tensor's type.
        """
        ...

    def path_of(self, name: str) -> Path:
        """Return the file that holds tensor `name`, for messages."""
        ...

    def paths_of(self, name: str) -> tuple[Path, ...]:
        """Return the files that hold parts of tensor `name`."""
        ...

    def nbytes(self, name: str) -> int:
        """Return the bytes that tensor `name` takes in its file."""
        ...

    def plain(self, name: str) -> Plain | None:
        """Return where tensor `name` lies; None where its values have to be computed, as those of quantised ones."""
        ...

    def format_of(self, name: str) -> str | None:
        """Return the format that tensor `name` is quantised in, as GGUF calls it; None: it holds floats."""
        ...


type Wanted = Mapping[str, Sequence[Described]]
"""Parameter path -> a description per mesh: the shape in the checkpoint's model, the wanted dtype, and a sharding; or
those of the arrays of a parameter that is to stay quantised, on every mesh alike."""

type WantedFloats = Mapping[str, Sequence[jax.ShapeDtypeStruct]]
type WantedQuantized = Mapping[str, Sequence[QuantizedArray]]

type Report = Callable[[int], object]
"""Called with a number of bytes of the files, as they are read."""


def ignore(nbytes: int) -> None:
    """Report nothing."""


def divide(wanted: Wanted) -> tuple[WantedFloats, WantedQuantized]:
    """Divide what is wanted into parameters of floats and quantised ones. All meshes want a parameter alike."""
    floats: dict[str, Sequence[jax.ShapeDtypeStruct]] = {}
    quantized: dict[str, Sequence[QuantizedArray]] = {}
    for path, places in wanted.items():
        these = [place for place in places if isinstance(place, QuantizedArray)]
        if these:
            quantized[path] = these
        else:
            floats[path] = [place for place in places if not isinstance(place, QuantizedArray)]
    return floats, quantized


class StreamedTensors[File: TensorFile]:
    """A checkpoint's parameters, each made of a tensor of its files. A subclass says which files and tensors."""

    _file: File
    _sources: Mapping[str, Places]  # by path of the parameter
    formats: Mapping[str, str]  # as in `Checkpoint`

    @property
    def stored_bytes(self) -> int:
        """Return the bytes that the parameters take in the files."""
        return sum(self._file.nbytes(name) for name in {source.tensor for source in self._matrices()})

    @property
    def dequantized(self) -> Mapping[str, Packed]:
        """Return the quantised parameters that become floats in any case; see `Checkpoint.dequantized`."""
        out = dict[str, Packed]()
        for path, places in self._sources.items():
            first, *_ = parts = each(places)
            name = self._file.format_of(first.tensor)
            if name is not None and path not in self.formats:
                out[path] = Packed(name, sum(bytes_of(self._file, source, source.taken[0]) for source in parts))
        return out

    def _matrices(self) -> Iterator[Source]:
        """Iterate over the places of all matrices and vectors."""
        return (source for places in self._sources.values() for source in each(places))

    def load(
        self,
        wanted: Wanted,
        *,
        allow_nonfinite: bool = False,
        maps: FileMaps | None = None,
        report: Report = ignore,
    ) -> Iterator[tuple[str, tuple[Weight, ...]]]:
        """Load parameters straight onto devices, in the order of `wanted`; see `Checkpoint.load`."""
        file, (floats, _) = self._file, divide(wanted)
        for path, places in floats.items():
            source, host = self._sources[path], None
            if maps is not None and isinstance(source, Source) and all(_is_on_cpus(place) for place in places):
                host = mapped(file, source, places[0], maps)
                if host is not None:
                    _check_finite(file, source, host, places, allow_nonfinite=allow_nonfinite)
                    report(host.nbytes)
            if host is None:
                host = read(file, source, places, allow_nonfinite=allow_nonfinite, report=report)
            # Wait, so that the host buffer is freed before the next one is allocated.
            yield path, jax.block_until_ready(tuple(put(host, place.sharding) for place in places))
        check_files(file, (self._sources[path] for path in floats))


def check_files(file: TensorFile, places: Iterable[Places]) -> None:
    """Refuse files of these places that have changed since their headers were read.

    Raises:
        CheckpointError: names the first of them.
    """
    tensors = {source.tensor for some in places for source in each(some)}
    for part in {path for tensor in tensors for path in file.paths_of(tensor)}:
        check_unchanged(part, file.stamps[part])


def read(
    file: TensorFile,
    places: Places,
    wanted: Sequence[jax.ShapeDtypeStruct],
    *,
    allow_nonfinite: bool,
    report: Report = ignore,
) -> np.ndarray:
    """Read one parameter into a host array of the shape and dtype that is `wanted`, on every mesh alike.

    Rows of which no device of this process holds a part are left out; what is reported counts them.

    Raises:
        CheckpointError: as `TensorFile.read_rows` does; or a value that is not finite, unless `allow_nonfinite`.
    """
    out, is_one = aligned_empty(wanted[0].shape, wanted[0].dtype), isinstance(places, Source)
    for index, (source, part) in enumerate(zip(each(places), [out] if is_one else out, strict=True)):
        needed = own_rows(
            wanted, source.taken[0], transposed=source.transposed, matrix=None if is_one else index
        )  # fmt: skip
        _read(file, source, part, needed, allow_nonfinite=allow_nonfinite, report=report)
    return out


def _read(
    file: TensorFile,
    source: Source,
    out: np.ndarray,
    needed: np.ndarray | None,
    *,
    allow_nonfinite: bool,
    report: Report,
) -> None:
    """Read one matrix, or at least its rows that are `needed`, into its part of a host array."""
    rows, columns = source.taken
    first, every = source.first_row, source.row_step
    matrix = out.reshape(columns, rows).T if source.transposed else out.reshape(rows, columns)
    unit = source.rotary_pairs or 1
    step = max(1, BLOCK_BYTES // (4 * columns * every * source.column_step * unit)) * unit
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if needed is not None and not needed[start:stop].any():
            report(bytes_of(file, source, stop - start))
            continue
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            block = file.read_rows(source.tensor, first + start * every, first + (stop - 1) * every + 1)
            block = block[::every, source.first_column :: source.column_step]
            moved = block + np.float32(source.offset) if source.offset else block
            cast = np.ascontiguousarray(moved, out.dtype)  # before it is transposed: that is faster, too
        if not allow_nonfinite and not is_finite(cast):
            at = first + start * every
            raise refusal(file.path_of(source.tensor), source.tensor, at, block, out.dtype, row_step=every)
        matrix[start:stop] = halves(cast, source.rotary_pairs) if source.rotary_pairs else cast
        report(bytes_of(file, source, stop - start))


def mapped(file: TensorFile, source: Source, like: jax.ShapeDtypeStruct, maps: FileMaps) -> np.ndarray | None:
    """Map one parameter; None where it does not lie in its file in the order, dtype and alignment that are needed.

    Raises:
        CheckpointError: the file has changed since its header was read.
    """
    nbytes = math.prod(like.shape) * np.dtype(like.dtype).itemsize
    plain = None if source.is_moved or nbytes < FEWEST_MAPPED_BYTES else file.plain(source.tensor)
    if plain is None or plain.dtype != like.dtype:
        return None
    offset = plain.offset + source.first_row * (nbytes // source.taken[0])
    if offset % ALIGNMENT:
        return None
    try:
        return maps.array(plain.path, file.stamps[plain.path], offset, like.shape, plain.dtype)
    except OSError:  # a file system without mappings, or no room for one: then it is read
        return None


def _check_finite(
    file: TensorFile,
    source: Source,
    host: np.ndarray,
    wanted: Sequence[jax.ShapeDtypeStruct],
    *,
    allow_nonfinite: bool,
) -> None:
    """Refuse a mapped parameter, a block at a time, of what devices of this process hold."""
    if allow_nonfinite:
        return
    matrix, needed = host.reshape(source.taken), own_rows(wanted, source.taken[0])
    step = max(1, BLOCK_BYTES // max(1, matrix[0].nbytes))
    for start in range(0, len(matrix), step):
        if needed is not None and not needed[start : start + step].any():
            continue
        if not is_finite(block := matrix[start : start + step]):
            raise refusal(file.path_of(source.tensor), source.tensor, source.first_row + start, block, block.dtype)


def bytes_of(file: TensorFile, source: Source, rows: int) -> int:
    """Return the bytes that so many of a matrix's rows take in their tensor, of which it may be every other column."""
    return file.nbytes(source.tensor) * rows * source.taken[1] // math.prod(source.shape)


def _is_on_cpus(place: jax.ShapeDtypeStruct) -> bool:
    return all(device.platform == "cpu" for device in place.sharding.device_set)


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows of whole heads: rotary pairs that are neighbours become halves of the head."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
