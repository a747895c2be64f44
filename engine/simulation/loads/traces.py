"""Workloads from recorded traces: time stamps are replayed, and lengths of prompt and answer stay together.

A CSV has a header and the columns TIMESTAMP (ISO 8601; one without a zone is UTC), ContextTokens and GeneratedTokens,
others are ignored: as Azure publishes its LLM inference traces of 2023 (an hour, 100 ns, no zones) and 2024 (a week,
microseconds where there are any, with zones). Its prompts share nothing.

A JSONL has an object a line with timestamp (ms), input_length, output_length and hash_ids: as Mooncake publishes its
traces (conversation, toolagent, synthetic). An id stands for a block of `MOONCAKE_BLOCK` prompt tokens and all before
it, the last one for what does not fill a block.

Times count from the first request, lengths of 0 count as 1. Files are read as they are iterated over, so that a million
lines take no room, and are checked each time: a line that is no request, or that comes before the one above, is refused
with its number.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path

import msgspec

from ..workload import Workload, WorkRequest

MOONCAKE_BLOCK = 512
_LONGEST = 2**31 - 1  # tokens
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class AzureTrace:
    """The requests of a CSV as Azure publishes it."""

    path: Path

    def __iter__(self) -> Iterator[WorkRequest]:
        """Read the file; raise a ValueError at what is no request."""
        with self.path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = csv.reader(file)
            try:
                time, prompt, output = self._places(next(lines, []))
                start = last = None
                for row in lines:
                    t, prompt_len, output_len = _azure_row(row, time, prompt, output)
                    if last is not None and t < last:
                        raise ValueError(_UNSORTED)
                    start, last = t if start is None else start, t
                    yield WorkRequest(prompt_len, output_len, t - start)
            except (ValueError, csv.Error) as error:
                raise ValueError(f"{self.path}, line {lines.line_num}: {error}") from None
        if last is None:
            raise ValueError(f"{self.path} has a header and no request: give a trace with at least one.")

    def _places(self, header: list[str]) -> tuple[int, int, int]:
        names = [name.strip() for name in header]
        missing = [name for name in _AZURE if name not in names]
        if missing:
            raise ValueError(
                f"there is no column {' and no '.join(missing)}: give a CSV with the header {','.join(_AZURE)}, or a "
                "JSONL as Mooncake publishes it."
            )
        time, prompt, output = map(names.index, _AZURE)
        return time, prompt, output


_UNSORTED = "it comes before the line above: sort the lines by their times."


def _azure_row(row: list[str], time: int, prompt: int, output: int) -> tuple[float, int, int]:
    """Read one line, its time in seconds of the epoch."""
    try:
        t = datetime.fromisoformat(row[time].strip())
        prompt_len, output_len = int(row[prompt]), int(row[output])
    except (ValueError, IndexError):
        prompt_len = output_len = -1
        t = datetime.min
    if not (0 <= prompt_len <= _LONGEST and 0 <= output_len <= _LONGEST):
        raise ValueError(f"{','.join(row)[:100]!r} is no request: give a time as in ISO 8601 and two whole numbers.")
    # Not the machine's zone, whose days may have 23 hours.
    seconds = t.timestamp() if t.tzinfo else t.replace(tzinfo=UTC).timestamp()
    return seconds, max(1, prompt_len), max(1, output_len)


_MOONCAKE = "timestamp (ms), input_length, output_length and hash_ids"


class _MooncakeRow(msgspec.Struct):
    """One line; other fields are ignored."""

    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True)
class MooncakeTrace:
    """The requests of a JSONL as Mooncake publishes it."""

    path: Path

    def __iter__(self) -> Iterator[WorkRequest]:
        """Read the file; raise a ValueError at what is no request."""
        decode = msgspec.json.Decoder(_MooncakeRow).decode
        start = last = None
        number = 0
        with self.path.open("rb") as file:
            try:
                for line in file:
                    number += 1
                    row = decode(line)
                    _check(row)
                    if last is not None and row.timestamp < last:
                        raise ValueError(_UNSORTED)
                    start, last = row.timestamp if start is None else start, row.timestamp
                    lengths = max(1, row.input_length), max(1, row.output_length)
                    yield WorkRequest(*lengths, (last - start) / 1000, blocks=row.hash_ids)
            except (msgspec.DecodeError, RecursionError) as error:
                raise ValueError(f"{self.path}, line {number}: {error}: give an object with {_MOONCAKE}.") from None
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: {error}") from None


def _check(row: _MooncakeRow) -> None:
    if not (0 <= row.input_length <= _LONGEST and 0 <= row.output_length <= _LONGEST):
        raise ValueError("a length is below 0, or no length that a prompt has: give whole numbers of tokens.")
    if len(row.hash_ids) != -(-row.input_length // MOONCAKE_BLOCK):
        raise ValueError(
            f"{len(row.hash_ids)} hash_ids for {row.input_length} tokens: give one for every {MOONCAKE_BLOCK} begun."
        )


def read_trace(path: str | PathLike[str]) -> Workload:
    """Return the workload of a trace file: JSONL if its first character is a brace, else CSV.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no trace; iterating over it may raise one as well, at what is wrong further down.
    """
    file = Path(path)
    with file.open("rb") as opened:
        head = opened.read(1)
    if not head:
        raise ValueError(f"{path} is empty: give a trace with at least one request.")
    workload = Workload(file.name, MooncakeTrace(file) if head == b"{" else AzureTrace(file), MOONCAKE_BLOCK)
    next(iter(workload.requests))
    return workload
