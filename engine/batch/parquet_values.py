"""From Arrow's values to those of JSON: what a Parquet column of any type says, as a batch line would have said it.

A converter is made once for each column, from its type, because values alone do not tell: an empty map and an empty
list are both `[]` to Python. It reads no files.
"""

import math
from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow import DataType

type Converter = Callable[[Any], Any]


def converter(kind: "DataType") -> Converter | None:
    """Make what turns values of a type, as `to_pylist` gives them, into JSON's; None: they need no conversion.

    Maps become objects, decimals numbers (whole ones without a fraction), bytes texts where they are UTF-8, and what a
    struct lacks is left out: it has all its fields in every row, with null or, from pandas, NaN for none. Converters
    raise ValueError, in one sentence, for a map that has a key twice.
    """
    from pyarrow import types

    if types.is_map(kind):
        return _map(converter(kind.item_type))
    if types.is_struct(kind):
        return _struct({field.name: converter(field.type) for field in kind.fields})
    if any(is_list(kind) for is_list in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        return _list(converter(kind.value_type))
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return _list(converter(kind.value_type))
    if types.is_dictionary(kind):
        return converter(kind.value_type)
    if types.is_decimal(kind):
        return int if kind.scale == 0 else _fraction
    if types.is_floating(kind):
        return _number
    is_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return _text if is_bytes else None


def _map(convert: Converter | None) -> Converter:
    """Make an object of a map. Its nulls are values, such as the default of a schema: an absent key is not there."""

    def pairs(given: list[tuple[Any, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in given:
            name = str(_text(key) if isinstance(key, bytes) else key)
            if name in found:
                raise ValueError(f"the key {name!r} is there twice in one map: keep one of them.")
            found[name] = value if convert is None or value is None else convert(value)
        return found

    return pairs


def _struct(converters: dict[str, Converter | None]) -> Converter:
    def fields(given: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in given.items():
            convert = converters[name]
            if convert is not None and value is not None:
                value = convert(value)
            if value is not None:
                found[name] = value
        return found

    return fields


def _list(convert: Converter | None) -> Converter | None:
    if convert is None:
        return None
    return lambda given: [None if value is None else convert(value) for value in given]


def _fraction(given: Decimal) -> float:
    return float(given)


def _number(given: float) -> float | None:
    """Return None for NaN, which pandas writes where a number is missing; half floats become Python's."""
    return None if math.isnan(given) else float(given)


def _text(given: bytes) -> str | bytes:
    """Decode UTF-8: older Spark and Impala write texts as bytes."""
    try:
        return given.decode("utf-8")
    except UnicodeDecodeError:
        return given
