"""Files that are written as a whole: an earlier one is replaced once the new one is complete, or stays as it is."""

import os
from os import PathLike
from os.path import expanduser
from pathlib import Path
from tempfile import NamedTemporaryFile


def write_whole(path: str | PathLike[str], content: bytes) -> None:
    """Write a file; an earlier one is replaced as a whole, once the new one is complete.

    Raises:
        OSError: the file cannot be written; the earlier one is as it was.
    """
    target = Path(expanduser(path))
    if target.exists() and not target.is_file():  # /dev/stdout is no file to be replaced
        target.write_bytes(content)
        return
    target = target.resolve()
    with NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, target)
        except BaseException:  # an interrupt too
            os.unlink(file.name)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
