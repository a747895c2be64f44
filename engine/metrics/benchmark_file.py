"""Benchmarks on file: one JSON object with what was run and its points, each a load report as `report_file.py` has it.

A load report alone, as `twinmesh simulate --json` writes it, reads as a benchmark of one point, so a run and its
simulation can be laid side by side whoever made them.
"""

from os import PathLike
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..host.whole_file import write_whole
from . import report_file
from .file_head import Head, check_head, head_of
from .report_file import Measured, parse_report, report_json

VERSION = 1
FORMAT = "twinmesh benchmark"


class Accuracy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many questions of a set the engine answered as it should, in the state in which it was measured."""

    name: str  # of the set
    asked: int
    right: int
    failed: int = 0  # of the asked: those that got no answer, for whatever reason; they are not right

    @property
    def score(self) -> float:
        """Return the share, 0 to 1, of questions that were answered right."""
        return self.right / self.asked if self.asked else 0.0


class About(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was run, for readers."""

    preset: str | None = None  # None: a load of one's own
    shaped_like: str | None = None  # what the preset is shaped like; none is that benchmark: all are "unofficial"
    scale: float = 1.0  # of lengths and times; below 1 nothing compares with the published figures of that benchmark
    when: str | None = None  # ISO 8601; None: in virtual time only
    notes: tuple[str, ...] = ()


class Point(NamedTuple):
    """One load of a benchmark."""

    name: str  # as in "concurrency 8"
    measured: Measured
    concurrency: int | None = None  # of a closed loop
    rate: float | None = None  # requests/s that came, of an open loop
    accuracy: Accuracy | None = None  # None: nothing was asked


class Benchmark(NamedTuple):
    """Points in the order in which they were run; at least one."""

    about: About
    points: tuple[Point, ...]


class _Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    concurrency: int | None
    rate: float | None
    accuracy: Accuracy | None
    report: msgspec.Raw


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    version: int
    about: About
    points: tuple[_Point, ...]


def write_benchmark(path: str | PathLike[str], benchmark: Benchmark) -> None:
    """Write a benchmark with all its records and samples.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    write_whole(path, benchmark_json(benchmark))


def benchmark_json(benchmark: Benchmark) -> bytes:
    """Return a benchmark as JSON on one line."""
    points = tuple(
        _Point(one.name, one.concurrency, one.rate, one.accuracy, msgspec.Raw(report_json(*one.measured)))
        for one in benchmark.points
    )
    return msgspec.json.encode(_File(FORMAT, VERSION, benchmark.about, points))


def read_benchmark(path: str | PathLike[str]) -> Benchmark:
    """Read a benchmark, or a load report as one of a single point.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither, or of another version.
    """
    return parse_benchmark(Path(path).read_bytes(), str(path))


def parse_benchmark(data: bytes, name: str) -> Benchmark:
    """Read a benchmark from JSON; `name` is for the message.

    Raises:
        ValueError: it is neither a benchmark nor a load report, or one of another version.
    """
    head = head_of(data)
    if head is not None and head.format == report_file.FORMAT:
        measured = parse_report(data, name)
        return Benchmark(About(), (Point(measured.report.run.workload, measured),))
    check_head(data, name, Head(FORMAT, VERSION), kind="benchmark", made_by="'twinmesh bench serve --json'")
    try:
        file = msgspec.json.decode(data, type=_File)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    points = [
        Point(one.name, parse_report(bytes(one.report), f"{name}, {one.name}"), one.concurrency, one.rate, one.accuracy)
        for one in file.points
    ]
    if not points:
        raise ValueError(f"{name} has no point: make it again.")
    return Benchmark(file.about, tuple(points))
