"""Values as models write them into calls that are no JSON: Python's literals, and those of Gemma's function calls.

`LiteralReader` reads from a text that comes in pieces. A value is text in quotes, a list, a dict whose keys may stand
without quotes, or a bare word: a number, `True` or `true`, `None` or `null`. What is none of these is refused.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from .text_cursor import Reading, TextCursor

_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_CODE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([\s\S]))")
_WORD_ENDS = frozenset(",:()[]{}")
# Levels of a value, as `chat_messages.py` has them.
_DEEPEST = 100


class WrongLiteralError(Exception):
    """What stands there is no value."""


def bare_value(word: str) -> Any:
    """Return the value of a word without quotes.

    Raises:
        WrongLiteralError: it is none.
    """
    if word in _WORDS:
        return _WORDS[word]
    try:
        return json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise WrongLiteralError from None


def _refuse(word: str) -> Any:
    raise WrongLiteralError


@dataclass(frozen=True)
class LiteralReader:
    """Reads values at a place in a text."""

    cursor: TextCursor
    quotes: tuple[str, ...]  # what a text stands between
    has_escapes: bool = True  # whether a backslash in a text means something

    def value(self, deepest: int = _DEEPEST) -> Reading[Any]:
        """Pass a value and return it.

        Raises:
            WrongLiteralError: there is none, or it does not end.
        """
        if deepest == 0:
            raise WrongLiteralError
        yield from self.cursor.blanks()
        if quote := (yield from self.cursor.accept(*self.quotes)):
            return (yield from self._text(quote))
        if (yield from self.cursor.accept("[")):
            return (yield from self._items("]", deepest - 1))
        if (yield from self.cursor.accept("(")):
            return (yield from self._items(")", deepest - 1))
        if (yield from self.cursor.accept("{")):
            return (yield from self.members("}", ":", deepest - 1))
        return bare_value((yield from self._word()))

    def members(self, end: str, between: str, deepest: int = _DEEPEST) -> Reading[dict[str, Any]]:
        """Pass names and values up to `end`, and return them; raises as `value` does."""
        found: dict[str, Any] = {}
        while True:
            yield from self.cursor.blanks()
            if (yield from self.cursor.accept(end)):
                return found
            quote = yield from self.cursor.accept(*self.quotes)
            key = (yield from self._text(quote)) if quote else (yield from self.cursor.name())
            yield from self.cursor.blanks()
            if (not key and not quote) or key in found or not (yield from self.cursor.accept(between)):
                raise WrongLiteralError
            found[key] = yield from self.value(deepest)
            yield from self._comma(end)

    def _items(self, end: str, deepest: int) -> Reading[list[Any]]:
        found: list[Any] = []
        while True:
            yield from self.cursor.blanks()
            if (yield from self.cursor.accept(end)):
                return found
            found.append((yield from self.value(deepest)))
            yield from self._comma(end)

    def _comma(self, end: str) -> Reading[None]:
        """Pass the comma between two items, or stand before the end."""
        yield from self.cursor.blanks()
        if not (yield from self.cursor.accept(",")) and (yield from self.cursor.peek()) != end:
            raise WrongLiteralError

    def _text(self, quote: str) -> Reading[str]:
        parts: list[str] = []
        while True:
            part = yield from self.cursor.until(quote)
            if part is None:
                raise WrongLiteralError
            parts.append(part)
            backslashes = len(part) - len(part.rstrip("\\"))
            if not self.has_escapes or backslashes % 2 == 0:
                break
            parts.append(quote)  # it was escaped
        text = "".join(parts)
        return _unescaped(text) if self.has_escapes and "\\" in text else text

    def _word(self) -> Reading[str]:
        word = ""
        while (letter := (yield from self.cursor.peek())) and letter not in _WORD_ENDS and not letter.isspace():
            word += letter
            self.cursor.at += 1
        return word


def _unescaped(text: str) -> str:
    plain = _CODE.sub(_character, text)
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs of surrogates are characters


def _character(found: re.Match[str]) -> str:
    if code := found[1] or found[2]:
        return chr(int(code, 16))
    return _ESCAPES.get(found[3], found[3] if found[3] in "\\\"'" else found[0])
