"""Presents the MXFP4 weights of Hugging Face's GPT-OSS files as tensors whose rows can be read, dequantised.

Such a weight [..., k] is two tensors of bytes: NAME_blocks [..., k / 32, 16], two elements of FP4 (E2M1) each with the
even one in the low half, and NAME_scales [..., k / 32], the exponent of two plus 127 of each block of 32 (OCP
Microscaling Formats 1.0). GGUF's MXFP4 blocks hold elements 0 to 15 in low halves and 16 to 31 in high ones: bytes of
one copied into the other permute weights. A scale of 255 is NaN, which the check of loaded values finds.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...kernels_pallas.block_tiles import Parts
from ..errors import CheckpointError
from .safetensors import SafetensorsFiles, Tensor
from .streaming import Plain

_BLOCK, _HALF = 32, 16  # elements, and bytes, of a block
_BLOCKS, _SCALES, _KIND = "_blocks", "_scales", "MXFP4"
_NAN, _BIAS = 255, 127
# The values of the codes 0 to 7; the eighth bit is the sign.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)


class MXFP4Files(SafetensorsFiles):
    """The tensors of safetensors files in which each pair of blocks and scales is one, under the name of its blocks."""

    def __init__(self, files: SafetensorsFiles) -> None:
        """Pair the blocks and scales of `files`.

        Raises:
            CheckpointError: blocks without scales, or of other shapes or types than they must have.
        """
        self.stamps, self._parts = files.stamps, dict[str, tuple[Tensor, Tensor]]()
        self.tensors = dict(files.tensors)
        for name, blocks in files.tensors.items():
            if not name.endswith(_BLOCKS):
                continue
            scales = self.tensors.pop(name.removesuffix(_BLOCKS) + _SCALES, None)
            fits = scales is not None and scales.shape == blocks.shape[:-1] and scales.kind == "U8"
            if (
                scales is None
                or not fits
                or len(blocks.shape) < 2
                or blocks.kind != "U8"
                or blocks.shape[-1:] != (_HALF,)
            ):
                raise CheckpointError(
                    f"{blocks.path}: tensor {name!r}, {blocks.kind}{list(blocks.shape)}, and its scales are no weight "
                    f"in MXFP4: U8[..., k / {_BLOCK}, {_HALF}] and U8[..., k / {_BLOCK}] are expected; fetch the model "
                    "again."
                )
            shape = (*blocks.shape[:-2], blocks.shape[-2] * _BLOCK)
            self._parts[name] = blocks, scales
            self.tensors[name] = replace(blocks, kind=_KIND, shape=shape, nbytes=blocks.nbytes + scales.nbytes)

    def check_readable(self, names: Iterable[str]) -> None:
        """Refuse tensors that are neither floats nor MXFP4; see `SafetensorsFiles.check_readable`."""
        super().check_readable(name for name in names if name not in self._parts)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows of tensor `name`; float32 of one that is packed. See `SafetensorsFiles.read_rows`."""
        if name not in self._parts:
            return super().read_rows(name, start, stop)
        codes, scales = self._codes(name, start, stop)
        with np.errstate(over="ignore"):  # found by those who check for infinity
            values = np.ldexp(VALUES[codes], scales.astype(np.int32)[..., None] - _BIAS)
        values[scales == _NAN] = np.nan
        rows: np.ndarray = values.reshape(stop - start, -1)
        return rows

    def read_parts(self, name: str, start: int, stop: int, group: int) -> Parts:
        """Read rows of a packed tensor; see `BlockFile.read_parts`. A group is always a block."""
        codes, scales = self._codes(name, start, stop)
        return Parts(codes.reshape(stop - start, -1), scales, None)

    def _codes(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Read rows: codes uint8 [rows, blocks, 32] in the order of their elements, and scales [rows, blocks]."""
        packed, scales = (self._bytes(name, part, start, stop) for part in self._parts[name])
        packed = packed.reshape(*scales.shape, _HALF)
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, _BLOCK), scales

    def _bytes(self, name: str, part: Tensor, start: int, stop: int) -> np.ndarray:
        """Read rows of blocks or scales, uint8 [rows, bytes]."""
        row = self.tensors[name].shape[-1] // _BLOCK * (part.shape[-1] if part is self._parts[name][0] else 1)
        try:
            raw = np.fromfile(part.path, np.uint8, (stop - start) * row, offset=part.offset + start * row)
            return raw.reshape(stop - start, row)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{part.path}: tensor {name!r} cannot be read: {error}.") from None

    def paths_of(self, name: str) -> tuple[Path, ...]:
        """Return the files that hold tensor `name`: blocks and scales may be in two."""
        return tuple(part.path for part in self._parts.get(name, (self.tensors[name],)))

    def format_of(self, name: str) -> str | None:
        """Return MXFP4 for a tensor that is packed."""
        return _KIND if name in self._parts else None

    def kept_format(self, name: str) -> str | None:
        """Return the same: all of them can stay as they are."""
        return self.format_of(name)

    def plain(self, name: str) -> Plain | None:
        """Return where tensor `name` lies; None for one that is packed."""
        return None if name in self._parts else super().plain(name)
