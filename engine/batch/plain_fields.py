"""Fields of a request's body, freed of what tables and types put into them.

Tables write every key in every row, and null where a row has nothing; so do OpenAI's own types. A null is a field that
is not there, except where it is a value: in the arguments of a tool call, as `default` or `const` of a JSON schema, and
as an element of a list. Tables also make 16.0 of 16. Pure functions of JSON's values.
"""

from collections.abc import Mapping
from typing import Any

# What holds JSON schemas.
_SCHEMAS = frozenset({"tools", "response_format", "structured_outputs"})
# What is below these is the caller's data.
_DATA = frozenset({"arguments"})
_WHOLE_NUMBERS = frozenset({"n", "best_of", "top_k", "seed", "max_tokens", "max_completion_tokens", "min_tokens"})
_LISTS_OF_IDS = frozenset({"prompt", "stop_token_ids", "allowed_token_ids"})
_SCHEMA_DATA = frozenset({"default", "const", "enum", "examples"})
_MAY_BE_NULL = frozenset({"default", "const"})
# Below these, names are the caller's and no keywords.
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def plain_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a body that are not null, with whole numbers and token ids as integers."""
    return {name: _plain(name, value) for name, value in body.items() if value is not None}


def _plain(name: str, value: Any) -> Any:
    if type(value) is float:
        return int(value) if name in _WHOLE_NUMBERS and value.is_integer() else value
    if name in _LISTS_OF_IDS and isinstance(value, list):
        return _whole(value)
    if name in _SCHEMAS:
        return without_nulls_in_schema(value)
    return without_nulls(value) if isinstance(value, dict) or name == "messages" else value


def _whole(values: list[Any]) -> list[Any]:
    if not any(type(value) in (float, list) for value in values):
        return values
    plain = [_whole(value) if isinstance(value, list) else value for value in values]
    return [int(value) if type(value) is float and value.is_integer() else value for value in plain]


def without_nulls(value: Any) -> Any:
    """Remove null fields on every level, such as in the parts of a message."""
    if isinstance(value, dict):
        return {
            name: inner if name in _DATA else without_nulls(inner) for name, inner in value.items() if inner is not None
        }
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def without_nulls_in_schema(value: Any) -> Any:
    """Remove null fields from JSON schemas and from the tools around them, except where null is a value."""
    if isinstance(value, list):
        return [without_nulls_in_schema(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _of_keyword(name, inner) for name, inner in value.items() if inner is not None or name in _MAY_BE_NULL
    }


def _of_keyword(name: str, value: Any) -> Any:
    if name in _SCHEMA_DATA:
        return value
    if name in _SCHEMAS_BY_NAME and isinstance(value, dict):
        return {key: without_nulls_in_schema(inner) for key, inner in value.items() if inner is not None}
    return without_nulls_in_schema(value)
