"""One line of a batch run's input as fields: an object of JSON in a file of lines, or a row of a table.

Pure functions of bytes and values. What the fields ask for is for `request_lines.py`.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A request as it is read: a line of JSON, or fields that come from elsewhere.
type Line = bytes | Mapping[str, Any]

TOO_DEEP = "this JSON is nested too deeply: put one flat request on each line."
_BOM = "\ufeff"


@dataclass(frozen=True)
class Unreadable:
    """A field of a row that could not be read, and why, in one sentence."""

    why: str


def line_fields(text: Line) -> dict[str, Any]:
    """Return the fields of a line that are not null.

    Raises:
        json.JSONDecodeError: it is no JSON.
        ValueError: it is no UTF-8, no object, has a key twice, a byte order mark inside, or is nested too deeply.
    """
    fields = _load(text) if isinstance(text, bytes) else text
    return {name: value for name, value in fields.items() if value is not None}


def check_readable(fields: Mapping[str, Any]) -> None:
    """Refuse a line of which a field could not be read; ValueError names the field."""
    for name, value in fields.items():
        if isinstance(value, Unreadable):
            raise ValueError(f"{name!r} cannot be read: {value.why}")


def _load(text: bytes) -> dict[str, Any]:
    try:
        line = text.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("this is not UTF-8 text: save the file as UTF-8.") from None
    try:
        fields = load_json(line)
    except json.JSONDecodeError as error:
        if line[error.pos : error.pos + 1] != _BOM:
            raise
        raise ValueError(
            f"a byte order mark (EF BB BF) stands at column {error.colno}, as where files were joined: remove it, and "
            "keep one JSON object on each line."
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(f'this is {kind_of(fields)}, not a JSON object: write for example {{"prompt": "Hello"}}.')
    return fields


def load_json(text: str) -> Any:
    """Read JSON in which no key comes twice.

    Raises:
        json.JSONDecodeError: it is no JSON.
        ValueError: a key comes twice, or it is nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object's pairs; ValueError if a key comes twice, which Python alone would accept."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {name!r} is there twice in one object: keep one of them.")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def kind_of(value: object) -> str:
    """Name the type of a JSON value in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "missing"}
    return kinds.get(type(value), "a number")
