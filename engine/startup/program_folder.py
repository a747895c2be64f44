"""A folder of the user's own in which serialised programs are kept, a file for each.

They are pickles: what is read here is run. So the folder and the file must belong to the user and nobody else may be
able to write to them, and a checksum over name and content must hold before anything is unpickled. Whatever is wrong
costs a compilation, never a start: a file that is not as it was written is as good as none, and where nothing can be
written that is said once. Any number of starts may use the folder at once, because a file appears whole, by a rename.

What a program depends on, and thereby its name, is `program_key.py`'s business.
"""

import hashlib
import os
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..host.whole_file import write_into

_MAGIC = b"twinmesh program 1\n"
# What a process leaves that was killed while it wrote.
_ABANDONED_SECONDS = 3600


class ProgramFolder:
    """Programs on disk, by name. Its methods may be called from any thread, and never raise an OSError."""

    def __init__(self, path: Path, most_bytes: int = 2 << 30) -> None:
        """Make the folder where it is missing. Above `most_bytes`, files that were not read for longest go."""
        self._path, self._most_bytes = path, most_bytes
        self._trouble: str | None = None
        self._lock = threading.Lock()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened():
                pass
        except OSError as error:
            self._give_up(error)

    def read(self, name: str) -> bytes | None:
        """Return what was written under this name; None where it is missing or in any way not as it was written."""
        try:
            with self._opened() as folder:
                number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
                with open(number, "rb") as file:
                    _check_owner(os.fstat(number), stat.S_ISREG)
                    data = file.read()
                with suppress(OSError):  # on a file system that is read-only
                    os.utime(name, dir_fd=folder)
        except OSError:
            return None
        head, content = data[: len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
        return content if head == _head(name, content) else None

    def write(self, name: str, content: bytes) -> None:
        """Keep `content` under this name, if that is possible."""
        if self._trouble is not None:
            return
        try:
            with self._opened() as folder:
                write_into(folder, name, _head(name, content) + content, mode=0o600, is_synced=False)
                _tidy(folder, self._most_bytes)
        except OSError as error:
            self._give_up(error)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Open the folder, so that nobody can put another one in its place, and check whose it is."""
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _check_owner(os.fstat(folder), stat.S_ISDIR)
            yield folder
        finally:
            os.close(folder)

    def _give_up(self, error: OSError) -> None:
        """Write nothing any more, and say why, once."""
        with self._lock:
            is_first, self._trouble = self._trouble is None, str(error.strerror or error)
        if is_first:
            warnings.warn(
                f"compiled programs cannot be kept in {self._path} ({self._trouble}): every start compiles them again.",
                stacklevel=2,
            )


def _head(name: str, content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(name.encode() + b"\n" + content).digest()


def _check_owner(info: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    """Raise OSError unless this is of the right kind, the user's, and writable by nobody else."""
    if not is_kind(info.st_mode):
        raise OSError("it is no plain file or folder")
    if info.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError("others may write to it")


def _tidy(folder: int, most_bytes: int) -> None:
    """Remove what killed processes left, and what was not read for longest where all is too much."""
    files, left = [], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # removed meanwhile
                info = entry.stat(follow_symlinks=False)
                is_partial = entry.name.startswith(".")
                if is_partial and time.time() - info.st_mtime > _ABANDONED_SECONDS:
                    os.unlink(entry.name, dir_fd=folder)
                elif not is_partial:
                    files.append((info.st_mtime, info.st_size, entry.name))
                    left += info.st_size
    for _, size, name in sorted(files):
        if left <= most_bytes:
            return
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
        left -= size
