"""The base classes of everything that crosses between control plane and executor.

Messages are frozen and hold plain data only: numbers, texts, bytes, tuples, dicts and host arrays, nothing callable.
Their class names are their tags, in bytes (`wire.py`) as in the decision log. None holds itself, so the garbage
collector need not track them.
"""

import msgspec


class Message(msgspec.Struct, frozen=True, gc=False, tag=True, forbid_unknown_fields=True):
    """A message; in bytes it is a map by the names of its fields."""


class Row(msgspec.Struct, frozen=True, gc=False, tag=True, array_like=True, forbid_unknown_fields=True):
    """A part that a message holds many of; in bytes it is an array, which takes half the time and space."""
