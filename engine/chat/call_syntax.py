"""How calls of tools stand in a text: the contract of what reads them, and what the readers of all forms share.

A `CallSyntax` reads one block of calls at a place where one may begin, and says what was called, or that it was no
call: too short, another function than there is, arguments that are no object. It never raises. Which text is around
the calls, and what becomes of what is no call, is `text_parser.py`'s business.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from .text_cursor import Reading, TextCursor


class Call(NamedTuple):
    """What was called, and with what."""

    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True)
class KnownTools:
    """The functions that may be called."""

    names: frozenset[str]
    # The types of JSON that arguments may have by the functions' schemas; empty: a schema does not say.
    types: Mapping[str, Mapping[str, frozenset[str]]] = field(default_factory=dict)

    def types_of(self, function: str, argument: str) -> frozenset[str]:
        """Return the types that an argument may have; empty: any."""
        return self.types.get(function, {}).get(argument, frozenset())


class CallSyntax(Protocol):
    """One form of calls."""

    @property
    def starts(self) -> tuple[str, ...]:
        """Texts at which a block may begin."""
        ...

    @property
    def markers(self) -> frozenset[str]:
        """Texts of markup that may be special tokens."""
        ...

    @property
    def is_whole_answer(self) -> bool:
        """Whether a block begins only where the answer does."""
        ...

    @property
    def passes_refused(self) -> bool:
        """Whether what was read of a block that is none is not looked at again: calls do not begin inside it."""
        ...

    def read(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Pass a block that begins here, and return its calls; None: it is none."""
        ...


def call_of(name: object, arguments: object, tools: KnownTools) -> Call | None:
    """Make a call of a name and of arguments, a `RawValue` of an object or of its text; None: it is no call."""
    if not isinstance(name, str) or name not in tools.names:
        return None
    if isinstance(arguments, RawValue) and isinstance(arguments.value, str):
        arguments = read_value(arguments.value)  # the text of an object
    if arguments is None or (isinstance(arguments, RawValue) and arguments.value is None):
        return Call(name, "{}")
    return Call(name, arguments.text) if isinstance(arguments, RawValue) and type(arguments.value) is dict else None


class RawValue(NamedTuple):
    """A value of JSON, and how it was written."""

    value: Any
    text: str


def read_value(text: str) -> RawValue | None:
    """Read JSON; None: it is none."""
    try:
        return RawValue(_DECODER.decode(text), text.strip())
    except (ValueError, RecursionError):
        return None


def read_members(text: str) -> dict[str, RawValue] | None:
    """Read the members of a JSON object, each value with its own text; None: it is no object of JSON."""
    if read_value(text) is None or not text.startswith("{"):
        return None
    found: dict[str, RawValue] = {}
    at = _past_blanks(text, 1)
    while text[at] == '"':
        key, at = _DECODER.raw_decode(text, at)
        start = _past_blanks(text, _past_blanks(text, at) + 1)  # behind the colon
        value, at = _DECODER.raw_decode(text, start)
        found[key] = RawValue(value, text[start:at])
        at = _past_blanks(text, at)
        if text[at] == ",":
            at = _past_blanks(text, at + 1)
    return found


def read_items(text: str) -> list[str] | None:
    """Read the items of a JSON array, each as its text; None: it is no array of JSON."""
    if read_value(text) is None or not text.startswith("["):
        return None
    found: list[str] = []
    at = _past_blanks(text, 1)
    while text[at] != "]":
        start = at
        _, at = _DECODER.raw_decode(text, start)
        found.append(text[start:at])
        at = _past_blanks(text, at)
        if text[at] == ",":
            at = _past_blanks(text, at + 1)
    return found


def _past_blanks(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def _no_number(word: str) -> Any:
    raise ValueError(word)  # NaN and Infinity, which are no JSON


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def of_json(text: str | None, tools: KnownTools) -> Call | None:
    """Make a call of `{"name": ..., "arguments" or "parameters": ...}`, which may say more; None: it is no call."""
    members = None if text is None else read_members(text)
    if members is None or "name" not in members:
        return None
    arguments = next((members[key] for key in ("arguments", "parameters") if key in members), None)
    return call_of(members["name"].value, arguments, tools)


NO_TOOLS = KnownTools(frozenset())


def as_json(name: str, arguments: Mapping[str, Any], tools: KnownTools) -> Call | None:
    """Make a call of arguments as values; None: there is no such function, or no JSON for a value.

    Letters stay as they are, unless half of a surrogate pair is among them, which a file can only hold escaped.
    """
    if name not in tools.names:
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        is_text = text.isascii() or text == text.encode(errors="replace").decode()
        return Call(name, text if is_text else json.dumps(arguments))
    except (ValueError, RecursionError):  # a number past the floats, or as deep as could just be read
        return None
