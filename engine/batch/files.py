"""Helpers for files of any content: replace one atomically, sync its directory, compare what two names refer to.

Invariant: while a file is being replaced, its new content is beside it, under its name with `.tmp` added.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def scratch_of(path: Path) -> Path:
    """Return the path to which a file's new content is written before it replaces the file."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file's new content to, and replace the file by it unless something is raised.

    The caller has to put the content on disk (`os.fsync`). Raises OSError if the file cannot be replaced.
    """
    scratch = scratch_of(path)
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Put a directory's entries on disk: until then a power loss can undo a rename."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_same(one: Path, other: Path) -> bool:
    """Return whether two paths name, or would name, the same file."""
    if os.path.exists(one) and os.path.exists(other):
        return one.samefile(other)
    return real_path(one) == real_path(other)


def is_inside(path: Path, directory: Path) -> bool:
    """Return whether a file is, or would be, in or below a directory that exists."""
    return os.path.isdir(directory) and real_path(path).is_relative_to(real_path(directory))


def real_path(path: str | Path) -> Path:
    """Return the path with links followed.

    Unlike `Path.resolve`, it accepts links that go in a circle; opening such a path gives the better error message.
    """
    return Path(os.path.realpath(path))
