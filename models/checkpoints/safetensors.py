"""Reads tensors from one or several safetensors files, by rows at their offsets. It never writes them.

The `safetensors` package gives neither a tensor's offset nor, for a damaged file, the name of the damaged tensor, and
maps whole files, which would hold most of the model twice. So the header, 8 bytes of length and that much JSON, is read
here. Layout and rules: the format's own description, https://github.com/huggingface/safetensors#format. Everything is
checked against the file's size before any tensor is read.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..json_file import read_json
from .host_memory import Stamp
from .streaming import Plain

INDEX = "model.safetensors.index.json"
# The format's own limit.
_MAX_HEADER = 100_000_000
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32,
    "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
_READABLE: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Tensor:
    """The place of a tensor."""

    path: Path
    kind: str  # the format's name of its dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of `path`
    nbytes: int


class SafetensorsFiles:
    """The tensors of several safetensors files by name, as one `TensorFile`."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers of `paths`.

        Raises:
            CheckpointError: a file that is missing, unreadable, truncated or damaged, or a tensor that is in two files.
        """
        self.tensors: dict[str, Tensor] = {}
        self.stamps: dict[Path, Stamp] = {}  # of each file when its header was read
        for path in paths:
            tensors, self.stamps[path] = read_header(path)
            for name, tensor in tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"Tensor {name!r} is in {self.tensors[name].path} and again in {path}.")
                self.tensors[name] = tensor

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Map the name of every tensor to its shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self) -> np.dtype[Any]:
        """Return the readable dtype that most of the numbers are stored as; float32 if there are none."""
        sizes = {kind: 0 for kind in _READABLE}
        for tensor in self.tensors.values():
            if tensor.kind in sizes:
                sizes[tensor.kind] += math.prod(tensor.shape)
        return _READABLE[max(sizes, key=lambda kind: sizes[kind])]

    def check_readable(self, names: Iterable[str]) -> None:
        """Refuse tensors that are neither float32, float16 nor bfloat16.

        Raises:
            CheckpointError: names the first of `names` that is of another type.
        """
        for name in names:
            tensor = self.tensors[name]
            if tensor.kind not in _READABLE:
                raise CheckpointError(
                    f"{tensor.path}: tensor {name!r} is of type {tensor.kind}, which is not implemented; weights are "
                    f"{', '.join(_READABLE)}."
                )

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop - 1` of tensor `name` as [stop - start, columns] in its own dtype.

        Rows lie along the last axis; a vector has one column.

        Raises:
            CheckpointError: a type that cannot be read (see `check_readable`), or a file that was changed or deleted.
        """
        self.check_readable([name])
        tensor = self.tensors[name]
        dtype, columns = _READABLE[tensor.kind], tensor.shape[-1] if len(tensor.shape) > 1 else 1
        offset, count = tensor.offset + start * columns * dtype.itemsize, (stop - start) * columns
        try:
            return np.fromfile(tensor.path, dtype, count, offset=offset).reshape(stop - start, columns)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{tensor.path}: tensor {name!r} cannot be read: {error}.") from None

    def path_of(self, name: str) -> Path:
        """Return the file that holds tensor `name`."""
        return self.tensors[name].path

    def paths_of(self, name: str) -> tuple[Path, ...]:
        """Return the file that holds tensor `name`."""
        return (self.tensors[name].path,)

    def nbytes(self, name: str) -> int:
        """Return the bytes that tensor `name` takes in its file."""
        return self.tensors[name].nbytes

    def format_of(self, name: str) -> str | None:
        """Return None: all that can be read are floats."""
        return None

    def plain(self, name: str) -> Plain | None:
        """Return where tensor `name` lies; None if its type cannot be read."""
        tensor = self.tensors[name]
        dtype = _READABLE.get(tensor.kind)
        return None if dtype is None else Plain(tensor.path, tensor.offset, dtype)


def read_index(path: Path) -> dict[str, Path]:
    """Read a `model.safetensors.index.json`: tensor name -> the file that holds it.

    Raises:
        CheckpointError: the index cannot be read, is not one, or names a file that is absent.
    """
    try:
        weight_map = read_json(path)["weight_map"]
        files = {str(name): path.parent / shard for name, shard in weight_map.items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is not an index of shards: it has no 'weight_map' of names to files.") from None
    if not files:
        raise CheckpointError(f"{path} is an index of no tensors: fetch the model again.")
    for name, file in files.items():
        if file.parent != path.parent or not os.path.isfile(file):
            raise CheckpointError(
                f"{path} places tensor {name!r} in {weight_map[name]!r}, which is not there: fetch that file as well."
            )
    return files


def open_sharded(index: Path) -> SafetensorsFiles:
    """Open the files that an index names, and check that each tensor is in the file that the index gives.

    Raises:
        CheckpointError: as `read_index` and `SafetensorsFiles` do, or a tensor is not where the index places it.
    """
    places = read_index(index)
    files = SafetensorsFiles(dict.fromkeys(places.values()))
    for name, path in places.items():
        if name not in files.tensors or files.tensors[name].path != path:
            raise CheckpointError(f"{index} places tensor {name!r} in {path.name!r}, which does not hold it.")
    return files


def read_header(path: Path) -> tuple[dict[str, Tensor], Stamp]:
    """Read the tensors of one file's header, and check that they fill the file without gap or overlap.

    Returns:
        the tensors by name, and what the file looked like.

    Raises:
        CheckpointError: no such file, or it cannot be read, is truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            stamp = Stamp.of(file.fileno())
            size = stamp.size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: it has {size} bytes and its header would take "
                    f"{length}; fetch it again."
                )
            entries = _parse(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"There is no model file at {path}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: its header is not valid: {str(error).rstrip('.')}.") from None
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors, stamp


def _parse(header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError("a name appears twice")
        return names

    entries = json.loads(header, object_pairs_hook=unique)
    if not isinstance(entries, dict):
        raise ValueError("it is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _tensor(path: Path, name: str, entry: Any, start: int) -> Tensor:
    try:
        kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged: the header's entry of tensor {name!r} is not valid.")
    if not isinstance(kind, str) or kind not in _BITS:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {str(kind)[:40]!r}.")
    if (last - first) * 8 != math.prod(shape) * _BITS[kind]:
        raise CheckpointError(
            f"{path} is damaged: tensor {name!r}, {kind}{list(shape)}, does not take the {last - first} bytes it is "
            "said to."
        )
    return Tensor(path, kind, tuple(shape), start + first, last - first)


def _check_layout(path: Path, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """Check that tensors follow one another and end with the file, as the format demands."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            how = "overlaps the one before" if tensor.offset < at else "does not follow the one before"
            raise CheckpointError(f"{path} is damaged: tensor {name!r} {how}.")
        at += tensor.nbytes
        if at > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {at}, the file at {size}; fetch it again."
            )
    if at != size:
        raise CheckpointError(f"{path} is damaged: its tensors end at byte {at}, the file at {size}.")
