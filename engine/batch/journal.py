"""The file that a batch run writes its results to, one line each, and from which it goes on after any kind of end.

Invariants: one process has it open at a time; a line is written by one call and is whole or, where that fails, taken
back; once opened it holds whole output lines only, no two for the same input line. A killed process loses nothing that
was written. A power loss loses at most what was written since the last `sync`, which comes every few seconds and at the
end; it may tear lines, which are found when the file is opened again, because no torn line is a JSON object.
"""

import errno
import fcntl
import json
import os
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BatchStopped
from .files import scratch_of, sync_directory
from .result_lines import line_number

SYNC_SECONDS = 5.0
_BLOCK_BYTES = 1 << 20


@dataclass
class Kept:
    """What an opened journal holds of earlier starts: which input lines have an output line, and counts."""

    done: bytearray  # by number of the input line: 1 if it has an output line
    succeeded: int = 0  # output lines with a result
    failed: int = 0  # output lines with an error
    mended: int = 0  # damaged or repeated lines that were taken out
    retried: int = 0  # lines with an error that were taken out, to be run again

    @property
    def lines(self) -> int:
        """Return the number of output lines."""
        return self.succeeded + self.failed


class Journal:
    """An open journal, locked against other processes. `created`: the file did not exist before."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Open and lock the file, creating it if it does not exist.

        Raises:
            ValueError: another process has it open.
            OSError: it cannot be created or opened.
        """
        self.path, self._clock = path, clock
        self.created = not path.exists()
        self._fd = _open_locked(path)
        self._size = os.fstat(self._fd).st_size
        self._synced = clock()
        if self.created:
            sync_directory(path.parent)

    @property
    def is_empty(self) -> bool:
        """Return whether the file holds no line."""
        return self._size == 0

    def clear(self) -> None:
        """Remove every line."""
        self._cut(0)

    def recover(self, last_line: int, *, retry_errors: bool) -> Kept:
        """Remove lines that cannot stay, and return what the file then holds.

        Removed are damaged lines, lines that answer no input line from 1 to `last_line`, lines that answer one a second
        time, and, with `retry_errors`, lines with an error. If only the end of the file is affected, as by a torn line,
        the file is cut there; otherwise it is replaced in one step by a new file with the lines that stay.

        Raises:
            OSError: the new file cannot be written; the old one is as it was.
        """
        sieve = _Sieve(last_line, retry_errors)
        end, has_gaps = 0, False
        for offset, line in self._lines():
            if not sieve.keeps(line):
                continue
            has_gaps |= offset != end
            end = offset + len(line)
        if has_gaps:
            again = _Sieve(last_line, retry_errors)
            self.rewrite(line for _, line in self._lines() if again.keeps(line))
        elif end < self._size:
            self._cut(end)
        if end and not self._ends_with_newline():
            self.append(b"\n")  # a whole line that only lacks its end
        return sieve.kept

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """Replace the content atomically and keep the lock. If this raises OSError, the file is as it was."""
        scratch = scratch_of(self.path)
        fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        try:
            _lock(fd, scratch)
            size = 0
            for line in lines:
                size += _write(fd, line if line.endswith(b"\n") else line + b"\n")
            os.fsync(fd)
            scratch.replace(self.path)
        except BaseException:
            os.close(fd)
            scratch.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd, self._size = fd, size
        sync_directory(self.path.parent)

    def append(self, line: bytes) -> None:
        """Hand a line, which must end in a newline, to the operating system, and `sync` every SYNC_SECONDS.

        Raises:
            OSError: the line could not be written; no part of it stays in the file.
            BatchStopped: as `sync` raises it.
        """
        try:
            _write(self._fd, line)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)
        if self._clock() - self._synced >= SYNC_SECONDS:
            self.sync()

    def count_lines(self) -> int:
        """Count the lines that the file holds, even if it no longer has its name."""
        lines = offset = 0
        while block := os.pread(self._fd, _BLOCK_BYTES, offset):
            lines, offset = lines + block.count(b"\n"), offset + len(block)
        return lines

    def sync(self) -> None:
        """Put on disk what was written.

        Raises:
            OSError: that failed.
            BatchStopped: the file no longer has its name, so that nobody would find there what is written.
        """
        os.fsync(self._fd)
        if not self._is_in_place():
            raise BatchStopped(
                f"{self.path} was moved, removed or replaced while results were written to it: put it back and give "
                "the same command, or what was in it is computed again."
            )
        self._synced = self._clock()

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the output lines, parsed, in the order of the input; takes 8 bytes of memory for each input line."""
        offsets = array("q")
        for offset, line in self._lines():
            number = line_number(json.loads(line))
            offsets.extend([-1] * (number + 1 - len(offsets)))
            offsets[number] = offset
        with self.path.open("rb") as file:
            for offset in offsets:
                if offset >= 0:
                    file.seek(offset)
                    yield json.loads(file.readline())

    def close(self, *, remove: bool = False) -> None:
        """Unlock the file, and with `remove` delete it."""
        if remove and self._is_in_place():
            self.path.unlink()
        os.close(self._fd)

    def _is_in_place(self) -> bool:
        return _has_name(self._fd, self.path)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        offset = 0
        with self.path.open("rb", buffering=_BLOCK_BYTES) as file:
            for line in file:
                yield offset, line
                offset += len(line)

    def _ends_with_newline(self) -> bool:
        return os.pread(self._fd, 1, self._size - 1) == b"\n"

    def _cut(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        os.fsync(self._fd)
        self._size = size


class _Sieve:
    """A filter that decides for each line of a journal whether it stays, and counts the decisions in `kept`."""

    def __init__(self, last_line: int, retry_errors: bool) -> None:
        self.kept = Kept(bytearray(last_line + 1))
        self._retry_errors = retry_errors

    def keeps(self, line: bytes) -> bool:
        kept, failed = self.kept, False
        try:
            fields = json.loads(line)
            number, failed = line_number(fields), fields["error"] is not None
        except (ValueError, AttributeError, RecursionError):
            number = len(kept.done)
        if number >= len(kept.done) or kept.done[number]:
            kept.mended += 1
            return False
        if failed and self._retry_errors:
            kept.retried += 1
            return False
        kept.done[number] = True
        kept.failed += failed
        kept.succeeded += not failed
        return True


def _open_locked(path: Path) -> int:
    """Open and lock the file that has this name, and return its descriptor.

    Another process may replace the file between opening and locking; it is then opened again.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _lock(fd, path)
            if _has_name(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _has_name(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{path} is being written by another process: wait until it ends, or give another --output."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(
            f"{path} cannot be locked on this file system: nothing keeps a second run from writing to it.", stacklevel=2
        )


def _write(fd: int, data: bytes) -> int:
    """Write all of `data` and return its length: one call may write only a part, as on a disk that gets full."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
    return len(data)
