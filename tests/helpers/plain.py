"""Messages as plain JSON values: an object with its type's name and its fields, bytes as hex, tuples as lists."""

from dataclasses import fields, is_dataclass
from enum import Enum


def plain(value):
    """Convert dataclasses, named tuples and msgspec's structs, one in another or in tuples and lists."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if names := field_names(value):
        return {"type": type(value).__name__} | {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def field_names(kind):
    """List the fields of a message or its type, in order; none where it is no message."""
    if is_dataclass(kind):
        return tuple(field.name for field in fields(kind))
    return getattr(kind, "__struct_fields__", None) or getattr(kind, "_fields", ())
