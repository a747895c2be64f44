"""Where a batch run's requests come from: JSON lines, Parquet, or stdin, read as they are needed.

Invariants: lines are numbered from 1, blank ones included, and what is not blank is one request. A file is surveyed
before work starts, in 8 bytes of memory a line: how many requests, which content, and that no custom_id comes twice.
That is one pass over JSON lines, two over Parquet, and one more where two names have one hash. Lines of a file that
is no longer the surveyed one are not given. Stdin can be read only once, so it has no survey.
"""

import hashlib
import os
import select
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import parquet
from .request_lines import Line, read_custom_id

STDIN = "-"
_BLOCK_BYTES = 1 << 16
# Python looks for signals between its own steps and when a call is interrupted. One that comes just before a call that
# waits would be seen when that returns, which on a silent stdin is never.
_SIGNAL_SECONDS = 0.5
# How files begin in which every line would be an error.
_NOT_TEXT = {
    b"\x1f\x8b": "compressed with gzip: decompress it, or pipe it in with zcat and --input -",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: decompress it, or pipe it in with zstdcat and --input -",
    b"\xfd7zXZ": "compressed with xz: decompress it, or pipe it in with xzcat and --input -",
    b"BZh": "compressed with bzip2: decompress it, or pipe it in with bzcat and --input -",
    b"PK\x03\x04": "a zip file: unpack it first",
    b"PAR1": "in Parquet: give it a name that ends in .parquet",
    b"\xff\xfe": "in UTF-16: save it as UTF-8",
    b"\xfe\xff": "in UTF-16: save it as UTF-8",
}

# Inode, length and time of the last change.
type Stamp = tuple[int, int, int]


class InputError(RuntimeError):
    """An input that changed or can no longer be read; the message is one sentence."""


@dataclass(frozen=True)
class Survey:
    """What is known of an input file once it has been read through."""

    requests: int
    last_line: int  # number of the last line that is a request
    digest: str  # hash of the file's bytes
    stamp: Stamp  # as it was before the file was read


@dataclass(frozen=True)
class Source:
    """A batch run's input."""

    path: Path | None  # None for stdin

    @classmethod
    def of(cls, name: str | Path) -> "Source":
        """Return the input that a caller named; "-" is stdin.

        Raises:
            ValueError: the file does not exist, is not a regular file, cannot be read, or is of a format that is not
                supported.
        """
        if name == STDIN:
            _check_stdin()
            return cls(None)
        path = Path(name)
        try:
            if path.exists() and not path.is_file():
                raise ValueError(
                    f"The input {path} is not a regular file: give a file, or '-' for stdin, which cannot be resumed."
                )
            with path.open("rb") as file:
                start = file.read(8)
        except OSError as error:
            raise ValueError(f"The input {path} cannot be read: {error.strerror}.") from None
        if parquet.is_parquet(path):
            parquet.require_pyarrow(path)
            return cls(path)
        for magic, advice in _NOT_TEXT.items():
            if start.startswith(magic):
                raise ValueError(f"The input {path} is {advice}.")
        return cls(path)

    def __str__(self) -> str:
        """Return the input's name, for messages."""
        return "stdin" if self.path is None else str(self.path)

    def lines(self, survey: Survey | None = None) -> Iterator[tuple[int, Line]]:
        """Return an iterator over a file's requests and their line numbers; a byte order mark is not part of the first.

        Args:
            survey: give lines only as long as the file is the one that was surveyed; None: give whatever is in it.

        Raises:
            InputError: the file is no longer the surveyed one, or can no longer be read.
        """
        assert self.path is not None
        if survey is None:
            return self._lines(self.path)
        return self._surveyed_lines(self.path, survey)

    def lines_as_they_come(self, may_wait: Callable[[], bool]) -> Iterator[tuple[int, bytes] | None]:
        """Yield requests from stdin with their line numbers.

        None stands for a line that has not been written yet, when `may_wait` says not to wait for it.

        Raises:
            InputError: stdin cannot be read.
        """
        number = 0
        for line in _read_lines(sys.stdin.fileno(), may_wait):
            if line is None:
                yield None
                continue
            number += 1
            if stripped := _strip(line, number):
                yield number, stripped

    def survey(self) -> Survey:
        """Read the file through and return what is known of it.

        Raises:
            ValueError: it has no requests, a custom_id comes twice, or the file changes meanwhile.
        """
        assert self.path is not None
        stamp = _stamp(self.path)
        content = hashlib.blake2b()
        hashes, last = array("q"), 0
        for number, custom_id in self._custom_ids(content):
            hashes.append(hash(custom_id))
            last = number
        if not hashes:
            raise ValueError(f"The input {self.path} is empty: put one JSON request on each line.")
        self._refuse_duplicates(np.frombuffer(hashes, np.int64))
        digest = _shortened(content)
        if _stamp(self.path) != stamp:
            raise ValueError(f"The input {self.path} changed while it was read: start when it is complete.")
        return Survey(len(hashes), last, digest, stamp)

    def _lines(self, path: Path, content: "hashlib.blake2b | None" = None) -> Iterator[tuple[int, Line]]:
        """Yield a file's requests with their line numbers; `content` hashes the bytes of JSON lines on the way."""
        if parquet.is_parquet(path):
            yield from enumerate(parquet.read_rows(path), start=1)
            return
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if content is not None:
                    content.update(line)
                if stripped := _strip(line, number):
                    yield number, stripped

    def _surveyed_lines(self, path: Path, survey: Survey) -> Iterator[tuple[int, Line]]:
        """Yield a file's requests as long as it is the surveyed file, which is checked after each line was read."""
        stamp, lines = survey.stamp, self._lines(path)
        try:
            while True:
                line = next(lines, None)
                if (now := _stamp(path, stamp)) != stamp:
                    if _digest(path) != survey.digest:
                        raise InputError(
                            f"{path} changed while it was read: put it back as it was, or start over with --restart."
                        )
                    stamp = now  # touched, or replaced by a copy
                if line is None:
                    return
                yield line
        except OSError as error:
            raise InputError(f"{path} can no longer be read ({error.strerror or error}): put it right.") from error
        except ValueError as error:  # Parquet
            raise InputError(str(error)) from None

    def _custom_ids(self, content: "hashlib.blake2b | None" = None) -> Iterator[tuple[int, str]]:
        """Return an iterator over line numbers and names; `content` hashes the file's bytes on the way."""
        assert self.path is not None
        if parquet.is_parquet(self.path):
            rows: Iterator[tuple[int, Line]] = enumerate(parquet.survey_rows(self.path), start=1)
            if content is not None:
                _hash_file(self.path, content)
        else:
            rows = self._lines(self.path, content)
        return ((number, read_custom_id(line, number)) for number, line in rows)

    def _refuse_duplicates(self, hashes: np.ndarray) -> None:
        """Refuse a custom_id that comes twice.

        Lines with equal hashes are read again, because different names may have the same hash.
        """
        hashes.sort()
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        first: dict[str, int] = {}
        for number, custom_id in self._custom_ids() if suspects else ():
            if hash(custom_id) in suspects and first.setdefault(custom_id, number) != number:
                raise ValueError(
                    f"custom_id={custom_id!r} of line {number} is already that of line {first[custom_id]} in "
                    f"{self.path}: give each line its own."
                )


def _strip(line: bytes, number: int) -> bytes:
    return (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()


def _stamp(path: Path, unless_gone: Stamp = (0, 0, 0)) -> Stamp:
    """Return a file's stamp, or `unless_gone` if no file has this name.

    A process that has a file open can read on after it has lost its name; `unless_gone` is then the file's own stamp.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return unless_gone
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest(path: Path) -> str:
    content = hashlib.blake2b()
    _hash_file(path, content)
    return _shortened(content)


def _hash_file(path: Path, content: "hashlib.blake2b") -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, lambda: content)


def _shortened(content: "hashlib.blake2b") -> str:
    return content.hexdigest()[:32]


def _check_stdin() -> None:
    if sys.stdin is None:
        raise ValueError("The input '-' cannot be read, because stdin is closed: give it something to read.")
    try:
        sys.stdin.fileno()
    except OSError as error:
        raise ValueError(f"The input '-' cannot be read: {error.strerror or error}.") from None


def _read_lines(fd: int, may_wait: Callable[[], bool]) -> Iterator[bytes | None]:
    """Yield lines of a pipe; None when there is none yet and `may_wait` says not to wait.

    A line and a block are in memory at a time.
    """
    rest = bytearray()
    try:
        while True:
            is_waiting = may_wait()
            if not select.select([fd], [], [], _SIGNAL_SECONDS if is_waiting else 0)[0]:
                if not is_waiting:
                    yield None
                continue
            first, *others = (block := os.read(fd, _BLOCK_BYTES)).split(b"\n")
            rest += first
            for other in others:
                yield bytes(rest)
                rest = bytearray(other)
            if not block:
                break
    except OSError as error:
        raise InputError(f"stdin can no longer be read ({error.strerror}): give it something to read.") from error
    yield bytes(rest)
