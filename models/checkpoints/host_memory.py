"""Host memory that XLA's CPU devices use where it is: aligned buffers, and files that are mapped read-only.

`jax.device_put` shares a numpy array with every CPU device if the array starts at a multiple of 64 bytes, and copies it
otherwise. Invariants: nothing here is written again once a device has it, and a mapping lives exactly as long as an
array that lies in it. A file that is mapped must stay as it is: `FileMaps.check` finds out whether it has. It cannot
help where a file is cut short while a step reads it: then the system ends the process (SIGBUS).
"""

import gc
import math
import mmap
import os
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError

ALIGNMENT = 64
# What is smaller is read: to depend on the file for it would not be worth it.
FEWEST_MAPPED_BYTES = 1 << 20


class Stamp(NamedTuple):
    """What tells that a file is the same and has not been written to; reading, linking and renaming change nothing."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, file: int | Path) -> "Stamp":
        """Look at an open file or a path. Raises OSError."""
        status = os.stat(file)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Allocate an array whose memory every CPU device can use without a copy; it is not initialised."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def check_unchanged(path: Path, stamp: Stamp, file: int | None = None) -> None:
    """Check that a file is still what it was when its header was read: what `path` names, or the open `file`.

    Raises:
        CheckpointError: another file, or one that was written to.
    """
    try:
        now = Stamp.of(path if file is None else file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if now != stamp:
        raise CheckpointError(f"{path} was changed while it was loaded ({_difference(stamp, now)}): load it again.")


def _difference(before: Stamp, now: Stamp) -> str:
    if before.size != now.size:
        return f"it had {before.size:,} bytes and has {now.size:,}"
    if before[2:] != now[2:]:
        return "another file has its name"
    return "it was written to"


class FileMaps:
    """The files that an engine's weights lie in, mapped."""

    def __init__(self) -> None:
        self._files: dict[Path, _MappedFile] = {}

    def array(self, path: Path, stamp: Stamp, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Return part of a file as a read-only array, without reading it.

        Args:
            path: the file.
            stamp: of the file when its header was read.
            offset: bytes from the start of the file; a multiple of `ALIGNMENT`.
            shape: of the array.
            dtype: of the array.

        Raises:
            CheckpointError: the file has changed since its header was read.
            OSError: it cannot be mapped.
        """
        if path not in self._files:
            self._files[path] = _MappedFile(path, stamp)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return np.frombuffer(self._files[path].mapping(), np.uint8, size, offset).view(dtype).reshape(shape)

    def check(self) -> None:
        """Check every file in which an array still lies.

        Raises:
            CheckpointError: one was cut short or written to.
        """
        for file in self._files.values():
            file.check()

    @property
    def names(self) -> list[str]:
        """Return the names of the files that are mapped."""
        return [file.path.name for file in self._files.values() if file.is_mapped]

    def holds(self, address: int) -> bool:
        """Return whether this address lies in one of the mappings."""
        return any(file.holds(address) for file in self._files.values())


class _MappedFile:
    """A file, and its mapping as long as an array lies in it."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self.path, self._stamp = path, stamp
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # so that a new file of this name is not looked at
        weakref.finalize(self, os.close, self._file)
        self._mapping: weakref.ref[mmap.mmap] | None = None
        self._address = 0

    @property
    def is_mapped(self) -> bool:
        return self._mapping is not None and self._mapping() is not None

    def mapping(self) -> mmap.mmap:
        mapping = None if self._mapping is None else self._mapping()
        if mapping is None:
            check_unchanged(self.path, self._stamp, self._file)
            mapping = mmap.mmap(self._file, self._stamp.size, access=mmap.ACCESS_READ)
            self._mapping = weakref.ref(mapping)
            self._address = np.frombuffer(mapping, np.uint8, 1).ctypes.data
        return mapping

    def check(self) -> None:
        if not self.is_mapped:
            return
        now = Stamp.of(self._file)
        if now == self._stamp:
            return
        gc.collect()  # JAX lets go of what its arrays lay in a little later
        if self.is_mapped:
            raise CheckpointError(
                f"{self.path} was changed while weights lay in it, mapped ({_difference(self._stamp, now)}): leave it "
                "as it is and start again, or load it with mmap=False (--no-mmap)."
            )

    def holds(self, address: int) -> bool:
        return self.is_mapped and self._address <= address < self._address + self._stamp.size
