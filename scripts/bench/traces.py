"""Recorded traces of requests: when they came, how long they were, and which blocks of their prompts were the same.

Two formats are read, by the name of the file. A CSV has a header and the columns TIMESTAMP, ContextTokens and
GeneratedTokens, as Azure publishes it; its prompts share nothing. A `.jsonl` has an object a line with timestamp (ms),
input_length, output_length and hash_ids, as Mooncake publishes it: an id stands for a block of `BLOCK` prompt tokens
and all before it, the last one for what does not fill a block. Times count from the first request.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

BLOCK = 512  # prompt tokens that one id of Mooncake's stands for
_CSV_COLUMNS = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}


@dataclass(frozen=True)
class Arrival:
    """A request of the trace."""

    t: float  # seconds from the first one
    prompt_len: int
    max_tokens: int
    hash_ids: tuple[int, ...] = ()  # of the prompt's blocks; empty: it shares nothing

    def block_hashes(self, page_size: int) -> tuple[bytes, ...]:
        """Return hashes of the prompt's full pages: equal where those of two requests hold the same prefix.

        Raises:
            ValueError: pages do not divide blocks.
        """
        if BLOCK % page_size:
            raise ValueError(f"page_size={page_size} does not divide the trace's blocks of {BLOCK} tokens.")
        pages = self.prompt_len // page_size if self.hash_ids else 0
        per_block = BLOCK // page_size
        return tuple(b"%d:%d" % (self.hash_ids[page // per_block], page % per_block) for page in range(pages))


def read_trace(path: str, limit: int | None = None) -> list[Arrival]:
    """Read a trace, or its first `limit` requests.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has fewer than two requests, or lacks a column; or a line is no request.
    """
    read = _read_jsonl if path.endswith(".jsonl") else _read_csv
    arrivals = read(path, limit)
    return [replace(arrival, t=arrival.t - arrivals[0].t) for arrival in arrivals]


def stretched(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    """Return the arrivals with all times multiplied by `factor`."""
    return [replace(arrival, t=arrival.t * factor) for arrival in arrivals]


def _read_csv(path: str, limit: int | None) -> list[Arrival]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(islice(csv.DictReader(file), limit))
    if len(rows) < 2 or not rows[0].keys() >= _CSV_COLUMNS:
        raise ValueError(f"{path} is no trace: give a CSV with TIMESTAMP, ContextTokens, GeneratedTokens and two rows.")
    return [_azure_arrival(row, f"{path}, line {number}") for number, row in enumerate(rows, start=2)]


def _azure_arrival(row: Mapping[str, str], where: str) -> Arrival:
    """Read one line, its time in seconds of the epoch."""
    try:
        t = datetime.fromisoformat(row["TIMESTAMP"])
        t = t.replace(tzinfo=t.tzinfo or UTC)  # not the machine's zone, whose days may have 23 hours
        return Arrival(t.timestamp(), int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"])))
    except (ValueError, TypeError):
        raise ValueError(f"{where}: {row} is no request: give a time as in ISO 8601 and two whole numbers.") from None


def _read_jsonl(path: str, limit: int | None) -> list[Arrival]:
    with Path(path).open(encoding="utf-8") as file:
        lines = list(islice(file, limit))
    if len(lines) < 2:
        raise ValueError(f"{path} is no trace: give two lines or more, an object of one request on each.")
    return [_mooncake_arrival(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _mooncake_arrival(line: str, where: str) -> Arrival:
    """Read one line, its time in seconds."""
    try:
        row: dict[str, Any] = json.loads(line)
        ids = tuple(int(id_) for id_ in row["hash_ids"])
        length, output = int(row["input_length"]), max(1, int(row["output_length"]))
        if len(ids) != -(-length // BLOCK):
            raise ValueError
        return Arrival(float(row["timestamp"]) / 1000, length, output, ids)
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{where} is no request: give an object with timestamp, input_length, output_length and hash_ids, "
            f"an id for every {BLOCK} tokens begun."
        ) from None
