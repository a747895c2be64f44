"""Files that are written as a whole: a reader finds the earlier content or the new, never a part of either."""

import os
import secrets
from contextlib import suppress
from os import PathLike
from os.path import expanduser
from pathlib import Path


def write_whole(path: str | PathLike[str], content: bytes) -> None:
    """Write a file; an earlier one is replaced as a whole, also if the power fails meanwhile.

    Raises:
        OSError: the file cannot be written; the earlier one is as it was.
    """
    target = Path(expanduser(path))
    if target.exists() and not target.is_file():  # /dev/stdout is no file to be replaced
        target.write_bytes(content)
        return
    target = Path(os.path.realpath(target))
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            write_into(folder, target.name, content, mode=0o666)
            os.fsync(folder)  # until then the rename can be lost
        finally:
            os.close(folder)
    except OSError as error:  # which names a file that nobody knows
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def write_into(folder: int, name: str, content: bytes, *, mode: int, is_synced: bool = True) -> None:
    """Write a file of an open directory under a name that nobody else has, and rename it.

    Args:
        folder: the directory's descriptor.
        name: the file's.
        content: all of it.
        mode: its permissions, of which the process's umask takes away.
        is_synced: whether it is on the disk before it is renamed, so that no power failure leaves a part of it.

    Raises:
        OSError: the file cannot be written; the earlier one is as it was.
    """
    own = f".{name}.{secrets.token_hex(4)}"
    number = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=folder)
    try:
        with open(number, "wb") as file:
            file.write(content)
            file.flush()
            if is_synced:
                os.fsync(number)
        os.replace(own, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:  # an interrupt too
        with suppress(OSError):
            os.unlink(own, dir_fd=folder)
        raise
