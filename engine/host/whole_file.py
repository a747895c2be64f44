"""Files that are written as a whole: a reader finds the earlier content or the new, never a part of either."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from os.path import expanduser
from pathlib import Path
from typing import BinaryIO

_RANDOM = 4  # bytes in the name of a file under way


def write_whole(path: str | PathLike[str], content: bytes) -> None:
    """Write a file; an earlier one is replaced as a whole, also if the power fails meanwhile.

    Raises:
        OSError: the file cannot be written; the earlier one is as it was.
    """
    target = Path(expanduser(path))
    if target.exists() and not target.is_file():  # /dev/stdout is no file to be replaced
        target.write_bytes(content)
        return
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a file to be written piece by piece; it replaces an earlier one at the end of the block, as a whole, and
    not if that raises.

    Raises:
        OSError: the file cannot be written; the earlier one is as it was.
    """
    target = Path(os.path.realpath(expanduser(path)))
    try:
        folder = os.open(os.fspath(target.parent), os.O_RDONLY | os.O_DIRECTORY)
        try:
            with writing_into(folder, target.name, mode=0o666) as file:
                yield file
            os.fsync(folder)  # until then the rename can be lost
        finally:
            os.close(folder)
    except OSError as error:
        if error.filename not in (None, os.fspath(target.parent)) and not _is_own(target.name, error.filename):
            raise  # of what the block reads
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None  # not a name that nobody knows


def write_into(folder: int, name: str, content: bytes, *, mode: int, is_synced: bool = True) -> None:
    """Write a file of an open directory under a name that nobody else has, and rename it; as `writing_into`."""
    with writing_into(folder, name, mode=mode, is_synced=is_synced) as file:
        file.write(content)


@contextmanager
def writing_into(folder: int, name: str, *, mode: int, is_synced: bool = True) -> Iterator[BinaryIO]:
    """Yield a file of an open directory under a name that nobody else has; at the end of the block it is renamed.

    Args:
        folder: the directory's descriptor.
        name: the file's.
        mode: its permissions, of which the process's umask takes away.
        is_synced: whether it is on the disk before it is renamed, so that no power failure leaves a part of it.

    Raises:
        OSError: the file cannot be written; the earlier one is as it was.
    """
    own = f".{name}.{secrets.token_hex(_RANDOM)}"
    number = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=folder)
    try:
        with open(number, "wb") as file:
            yield file
            file.flush()
            if is_synced:
                os.fsync(number)
        os.replace(own, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:  # an interrupt too
        with suppress(OSError):
            os.unlink(own, dir_fd=folder)
        raise


def _is_own(name: str, found: object) -> bool:
    """Return whether a name is that of a file under way to the name `name`."""
    return isinstance(found, str) and found.startswith(f".{name}.") and len(found) == len(name) + 2 + 2 * _RANDOM
