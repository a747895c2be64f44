"""Presents the packed weights of Hugging Face's checkpoints as tensors X.weight [n, k], whose rows can be read.

`packed_matrix.py` says which tensors make one. What else belongs to quantised modules and says nothing about weights
(scales for activations and for KV) is left out.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...kernels_pallas.block_tiles import BLOCK, Parts
from ...kernels_pallas.formats.layouts import WITH_ZEROS, Kind
from ..errors import CheckpointError
from ..families.packing import KEY, Packing
from .packed_matrix import MXFP4, SCALES, PackedMatrix, whole
from .safetensors import SafetensorsFiles, Tensor
from .streaming import Plain

# Kinds of values, by the type of tensors and by bits.
_PLAIN: Mapping[str, Kind] = {"F8_E4M3": "FP8", "I8": "INT8"}
_OF_BITS: Mapping[int, Kind] = {8: "INT8", 4: "INT4"}
_IN_WORDS = ("gptq", "awq")  # methods
_INDICES = ("I32", "I64")
_BLOCKS = (32, 64, 128, 256, 512, 1024)  # how many outputs or inputs a scale may stand for
# Of activations and of KV, not of weights.
_OF_ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".input_scale_ub", ".input_global_scale", ".output_scale", ".activation_scale",
    ".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".k_zero_point", ".v_zero_point",
)  # fmt: skip


class PackedFiles(SafetensorsFiles):
    """The tensors of safetensors files in which those of each packed matrix are one."""

    def __init__(self, files: SafetensorsFiles, packing: Packing) -> None:
        """Find the packed matrices of `files`.

        Raises:
            CheckpointError: tensors that do not make one, by name.
        """
        self.stamps, self._method, self._packing = files.stamps, packing.method, packing
        self.tensors = {name: one for name, one in files.tensors.items() if not name.endswith(_OF_ACTIVATIONS)}
        self._matrices = dict[str, PackedMatrix]()
        for name, tensor in files.tensors.items():
            module, _, last = name.rpartition(".")
            if last == "qweight":
                self._add(module, self._by_columns(module, tensor, packing))
            elif last == "weight_packed":
                self._add(module, self._by_rows(module, tensor))
            elif last == "weight" and tensor.kind in _PLAIN:
                self._add(module, self._plain(module, tensor))

    def _add(self, module: str, matrix: PackedMatrix) -> None:
        name, values = f"{module}.weight", matrix.tensors["values"]
        if name in self.tensors:
            raise self._refusal(name, values, "there is another tensor of this weight")
        self._check_declared(name, matrix)
        self.tensors[name] = replace(values, kind=matrix.name, shape=matrix.shape, nbytes=matrix.nbytes)
        self._matrices[name] = matrix

    def _check_declared(self, name: str, matrix: PackedMatrix) -> None:
        """Refuse a matrix that is not packed as `quantization_config` says of all: parts were lost, or cut off."""
        values, block = matrix.tensors["values"], self._packing.block
        if block is not None and matrix.kind is not None:
            n, k = matrix.shape
            expected = (n if block[0] is None else min(block[0], n), k if block[1] is None else min(block[1], k))
            found = (matrix.rows, matrix.group)
            if found != expected:
                raise self._refusal(name, values, f"{_each(found)} share a scale, and {KEY} says {_each(expected)}")
        if self._packing.has_zeros and matrix.kind in WITH_ZEROS:
            raise self._refusal(name, values, f"it has no zero points, and {KEY} says that all have")

    def _take(self, module: str, *endings: str) -> Tensor | None:
        """Take a tensor of a module out of those that are left."""
        found = (self.tensors.pop(f"{module}.{ending}", None) for ending in endings)
        return next((tensor for tensor in found if tensor is not None), None)

    def _plain(self, module: str, values: Tensor) -> PackedMatrix:
        name = f"{module}.weight"
        del self.tensors[name]
        scales = self._scales(name, values, self._take(module, "weight_scale", "weight_scale_inv"))
        zeros = self._take(module, "weight_zero_point")
        if len(values.shape) != 2:
            raise self._refusal(name, values, "it is no matrix")
        n, k = values.shape
        grid = (*scales.shape, 1, 1)[:2]
        rows, group = _per_scale(n, grid[0]), _per_scale(k, grid[1])
        if len(scales.shape) > 2 or rows is None or group is None:
            raise self._refusal(name, values, f"scales of shape {list(scales.shape)} do not divide it")
        kind = _PLAIN[values.kind]
        if zeros is not None and kind == "FP8":
            zeros = None  # compressed-tensors stores those of symmetric ones as well: zeros
        if zeros is not None and (zeros.kind != "I8" or zeros.shape != scales.shape):
            raise self._refusal(name, values, f"its zero points are {zeros.kind}{list(zeros.shape)}")
        parts = {"values": values, "scales": scales} | ({"zeros": zeros} if zeros is not None else {})
        return PackedMatrix(parts, (n, k), kind if zeros is None else WITH_ZEROS[kind], "plain", group, rows)

    def _by_rows(self, module: str, values: Tensor) -> PackedMatrix:
        name = f"{module}.weight_packed"
        del self.tensors[name]
        shape, zeros = self._take(module, "weight_shape"), self._take(module, "weight_zero_point")
        index, factor = self._take(module, "weight_g_idx"), self._take(module, "weight_global_scale")
        scales = self._take(module, "weight_scale")
        if factor is not None:
            raise self._refusal(name, values, "it has a second scale, NVFP4's")
        if values.kind == "U8" and scales is not None and len(values.shape) == 2:
            return self._mxfp4(name, values, scales)
        scales = self._scales(name, values, scales)
        size = () if shape is None or shape.kind not in _INDICES else tuple(whole(shape).reshape(-1).tolist())
        if values.kind != "I32" or len(values.shape) != 2 or len(size) != 2 or size[0] != values.shape[0]:
            raise self._refusal(name, values, f"I32[n, k / values of 32 bits] and weight_shape, {list(size)}, misfit")
        n, k = size
        bits = next((bits for bits in _OF_BITS if k and -(-k * bits // 32) == values.shape[1]), None)
        grid = (*scales.shape, 1, 1)[:2]
        group = _per_scale(k, grid[1])
        if bits is None or group is None or k % (32 // bits) or grid[0] not in (1, n):
            raise self._refusal(
                name, values, f"weight_shape {[n, k]} and scales {list(scales.shape)} do not fit 4 or 8 bits"
            )
        if zeros is not None and (zeros.kind != "I32" or zeros.shape != (-(-n * bits // 32), grid[1])):
            raise self._refusal(name, values, f"its zero points are {zeros.kind}{list(zeros.shape)}")
        kind = _OF_BITS[bits] if zeros is None else WITH_ZEROS[_OF_BITS[bits]]
        rows = 1 if grid[0] == n else n
        return PackedMatrix(
            self._ordered(name, index, group, k, values, scales, zeros), (n, k), kind, "rows", group, rows
        )

    def _mxfp4(self, name: str, values: Tensor, scales: Tensor) -> PackedMatrix:
        n, k = values.shape[0], values.shape[1] * 2
        if scales.kind != "U8" or scales.shape != (n, k // BLOCK) or k % BLOCK:
            raise self._refusal(name, values, f"as {MXFP4} its scales must be U8{[n, k // BLOCK]}")
        return PackedMatrix({"values": values, "scales": scales}, (n, k), None, "rows", BLOCK)

    def _by_columns(self, module: str, values: Tensor, packing: Packing) -> PackedMatrix:
        name, is_awq = f"{module}.qweight", packing.method == "awq"
        del self.tensors[name]
        zeros, index = self._take(module, "qzeros"), self._take(module, "g_idx")
        scales = self._scales(name, values, self._take(module, "scales"))
        if packing.method not in _IN_WORDS or zeros is None or zeros.kind != "I32" or values.kind != "I32":
            raise self._refusal(name, values, "I32 words with qzeros, as GPTQ and AWQ have them, are expected")
        if any(len(tensor.shape) != 2 for tensor in (values, scales, zeros)):
            raise self._refusal(name, values, "it is no matrix")
        (groups, n), bits = scales.shape, 32 * zeros.shape[1] // max(1, scales.shape[1])
        k = values.shape[0] if is_awq else values.shape[0] * 32 // max(bits, 1)
        columns = n * bits // 32 if is_awq else n
        group = _per_scale(k, groups)
        fits = bits in _OF_BITS and (bits == 4 or not is_awq) and zeros.shape[0] == groups and n * bits % 32 == 0
        if not fits or values.shape[1] != columns or group is None:
            raise self._refusal(
                name, values, f"scales {list(scales.shape)} and qzeros {list(zeros.shape)} do not fit 4 or 8 bits"
            )
        kind, parts = WITH_ZEROS[_OF_BITS[bits]], self._ordered(name, index, group, k, values, scales, zeros)
        return PackedMatrix(parts, (n, k), kind, packing.method, group, adds_one=packing.adds_one)

    def _ordered(
        self, name: str, index: Tensor | None, group: int, k: int, values: Tensor, scales: Tensor, zeros: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the parts, with the index of groups only if inputs are not in the order of their groups."""
        parts = {"values": values, "scales": scales} | ({"zeros": zeros} if zeros is not None else {})
        if index is None:
            return parts
        found = whole(index).reshape(-1) if index.kind in _INDICES else np.empty(0, np.int32)
        groups = -(-k // group)
        if (
            len(found) != k
            or found.min(initial=0) < (-1 if (found == -1).all() else 0)
            or found.max(initial=0) >= groups
        ):
            why = f"its g_idx, {index.kind}{list(index.shape)}, is not {k} whole numbers below {groups}"
            raise self._refusal(name, values, why)
        is_trivial = (found == -1).all() or np.array_equal(found, np.arange(k) // group)
        return parts if is_trivial else parts | {"index": index}

    def _scales(self, name: str, values: Tensor, scales: Tensor | None) -> Tensor:
        if scales is None:
            raise self._refusal(name, values, "it has no scales")
        if scales.kind not in SCALES:
            raise self._refusal(name, values, f"its scales are of type {scales.kind}, not {', '.join(SCALES)}")
        return scales

    def _refusal(self, name: str, tensor: Tensor, why: str) -> CheckpointError:
        return CheckpointError(
            f"{tensor.path}: tensor {name!r}, {tensor.kind}{list(tensor.shape)}, is no weight that {self._method} "
            f"packs and this version reads: {why}."
        )

    def packed(self) -> Iterator[tuple[str, PackedMatrix]]:
        """Iterate over the packed matrices by name."""
        yield from self._matrices.items()

    def check_readable(self, names: Iterable[str]) -> None:
        """Refuse tensors that are neither floats nor packed; see `SafetensorsFiles.check_readable`."""
        super().check_readable(name for name in names if name not in self._matrices)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows of tensor `name`; float32 of one that is packed. See `SafetensorsFiles.read_rows`."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return super().read_rows(name, start, stop)
        try:
            return matrix.floats(start, stop)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None

    def read_parts(self, name: str, start: int, stop: int, group: int) -> Parts:
        """Read rows of a packed tensor; see `BlockFile.read_parts`."""
        try:
            return self._matrices[name].parts(start, stop, group)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path_of(name)}: tensor {name!r} cannot be read: {error}.")

    def paths_of(self, name: str) -> tuple[Path, ...]:
        """Return the files that hold the parts of tensor `name`."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return super().paths_of(name)
        return tuple(dict.fromkeys(tensor.path for tensor in matrix.tensors.values()))

    def format_of(self, name: str) -> str | None:
        """Return the format of a tensor that is packed."""
        return self._matrices[name].name if name in self._matrices else None

    def kept_format(self, name: str) -> str | None:
        """Return the layout that holds a packed tensor without loss, if there is one."""
        return self._matrices[name].kept if name in self._matrices else None

    def plain(self, name: str) -> Plain | None:
        """Return where tensor `name` lies; None for one that is packed."""
        return None if name in self._matrices else super().plain(name)


def _each(scaled: tuple[int, int]) -> str:
    return f"{scaled[0]} x {scaled[1]} weights"


def _per_scale(size: int, scales: int) -> int | None:
    """Return how many of `size` outputs or inputs share one of so many scales; None: no such division is known."""
    if scales == 1 or size == 0:
        return max(1, size)
    block = next((block for block in _BLOCKS if -(-size // block) == scales), None)
    return size // scales if block is None and scales and size % scales == 0 else block
