"""Matrices of Hugging Face's quantised checkpoints: which tensors make one, and its rows as values, scales and zeros.

A matrix W [n, k] of n outputs is found by the names and shapes of its tensors; f values are packed in 32 bits, the
first in the lowest bits unless it says otherwise, and G is the number of groups of inputs that share a scale:

    X.weight I8 | F8_E4M3 [n, k], X.weight_scale | X.weight_scale_inv (multiplied by, in spite of its name): one number,
        [n, 1], [n, G] or [ceil(n / b), ceil(k / b)], X.weight_zero_point I8 like the scale
            compressed-tensors 0.20.1, compressors/naive_quantized; transformers 5.24, integrations/finegrained_fp8.py
    X.weight_packed I32 [n, k / f], X.weight_scale [n, G], X.weight_zero_point I32 [n / f, G], X.weight_g_idx [k]:
        values and zero points of b bits are stored plus 2 ** (b - 1), which is not two's complement
            compressed-tensors 0.20.1, compressors/pack_quantized
    X.weight_packed U8 [n, k / 2] and X.weight_scale U8 [n, k / 32]: MXFP4, neighbours in a byte
            compressed-tensors 0.20.1, compressors/mxfp4
    X.qweight I32 [k / f, n], X.scales [G, n], X.qzeros I32 [G, n / f], X.g_idx I32 [k]: GPTQ. Zero points are stored
        less by one; that one was subtracted from whole words, so it is added to whole words, or a zero point of 0
        would change its neighbour. Format `gptq_v2` stores them as they are
            GPTQModel 7.7, utils/model.py (convert_gptq_v1_to_v2_format_module)
    X.qweight I32 [k, n / 8], X.scales [G, n], X.qzeros I32 [G, n / 8]: AWQ, of outputs 0 to 7 in the order
        0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up
            AutoAWQ 0.2.9, modules/linear/gemm.py

Not here: config.json (`families/packing.py`), and which matrices stay as they are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ...kernels_pallas.block_tiles import BLOCK, Parts, numbers, scale_values
from ...kernels_pallas.formats.layouts import Kind, kept_layout, layout_name
from .safetensors import Tensor

MXFP4 = "MXFP4"
_LITTLE, _NAN = 4, 0x7F  # bits of small values; of e4m3 NaN, whatever its sign
# The place in a word, counted in values, of each of eight outputs of AWQ.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip
SCALES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [n, k], and where its parts are."""

    tensors: Mapping[str, Tensor]  # by part: values and scales, and zeros and index if it has them
    shape: tuple[int, int]
    kind: Kind | None  # None: MXFP4
    packing: str  # how values lie: plain, rows, gptq or awq, as the module's docstring has them
    group: int  # inputs that share a scale in the file; k where all do
    rows: int = 1  # outputs that share a scale
    adds_one: bool = False  # to zero points

    @property
    def bits(self) -> int:
        """Return the bits of a value."""
        return _LITTLE if self.kind in ("INT4", "UINT4", None) else 8

    @property
    def nbytes(self) -> int:
        """Return the bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def name(self) -> str:
        """Return what messages call its format: that of `LAYOUTS` where it can be kept in one."""
        shuffled = " out of order" if "index" in self.tensors else ""
        return self.kept or f"{self.kind or MXFP4}-{self.group}{shuffled}"

    @property
    def kept(self) -> str | None:
        """Return the layout that holds it without loss; None: there is none, or its inputs are no whole blocks."""
        if "index" in self.tensors:
            return None
        if self.kind is None:
            return None if self.shape[1] % BLOCK else MXFP4
        return kept_layout(self.kind, self.group, self.shape[1], _DTYPES[self.tensors["scales"].kind].name)

    def parts(self, start: int, stop: int, group: int | None = None) -> Parts:
        """Read rows `start` to `stop - 1`; scales and zeros for each `group` inputs, by default for each input.

        A scale is NaN where a value that it multiplies is.

        Raises:
            OSError: the file can no longer be read.
            ValueError: likewise, for it has become shorter.
        """
        values = self._values(start, stop)
        scales = self._scales(start, stop)
        if self.kind is None:
            return Parts(values, scales, None)
        at = self._groups()[:: group or 1]
        scales, zeros = scales[:, at], self._zeros(start, stop)
        if self.kind == "FP8" and (is_nan := values & _NAN == _NAN).any():
            scales[is_nan.reshape(*scales.shape, -1).any(-1)] = np.nan
        return Parts(values, scales, None if zeros is None else zeros[:, at])

    def floats(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop - 1` in float32; raises as `parts` does."""
        values, scales, zeros = self.parts(start, stop)
        with np.errstate(over="ignore", invalid="ignore"):  # found by those who check for numbers that are not finite
            if zeros is not None:
                return (values.astype(np.float32) - zeros.astype(np.float32)) * scales.astype(np.float32)
            name = MXFP4 if self.kind is None else layout_name(self.kind, BLOCK, "float32")
            floats, by = numbers(name, values), scale_values(name, scales)
            weights: np.ndarray = floats * (np.repeat(by, BLOCK, axis=1) if self.kind is None else by)
            return weights

    def _groups(self) -> np.ndarray:
        """Return each input's group, [k]."""
        if "index" in self.tensors:
            return whole(self.tensors["index"]).reshape(-1).astype(np.int64)
        return np.arange(self.shape[1]) // self.group

    def _values(self, start: int, stop: int) -> np.ndarray:
        """Read values [stop - start, k] uint8."""
        tensor = self.tensors["values"]
        if self.packing == "gptq":
            return unpacked(whole(tensor)[:, start:stop].T, self.bits)
        if self.packing == "awq":
            return _columns(whole(tensor), start, stop, _AWQ_PLACES).T
        raw = _rows(tensor, start, stop)
        if self.packing == "plain":
            return raw.view(np.uint8) ^ np.uint8(0 if self.kind == "FP8" else 128)
        return unpacked(raw, self.bits)

    def _scales(self, start: int, stop: int) -> np.ndarray:
        """Read scales [stop - start, G] of the file's groups."""
        scales = whole(self.tensors["scales"])
        if self.packing in ("gptq", "awq"):
            return scales[:, start:stop].T.copy()
        matrix = scales.reshape(scales.shape[0] if scales.ndim else 1, -1)
        return matrix[np.arange(start, stop) // self.rows]

    def _zeros(self, start: int, stop: int) -> np.ndarray | None:
        """Read the values that stand for 0, [stop - start, G] uint8 of the file's groups; None: all are the middle."""
        tensor = self.tensors.get("zeros")
        if tensor is None:
            return None
        raw = whole(tensor)
        if self.packing == "plain":
            matrix = raw.reshape(raw.shape[0] if raw.ndim else 1, -1)
            return matrix[np.arange(start, stop) // self.rows].view(np.uint8) ^ np.uint8(128)
        if self.packing == "rows":
            return _columns(raw.T, start, stop, None, self.bits).T
        if self.packing == "awq":
            return _columns(raw, start, stop, _AWQ_PLACES).T
        if self.adds_one:
            ones = sum(1 << shift for shift in range(0, 32, self.bits))
            raw = (raw.view(np.uint32) + np.uint32(ones)).view(np.int32)
        return _columns(raw, start, stop, None, self.bits).T


def unpacked(words: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> np.ndarray:
    """Unpack words [rows, m] of any size into values [rows, m * values of a word] uint8.

    `places` are where in a word its values are, counted in values from the lowest bits; None: one after the other.
    """
    raw = np.ascontiguousarray(words).view(np.uint8)
    values = raw if bits == 8 else np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
    if places is not None:
        values = values.reshape(len(raw), -1, len(places))[..., places].reshape(len(raw), -1)
    return values


def _columns(
    words: np.ndarray, start: int, stop: int, places: tuple[int, ...] | None, bits: int = _LITTLE
) -> np.ndarray:
    """Unpack columns `start` to `stop - 1` of words [rows, m]: [rows, stop - start] uint8."""
    each = 32 // bits
    first = start // each
    values = unpacked(words[:, first : -(-stop // each)], bits, places)
    return values[:, start - first * each : stop - first * each]


def _rows(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Read rows of a matrix."""
    dtype, columns = _DTYPES[tensor.kind], tensor.shape[1]
    offset = tensor.offset + start * columns * dtype.itemsize
    return np.fromfile(tensor.path, dtype, (stop - start) * columns, offset=offset).reshape(stop - start, columns)


def whole(tensor: Tensor) -> np.ndarray:
    """Map a tensor, so that what is taken of it is read."""
    if not math.prod(tensor.shape):
        return np.empty(tensor.shape, _DTYPES[tensor.kind])
    return np.memmap(tensor.path, _DTYPES[tensor.kind], "r", tensor.offset, tensor.shape)
