"""Keeps compiled kernels on disk, in a folder of the user's own. Any doubt about a file is a miss.

A file is a line that says what it is, the SHA-256 of its own name and of what follows, and an object file. Its name
holds the hash of everything that the code depends on (`loader.py`), so a file is never changed: it is written beside
its place and moved there, and of two processes that start at once either may win. Machine code runs with the user's
rights, so a folder or a file that others may write to, or that is not the user's, is not read.
"""

import hashlib
import os
import tempfile
from pathlib import Path

_FIRST = b"twinmesh kernel 2\n"
_SHA = 32


def default_folder() -> Path:
    """Return `$XDG_CACHE_HOME/twinmesh/kernels`, by default under `~/.cache`. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "twinmesh" / "kernels"


def read(path: Path) -> bytes | None:
    """Read an object file that `write` has written; None if there is none that can be trusted."""
    try:
        if not (_is_private(path.parent) and _is_private(path)):
            return None
        content = path.read_bytes()
    except OSError:
        return None
    start = len(_FIRST) + _SHA
    code = content[start:]
    return code if content[:start] == _head(path, code) else None


def write(path: Path, code: bytes) -> None:
    """Keep an object file.

    Raises:
        OSError: it cannot be kept; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_private(path.parent):
        raise PermissionError(f"{path.parent} belongs to another user, or others may write to it")
    handle, beside = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_head(path, code) + code)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _head(path: Path, code: bytes) -> bytes:
    """Return what comes before the code in the file of this name."""
    return _FIRST + hashlib.sha256(path.name.encode() + b"\n" + code).digest()


def _is_private(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022
