"""What a line's answer has to keep to: OpenAI's `response_format`, or vLLM's `structured_outputs`.

Pure functions of JSON's values. What a schema or grammar itself has wrong, the engine says (`structured/grammar.py`).
"""

from dataclasses import fields
from typing import Any

from ..structured.params import StructuredOutputsParams
from .line_fields import kind_of

_KINDS = '{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...}} or {"type": "text"}'
_FIELDS = tuple(one.name for one in fields(StructuredOutputsParams))


def structured_outputs(given: object, response_format: object) -> StructuredOutputsParams | None:
    """Return what the two fields ask for, of which a line may have one; None: nothing.

    Raises:
        ValueError: both, or one that is of another form.
    """
    asked = None if response_format is None else _of_format(response_format)
    if given is None:
        return asked
    if asked is not None:
        raise ValueError("response_format and structured_outputs both say what the answer has to be: leave one out.")
    if not isinstance(given, dict):
        raise ValueError(f'structured_outputs is {kind_of(given)}, not an object such as {{"json": ...}}.')
    strangers = sorted(given.keys() - {*_FIELDS})
    if strangers:
        raise ValueError(f"structured_outputs has no {strangers[0]!r}: remove it; {', '.join(_FIELDS)} are.")
    return StructuredOutputsParams(**given)


def _of_format(given: object) -> StructuredOutputsParams | None:
    kind = given.get("type") if isinstance(given, dict) else None
    if not isinstance(given, dict) or kind not in ("text", "json_object", "json_schema"):
        raise ValueError(f"response_format={given!r} is not usable: it must be {_KINDS}.")
    strangers = sorted(given.keys() - {"type", *(["json_schema"] if kind == "json_schema" else [])})
    if strangers:
        raise ValueError(f"response_format has {strangers[0]!r}, which {kind} has not: remove it.")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=_schema(given.get("json_schema")))


def _schema(given: object) -> Any:
    """Return the schema in OpenAI's envelope, whose name and description are for readers; it is always kept to
    strictly."""
    if not isinstance(given, dict) or not isinstance(given.get("schema"), dict | bool):
        raise ValueError('response_format has no schema: write "json_schema": {"name": ..., "schema": {...}}.')
    strangers = sorted(given.keys() - {"name", "description", "schema", "strict"})
    if strangers:
        raise ValueError(f"response_format.json_schema has {strangers[0]!r}: remove it; name, schema and strict are.")
    return given["schema"]
