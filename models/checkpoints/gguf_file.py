"""Reads GGUF files: metadata and dequantised tensors. It never writes them, and knows no model family.

The header is parsed here rather than by `gguf.GGUFReader`, which makes several numpy views per array element: 2.2 s for
SmolLM2's 98k tokens and merges, against 0.06 s. The `gguf` library dequantises. Layout: ggml's docs/gguf.md. Every
count and offset is checked against the file's size before it is used, so that a truncated or damaged file gives an
error of one sentence and not a crash or an allocation of terabytes.
"""

import functools
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ...kernels_pallas.block_tiles import Parts, take_apart
from ..errors import CheckpointError
from .gguf_parts import gguf_parts
from .host_memory import Stamp
from .streaming import Plain
from .tensor_check import check_tensors

type Metadata = Mapping[str, Any]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4
_NAN_SCALE = 255
_PLAIN: Mapping[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor."""

    path: Path
    shape: tuple[int, ...]  # in numpy order (rows first), the reverse of the file's
    kind: GGMLQuantizationType
    offset: int  # bytes from the start of `path`
    nbytes: int


class _Truncated(Exception):
    """Raised where the header continues past the end of the file."""


class _Cursor:
    """Reads little-endian GGUF values one after another from a buffer."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.size, self.at = buffer, len(buffer), 0

    def advance(self, count: int) -> int:
        """Skip `count` bytes and return the offset at which they start."""
        start = self.at
        if count > self.size - start:
            raise _Truncated
        self.at = start + count
        return start

    def scalar(self, code: str) -> Any:
        """Read one number or boolean by its `struct` code."""
        start = self.advance(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self.buffer, start)[0]

    def string(self, errors: str = "strict") -> str:
        """Read a length and that many bytes of UTF-8; `errors` is as for `bytes.decode`."""
        count = self.scalar("Q")
        start = self.advance(count)
        return self.buffer[start : start + count].decode("utf-8", errors)

    def value(self, kind: int) -> Any:
        """Read one metadata value of GGUF type `kind`; arrays become lists."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string("replace")  # a name or a description, in any encoding
        if kind == _ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        raise ValueError(f"value type {kind} is unknown")

    def array(self, kind: int, count: int) -> list[Any]:
        """Read `count` values of type `kind`."""
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
            start = self.advance(count * dtype.itemsize)
            return np.frombuffer(self.buffer, dtype, count, start).tolist()
        if kind != _STRING:
            raise ValueError(f"arrays of type {kind} are not supported")
        if count * 8 > self.size - self.at:
            raise _Truncated
        return [self.string() for _ in range(count)]


class GGUFFile:
    """An open GGUF file, or all parts of one that was split."""

    def __init__(self, path: Path) -> None:
        """Parse the header of `path` and, if it is the first of several parts, those of the others.

        Raises:
            CheckpointError: no such file, a directory, not GGUF, an unknown version, a damaged or truncated file, or a
                part that is missing or is not the first.
        """
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}  # by name
        self.stamps: dict[Path, Stamp] = {}  # of each part when its header was read
        self._scales: dict[str, np.float32] = {}  # by name, as far as they have been needed
        self.metadata = self._read_header(path)  # by key
        for part in self._other_parts():
            self._read_header(part)
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise CheckpointError(
                f"{path} and its parts hold {len(self.tensors)} tensors, not {expected}: fetch them again."
            )

    def _other_parts(self) -> list[Path]:
        """List the other parts of a file that llama.cpp's gguf-split has cut; the first is NAME-00001-of-0000N.gguf."""
        count = self.metadata.get("split.count", 1)
        if not isinstance(count, int) or count <= 1:
            return []
        parts = gguf_parts(self.path)
        if len(parts) != count or self.metadata.get("split.no") != 0:
            raise CheckpointError(
                f"{self.path} is one of {count} parts, and its name or place is not that of the first: name the file "
                f"that ends in -00001-of-{count:05}.gguf."
            )
        return parts[1:]

    def _read_header(self, path: Path) -> dict[str, Any]:
        """Read the metadata of one file, and add its tensors to `tensors`."""
        try:
            with path.open("rb") as file:
                self.stamps[path] = Stamp.of(file.fileno())
                if file.read(4) != _MAGIC:
                    raise CheckpointError(f"{path} is not a GGUF file: it does not begin with 'GGUF'.")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                    return self._parse(path, _Cursor(buffer))
        except FileNotFoundError:
            raise CheckpointError(
                f"There is no model file at {path}: give a GGUF file, or a name that is fetched."
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
        except _Truncated:
            raise CheckpointError(f"{path} is truncated: its header goes on past its end; fetch it again.") from None
        except (ValueError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is not a readable GGUF file: {error}.") from None

    def _parse(self, path: Path, cursor: _Cursor) -> dict[str, Any]:
        cursor.advance(len(_MAGIC))
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, supported are {_VERSIONS} in little-endian order")
        tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        entries = [self._tensor_entry(cursor) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}")
        start = cursor.at + -cursor.at % alignment
        for name, shape, kind, offset in entries:
            self._add_tensor(path, name, shape, kind, start + offset, cursor.size)
        return metadata

    @staticmethod
    def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = cursor.string(), cursor.scalar("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        while len(shape) > 1 and shape[0] == 1:  # to ggml every tensor has four dimensions, and those left out are 1
            shape = shape[1:]
        return name, shape, cursor.scalar("I"), cursor.scalar("Q")

    def _add_tensor(self, path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, size: int) -> None:
        if name in self.tensors:
            raise ValueError(f"tensor {name!r} appears twice")
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"tensor {name!r} has the unknown type {kind}")
        quantization = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r} of shape {shape} is no whole number of {quantization.name} blocks")
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {offset + nbytes}, the file at {size}; "
                "fetch it again."
            )
        self.tensors[name] = TensorInfo(path, shape, quantization, offset, nbytes)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], is_harmless: Callable[[str], bool] = lambda name: False
    ) -> None:
        """Check that the file holds exactly these tensors with these shapes (numpy order), and that they can be read.

        `is_harmless` is as for `check_tensors`.

        Raises:
            CheckpointError: see `check_tensors`; or a quantisation without a dequantiser.
        """
        check_tensors(self.path, {name: info.shape for name, info in self.tensors.items()}, expected, is_harmless)
        for name, info in self.tensors.items():
            if not _has_dequantiser(info.kind):
                raise CheckpointError(
                    f"{info.path}: tensor {name!r} is of type {info.kind.name}, which cannot be dequantised."
                )

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop - 1` of tensor `name`, dequantised: float32 [rows, columns].

        Rows lie along the last axis; a vector has one column. NAME.weight is multiplied by NAME.scale, one number, if
        the file has it (NVFP4's second scale). Expects that `check` has passed.

        Raises:
            CheckpointError: a file that can no longer be read.
        """
        info = self.tensors[name]
        if len(info.shape) == 1:
            return self._read(name, info, 0, 1).reshape(-1, 1)[start:stop]
        rows, scale = self._read(name, info, start, stop), f"{name.removesuffix('.weight')}.scale"
        return rows * self._scale(scale) if scale in self.tensors else rows

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
        """Return the format that tensor `name` is quantised in; None: it holds floats."""
        kind = self.tensors[name].kind
        return None if kind in _PLAIN else kind.name

    def plain(self, name: str) -> Plain | None:
        """Return where tensor `name` lies; None for a quantised one, and one with a second scale."""
        info = self.tensors[name]
        is_scaled = f"{name.removesuffix('.weight')}.scale" in self.tensors
        if info.kind not in _PLAIN or (is_scaled and len(info.shape) > 1):
            return None
        return Plain(info.path, info.offset, _PLAIN[info.kind])

    def _scale(self, name: str) -> np.float32:
        if name not in self._scales:
            self._scales[name] = self._read(name, self.tensors[name], 0, 1).reshape(-1)[0]
        return self._scales[name]

    def read_blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop - 1` of matrix `name` as they are in the file: uint8 [rows, bytes], whole blocks.

        Raises:
            CheckpointError: a file that can no longer be read.
        """
        info = self.tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        row = info.shape[-1] // block * block_bytes
        try:
            raw = np.fromfile(info.path, np.uint8, (stop - start) * row, offset=info.offset + start * row)
            return raw.reshape(stop - start, row)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{info.path}: tensor {name!r} cannot be read: {error}.") from None

    def read_parts(self, name: str, start: int, stop: int, group: int) -> Parts:
        """Read rows of matrix `name` taken apart; see `BlockFile.read_parts`. A format has one group only."""
        return take_apart(self.tensors[name].kind.name, self.read_blocks(name, start, stop))

    def _read(self, name: str, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Read rows of the tensor, seen as a matrix whose rows are its last axis; each holds whole blocks."""
        raw = self.read_blocks(name, start, stop)
        values = np.asarray(dequantize(raw, info.kind), np.float32)
        block, block_bytes = GGML_QUANT_SIZES[info.kind]
        if info.kind is GGMLQuantizationType.MXFP4:
            # By the format (OCP microscaling formats 1.0) a scale of 255 is NaN; the library takes it for 2 ** 127.
            values.reshape(-1, block)[raw.reshape(-1, block_bytes)[:, 0] == _NAN_SCALE] = np.nan
        return values


@functools.cache
def _has_dequantiser(kind: GGMLQuantizationType) -> bool:
    """Return whether the library dequantises `kind`; it has no list of these, so one block of zeros is tried."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
