"""Files on disk, whatever they hold: replaced as a whole, made to last, and compared by what their names stand for.

Invariant: a file that is being replaced has its new content beside it, under its name and `.tmp`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def scratch_of(path: Path) -> Path:
    """Where a file's new content is written before it takes the old one's place."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file's new content to, and to put on disk there; it takes the old one's place unless something
    is raised. Raises OSError where it cannot.
    """
    scratch = scratch_of(path)
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a reader finds the old content or the new, also after a power loss."""
    with replacing(path) as scratch, scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Put a directory's entries on disk: until then a power loss can undo a rename."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_same(one: Path, other: Path) -> bool:
    """Whether two names are, or would be, those of one file."""
    if os.path.exists(one) and os.path.exists(other):
        return one.samefile(other)
    return real_path(one) == real_path(other)


def is_inside(path: Path, directory: Path) -> bool:
    """Whether a file is, or would be, in a directory that is there, or below it."""
    return os.path.isdir(directory) and real_path(path).is_relative_to(real_path(directory))


def real_path(path: str | Path) -> Path:
    """Links followed. `Path.resolve` fails on links that go in a circle, which opening them says better."""
    return Path(os.path.realpath(path))
