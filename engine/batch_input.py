"""Where a batch run's requests come from: JSON lines, Parquet, or stdin, read as they are needed.

Invariants: lines are numbered from 1, blank ones included, and what is not blank is one request. A file is surveyed
before work starts, in one pass and 8 bytes of memory a line: how many requests, which content, and that no custom_id
comes twice. The file must not change while it is used. Stdin can be read only once, so it has no survey.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import batch_parquet
from .batch_lines import Line, read_custom_id

STDIN = "-"


@dataclass(frozen=True)
class Survey:
    """What is known of an input file: its requests, the number of its last line, and a hash of its bytes."""

    requests: int
    last_line: int
    digest: str


@dataclass(frozen=True)
class Source:
    """A batch run's input; `path` is None for stdin."""

    path: Path | None

    @classmethod
    def of(cls, name: str | Path) -> "Source":
        """The input that a caller named; "-" is stdin.

        Raises:
            ValueError: there is no such file, it is no file, or it cannot be read.
        """
        if name == STDIN:
            if sys.stdin is None:
                raise ValueError("The input '-' cannot be read, because stdin is closed: give it something to read.")
            return cls(None)
        path = Path(name)
        try:
            if path.exists() and not path.is_file():
                raise ValueError(
                    f"The input {path} is not a regular file: give a file, or '-' for stdin, which cannot be resumed."
                )
            with path.open("rb"):
                pass
        except OSError as error:
            raise ValueError(f"The input {path} cannot be read: {error.strerror}.") from None
        if batch_parquet.is_parquet(path):
            batch_parquet.require_pyarrow(path)
        return cls(path)

    def __str__(self) -> str:
        """Its name, for messages."""
        return "stdin" if self.path is None else str(self.path)

    def lines(self) -> Iterator[tuple[int, Line]]:
        """Requests with their numbers; a byte order mark is not part of the first."""
        if self.path is None:
            yield from _numbered(sys.stdin.buffer)
        elif batch_parquet.is_parquet(self.path):
            yield from enumerate(batch_parquet.read_rows(self.path), start=1)
        else:
            with self.path.open("rb") as file:
                yield from _numbered(file)

    def survey(self) -> Survey:
        """Read a file once.

        Raises:
            ValueError: it has no requests, or a custom_id comes twice.
        """
        assert self.path is not None
        hashes, last = array("q"), 0
        for number, custom_id in self._custom_ids():
            hashes.append(hash(custom_id))
            last = number
        if not hashes:
            raise ValueError(f"The input {self.path} is empty: put one JSON request on each line.")
        self._refuse_duplicates(np.frombuffer(hashes, np.int64))
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]
        return Survey(len(hashes), last, digest)

    def _custom_ids(self) -> Iterator[tuple[int, str]]:
        if self.path is not None and batch_parquet.is_parquet(self.path):
            rows: Iterator[tuple[int, Line]] = enumerate(batch_parquet.read_rows(self.path, ["custom_id"]), start=1)
        else:
            rows = self.lines()
        return ((number, read_custom_id(line, number)) for number, line in rows)

    def _refuse_duplicates(self, hashes: np.ndarray) -> None:
        """Equal hashes are looked at again: of different names they are no harm."""
        hashes.sort()
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        first: dict[str, int] = {}
        for number, custom_id in self._custom_ids() if suspects else ():
            if hash(custom_id) in suspects and first.setdefault(custom_id, number) != number:
                raise ValueError(
                    f"custom_id={custom_id!r} of line {number} is already that of line {first[custom_id]} in "
                    f"{self.path}: give each line its own."
                )


def _numbered(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, start=1):
        stripped = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
        if stripped:
            yield number, stripped
