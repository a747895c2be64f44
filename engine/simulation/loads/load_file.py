"""Files that hold a load, told from each other by how they begin: traces, batch files, reports of earlier runs."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from ...metrics import benchmark_file, report_file
from ..workload import Workload
from .recorded import recorded_workload
from .traces import read_trace

_HEAD = 2**20  # bytes that are looked at
_REPORTS = (report_file.FORMAT, benchmark_file.FORMAT)
_PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"(\xb5/\xfd", b"\xfd7zXZ", b"BZh")  # gzip, zip, zstd, xz, bzip2
_OF_BATCHES = {"custom_id", "body", "messages", "prompt"}

type ReadBatch = Callable[[str], Workload]


def read_load_file(path: str, read_batch: ReadBatch | None = None) -> Workload:
    """Return the workload of a file; `read_batch` reads batch files, whose texts need a model's tokenizer.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is none of these, or a batch file, and nothing reads those; iterating may raise one as well.
    """
    with Path(path).open("rb") as file:
        line = file.readline(_HEAD)
    if line.startswith(_PACKED):
        raise ValueError(f"{path} is compressed: unpack it first.")
    fields = _fields(line)
    if any(form.encode() in line[:100] for form in _REPORTS) or fields.get("format") in _REPORTS:
        return recorded_workload(path)
    if fields.get("format") == "twinmesh decision log":
        raise ValueError(f"{path} is a decision log, not a load: 'twinmesh whatif' simulates its arrivals.")
    if not fields.keys() & _OF_BATCHES:
        return read_trace(path)
    if read_batch is None:
        raise ValueError(
            f"{path} is a batch file, whose texts are no lengths yet: name a model whose tokenizer is here."
        )
    return read_batch(path)


def _fields(line: bytes) -> dict[str, object]:
    """Return the fields of the object on the first line; none where it is no object, or a very long one."""
    try:
        return msgspec.json.decode(line, type=dict[str, object])
    except (ValueError, RecursionError):
        return {}
