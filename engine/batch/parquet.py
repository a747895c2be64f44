"""Batch files in Parquet, through pyarrow, which the extra `parquet` installs: rows of requests in, of results out.

A row of requests has the fields of a batch line as columns, of whatever type says them (`parquet_values.py`); a null is
a field that is not there, and a nested field may also be text that holds JSON. A row of results has the columns of
`_COLUMNS`; `response` is the JSON of the output line's own, so that no result is lost in the change of format. Both
ways stream; pyarrow is imported when it is needed.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .line_fields import Unreadable, load_json
from .parquet_values import Converter, converter
from .result_lines import encode_line, line_number

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".parquet", ".pq")
_COLUMNS = {
    "custom_id": "string",
    "line": "int64",
    "text": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
    "error_code": "string",
    "error_message": "string",
    "response": "string",
}
_ROWS_READ = 256
_ROWS_WRITTEN = 8192
# What pandas writes of rows whose numbers are not 0, 1, 2 and so on, as after a filter.
_PANDAS_INDEX = re.compile(r"__index_level_[0-9]+__")
_NESTED = (
    "messages",
    "body",
    "metadata",
    "logit_bias",
    "response_format",
    "structured_outputs",
    "tools",
    "chat_template_kwargs",
)


def is_parquet(path: str | Path) -> bool:
    """Return whether a file's name ends in .parquet or .pq."""
    return Path(path).suffix.lower() in SUFFIXES


def count_rows(path: Path) -> int:
    """Return the number of rows of a file.

    Raises:
        ValueError: pyarrow is missing, or this is not a Parquet file, or a damaged one.
    """
    with _open(path) as file:
        return int(file.metadata.num_rows)


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield each row as the fields of a batch line. Raises as `count_rows` does.

    Args:
        path: the file.
        columns: only these columns, as far as the file has them; None: all.
    """
    with _open(path) as file:
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        names = [name for name in names if not _PANDAS_INDEX.fullmatch(name)]
        converters = {name: converter(file.schema_arrow.field(name).type) for name in names}
        for batch in _batches(path, file, names):
            for row in batch.to_pylist() if names else [{}] * batch.num_rows:
                yield _fields(row, converters)


def survey_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield of each row only the custom_id, if the file has that column. Raises as `count_rows` does.

    Every column is decoded nevertheless, so that damage shows before any work is done.
    """
    with _open(path) as file:
        columns = file.schema_arrow.names
        for batch in _batches(path, file, columns):
            if "custom_id" in columns:
                convert = converter(file.schema_arrow.field("custom_id").type)
                names = batch.column("custom_id").to_pylist()
                yield from (_fields({"custom_id": name}, {"custom_id": convert}) for name in names)
            else:
                yield from ({} for _ in range(batch.num_rows))


def write_results(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write output lines as rows, to a file that is whole and on disk once this returns.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in _COLUMNS.items()])
    with path.open("wb") as sink, ParquetWriter(sink, schema, compression="zstd") as writer:
        for part in batched(lines, _ROWS_WRITTEN):
            writer.write_table(pyarrow.Table.from_pylist([_row(line) for line in part], schema))
        writer.close()
        sink.flush()
        os.fsync(sink.fileno())


def read_results(path: Path) -> Iterator[bytes]:
    """Yield the output lines from which `write_results` made these rows."""
    for row in read_rows(path, ["custom_id", "line", "error_code", "error_message", "response"]):
        error = {"code": row["error_code"], "message": row["error_message"]} if "error_code" in row else None
        response = json.loads(row["response"]) if "response" in row else None
        fields = {"id": f"batch_req_{row['line']}", "custom_id": row["custom_id"], "response": response, "error": error}
        yield encode_line(fields)


def count_results(path: Path) -> tuple[int, int]:
    """Return the number of rows with a result, and of rows with an error."""
    rows, failed = count_rows(path), sum(1 for row in read_rows(path, ["error_code"]) if row)
    return rows - failed, failed


def require_pyarrow(path: str | Path) -> None:
    """Raise ValueError if pyarrow is missing; the message names the file for which it is needed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path} is a Parquet file, and pyarrow is not installed: pip install 'twinmesh[parquet]'."
        ) from None


def _open(path: Path) -> "ParquetFile":
    require_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    with _refused(path):
        # A buffer: column chunks are read piece by piece, however large a row group is.
        file = ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    name, count = Counter(file.schema_arrow.names).most_common(1)[0] if file.schema_arrow.names else ("", 0)
    if count > 1:
        file.close()
        raise ValueError(f"{path} has {count} columns named {name!r}, of which a row can have one: rename the others.")
    return file


def _batches(path: Path, file: "ParquetFile", columns: list[str]) -> Iterator["RecordBatch"]:
    batches = file.iter_batches(batch_size=_ROWS_READ, columns=columns)
    while True:
        with _refused(path):
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # texts are UTF-8
        yield batch


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors about a file into a ValueError of one sentence.

    An OSError with a number comes from the operating system and is raised as it is.
    """
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} cannot be read as Parquet ({reason}): write it anew.") from None


def _fields(row: Mapping[str, Any], converters: Mapping[str, Converter | None]) -> dict[str, Any]:
    fields = {}
    for name, value in row.items():
        if value is None:
            continue
        convert = converters[name]
        try:
            plain = value if convert is None else convert(value)
            plain = _nested(name, plain)
        except ValueError as error:
            plain = Unreadable(str(error))
        if plain is not None:
            fields[name] = plain
    return fields


def _nested(name: str, value: Any) -> Any:
    """Parse a field that holds objects where it is text that holds JSON, in a body as well."""
    if name in _NESTED and isinstance(value, str):
        try:
            value = load_json(value)
        except json.JSONDecodeError:  # the line's own errors say what it should have been
            return value
    if name == "body" and isinstance(value, dict):
        return {inner: _nested(inner, held) for inner, held in value.items()}
    return value


def _row(line: dict[str, Any]) -> dict[str, Any]:
    error, response = line["error"] or {}, line["response"]
    body = response["body"] if response else {}
    choice = body["choices"][0] if response else {}
    text = choice["message"]["content"] if "message" in choice else choice.get("text")
    usage = body.get("usage", {})
    return {
        "custom_id": _text(line["custom_id"]),
        "line": line_number(line),
        "text": _text(text),
        "finish_reason": choice.get("finish_reason"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "completion_tokens": usage.get("completion_tokens"),
        "error_code": error.get("code"),
        "error_message": _text(error.get("message")),
        "response": encode_line(response).decode("utf-8").rstrip() if response else None,
    }


def _text(text: str | None) -> str | None:
    """Make a text fit for Parquet, which stores UTF-8: lone surrogates are written as escapes."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")
