"""Load reports on file: one JSON object with format and version, the report, what follows from it, every record, and
samples of the engine's state over the run.

Records are columns by the names of `RequestRecord`'s fields; a time that is not there is null, a reason its place in
`reasons`. `figures` are there for other programs: they follow from the rest, and are not read back.
"""

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..host.whole_file import write_whole
from ..protocol.service import SLO
from .file_head import Head, check_head
from .load_report import LoadReport
from .request_records import REASONS, RequestRecords
from .series import Series

VERSION = 2
FORMAT = "twinmesh load report"
_FIGURES = (
    "requests", "finished", "output_tokens_per_second", "total_tokens_per_second", "output_tokens_per_second_per_gpu",
    "total_tokens_per_second_per_gpu", "hit_rate", "utilisation", "dollars", "joules_per_output_token",
)  # fmt: skip


class Measured(NamedTuple):
    """A run under load: what it comes to, and what it consists of."""

    report: LoadReport
    records: RequestRecords | None = None  # None: they were not kept
    series: Series | None = None  # None: nobody took samples


class _Records(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    columns: dict[str, list[int | float | None]]
    reasons: tuple[str, ...]
    slos: dict[int, SLO]  # of those that have one of their own, by place


class _File(msgspec.Struct, frozen=True):
    format: str
    version: int
    report: LoadReport
    figures: dict[str, Any]
    records: _Records | None
    series: Series | None


def write_report(
    path: str | PathLike[str], report: LoadReport, records: RequestRecords | None = None, series: Series | None = None
) -> None:
    """Write a report; None: without the records that it sums up, or without samples.

    Raises:
        OSError: the file cannot be written; an earlier one is as it was.
    """
    write_whole(path, report_json(report, records, series))


def report_json(report: LoadReport, records: RequestRecords | None = None, series: Series | None = None) -> bytes:
    """Return a report as JSON on one line; None: without the records that it sums up, or without samples."""
    figures = {name: getattr(report, name) for name in _FIGURES}
    parts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "report": report,
        "figures": figures,
        "records": None,
        "series": series,
    }
    if records is not None:
        # One column after the other, as Python's own numbers are large.
        columns = {name: msgspec.Raw(msgspec.json.encode(records.column(name).tolist())) for name in records.names}
        parts["records"] = {"columns": columns, "reasons": REASONS, "slos": records.slos()}
    return msgspec.json.encode(parts)


def read_report(path: str | PathLike[str]) -> Measured:
    """Read a report, and its records and samples if they are there.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no report, or one of another version.
    """
    return parse_report(Path(path).read_bytes(), str(path))


def parse_report(data: bytes, name: str) -> Measured:
    """Read a report from JSON; `name` is for the message.

    Raises:
        ValueError: it is no report, or one of another version.
    """
    check_head(data, name, Head(FORMAT, VERSION), kind="load report", made_by="a run or a simulation")
    try:
        file = msgspec.json.decode(data, type=_File)
        records = None if file.records is None else _table(file.records)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    return Measured(file.report, records, file.series)


def _table(records: _Records) -> RequestRecords:
    if records.reasons != REASONS:
        raise ValueError(f"its reasons are {records.reasons}, not {REASONS}.")
    return RequestRecords.of_columns(records.columns, records.slos)
