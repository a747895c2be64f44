"""Calls whose arguments are no JSON: Qwen3-Coder's tags, Gemma's function calls, and Python's.

Qwen3-Coder and Qwen 3.5: `<tool_call><function=name><parameter=key>\\nvalue\\n</parameter></function></tool_call>`.
FunctionGemma: `<start_function_call>call:name{key:<escape>text<escape>,other:1}<end_function_call>`; Gemma 4 with other
markers.
Gemma 3 and others that are asked for Python: `[name(key="value"), ...]`, or calls in a fence of Markdown that is
called `tool_code`, one on each line, within `print()` or without.

What has no quotes of its own becomes JSON by the function's schema: where that says "string" it is a text, else
whatever it spells.
"""

from dataclasses import dataclass
from typing import Any

from .call_syntax import Call, KnownTools, as_json
from .literals import LiteralReader, WrongLiteralError, bare_value
from .text_cursor import Reading, TextCursor


class QwenCoderCalls:
    """`<tool_call><function=...>`."""

    starts = ("<tool_call>", "<function=")  # it forgets the first sometimes
    markers = frozenset({"<tool_call>", "</tool_call>"})
    is_whole_answer = passes_refused = False

    def read(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Read one block; the end of `tool_call` may be missing where the answer ends."""
        is_wrapped = yield from cursor.accept("<tool_call>")
        yield from cursor.blanks()
        if not (yield from cursor.accept("<function=")):
            return None
        name = yield from cursor.until(">")
        if name not in tools.names:
            return None
        arguments = yield from self._arguments(cursor, name, tools)
        if arguments is None:
            return None
        if is_wrapped:
            yield from cursor.blanks()
            if not (yield from cursor.accept_or_end("</tool_call>")):
                return None
        call = as_json(name, arguments, tools)
        return None if call is None else [call]

    def _arguments(self, cursor: TextCursor, name: str, tools: KnownTools) -> Reading[dict[str, Any] | None]:
        found: dict[str, Any] = {}
        while True:
            yield from cursor.blanks()
            if (yield from cursor.accept("</function>")):
                return found
            if not (yield from cursor.accept("<parameter=")):
                return None
            key = yield from cursor.until(">")
            text = None if key is None else (yield from self._value(cursor, tools.types_of(name, key)))
            if key is None or text is None:
                return None
            found[key] = value_of(text.removeprefix("\n").removesuffix("\n"), name, key, tools)

    def _value(self, cursor: TextCursor, types: frozenset[str]) -> Reading[str | None]:
        """Pass a value and its end, and return it; a list or an object may have the end in one of its texts."""
        start = cursor.at
        yield from cursor.accept("\n")
        if types and types <= {"array", "object", "null"} and (yield from cursor.peek()) in ("[", "{"):
            text = yield from cursor.brackets()
            yield from cursor.accept("\n")
            if text is not None and (yield from cursor.accept("</parameter>")):
                return text
        cursor.at = start
        return (yield from cursor.until("</parameter>"))


def value_of(text: str, function: str, argument: str, tools: KnownTools) -> Any:
    """Return what an argument without quotes stands for."""
    types = tools.types_of(function, argument)
    if "string" in types and types <= {"string", "null"}:
        return None if "null" in types and text.strip() in ("null", "None") else text
    try:
        return bare_value(text.strip())
    except WrongLiteralError:
        return text


@dataclass(frozen=True)
class GemmaCalls:
    """`call:name{...}` between two markers, with texts between quotes of its own."""

    begin: str
    end: str
    quote: str
    is_whole_answer = passes_refused = False

    @property
    def starts(self) -> tuple[str, ...]:
        """The marker before a call."""
        return (self.begin,)

    @property
    def markers(self) -> frozenset[str]:
        """Its markers, and its quote."""
        return frozenset({self.begin, self.end, self.quote})

    def read(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Read one call; its end may be missing where the answer ends."""
        yield from cursor.accept(self.begin)
        yield from cursor.blanks()
        if not (yield from cursor.accept("call:")):
            return None
        name = yield from cursor.name()
        if not (yield from cursor.accept("{")):
            return None
        try:
            given = yield from LiteralReader(cursor, (self.quote,), has_escapes=False).members("}", ":")
        except WrongLiteralError:
            return None
        if not (yield from cursor.accept_or_end(self.end)):
            return None
        call = as_json(name, given, tools)
        return None if call is None else [call]


FUNCTION_GEMMA = GemmaCalls("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA4 = GemmaCalls("<|tool_call>", "<tool_call|>", '<|"|>')


class PythonCalls:
    """`[name(key="value")]`, or a fence of `tool_code`."""

    starts = ("[", "```tool_code")
    markers = frozenset[str]()
    passes_refused = False
    is_whole_answer = True  # what is in the middle of a text is an example, or a list

    def read(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Read all calls of a list, or of a fence."""
        is_list = (yield from cursor.accept(*self.starts)) == "["
        calls: list[Call] = []
        while True:
            yield from cursor.blanks()
            if calls and (yield from (cursor.accept("]") if is_list else cursor.accept_or_end("```"))):
                return calls
            call = yield from self._one(cursor, tools)
            if call is None:
                return None
            calls.append(call)
            yield from cursor.blanks()
            if is_list and not (yield from cursor.accept(",")) and (yield from cursor.peek()) != "]":
                return None

    def _one(self, cursor: TextCursor, tools: KnownTools) -> Reading[Call | None]:
        is_printed = bool((yield from cursor.accept("print(")))
        name = yield from cursor.name()
        if not name or not (yield from cursor.accept("(")):
            return None
        try:
            given = yield from LiteralReader(cursor, ('"""', "'''", '"', "'")).members(")", "=")
        except WrongLiteralError:
            return None
        yield from cursor.blanks()
        if is_printed and not (yield from cursor.accept(")")):
            return None
        return as_json(name, given, tools)
