"""Calls whose arguments are JSON, in the forms of Hermes and Qwen, Llama 3, Mistral and DeepSeek V3.

Hermes 2 Pro, Qwen 2.5 and 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, a block for each call.
Llama 3.1 and 3.2: `{"name": ..., "parameters": {...}}`, with `<|python_tag|>` before it or without, several with
semicolons between them; of built-in tools `<|python_tag|>name.call(key="value")`.
Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and since its tokenizer of version 11
`[TOOL_CALLS]name[ARGS]{...}`, a block for each call; an id that the model writes counts for nothing.
DeepSeek V3 and R1: markers around the name, and the arguments in a fence of Markdown.

The forms are those that the models' own chat templates write.
"""

from .call_syntax import Call, KnownTools, as_json, call_of, of_json, read_items, read_value
from .literals import LiteralReader, WrongLiteralError
from .text_cursor import Reading, TextCursor


class HermesCalls:
    """`<tool_call>{...}</tool_call>`."""

    starts = ("<tool_call>",)
    markers = frozenset({"<tool_call>", "</tool_call>"})
    is_whole_answer = passes_refused = False

    def read(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Read one block; its end may be missing where the answer ends."""
        yield from cursor.accept(*self.starts)
        yield from cursor.blanks()
        if (yield from cursor.peek()) != "{":
            return None
        call = of_json((yield from cursor.brackets()), tools)
        yield from cursor.blanks()
        if call is None or not (yield from cursor.accept_or_end("</tool_call>")):
            return None
        return [call]


class Llama3Calls:
    """`{"name": ..., "parameters": {...}}`."""

    _tag = "<|python_tag|>"
    starts = (_tag, "{")
    markers = frozenset({_tag})
    is_whole_answer, passes_refused = False, True

    def read(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Read one call, with the semicolon before it where it is not the first."""
        if (yield from cursor.accept(self._tag)):
            yield from cursor.blanks()
            if (yield from cursor.peek()) != "{":
                return (yield from self._built_in(cursor, tools))
        if not (yield from _names_something(cursor)):
            return None
        call = of_json((yield from cursor.brackets()), tools)
        if call is None:
            return None
        behind = cursor.at
        yield from cursor.blanks()
        if not (yield from cursor.accept(";")):
            cursor.at = behind
        return [call]

    def _built_in(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Read `name.call(key="value", ...)`."""
        dotted = yield from cursor.name()
        if not dotted.endswith(".call") or not (yield from cursor.accept("(")):
            return None
        try:
            given = yield from LiteralReader(cursor, ('"', "'")).members(")", "=")
        except WrongLiteralError:
            return None
        call = as_json(dotted.removesuffix(".call"), given, tools)
        return None if call is None else [call]


def _names_something(cursor: TextCursor) -> Reading[bool]:
    """Whether an object that begins here begins as a call does. Code has braces too, and nobody is to wait for its
    last one."""
    start = cursor.at
    yield from cursor.accept("{")
    yield from cursor.blanks()
    known = yield from cursor.accept('"name"', '"type"', '"parameters"', '"arguments"', '"id"')
    cursor.at = start
    return bool(known)


class MistralCalls:
    """`[TOOL_CALLS]`."""

    starts = ("[TOOL_CALLS]",)
    markers = frozenset({"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"})
    is_whole_answer = passes_refused = False

    def read(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Read a list of calls, or one call."""
        yield from cursor.accept(*self.starts)
        yield from cursor.blanks()
        if (yield from cursor.peek()) == "[":
            calls = [of_json(item, tools) for item in read_items((yield from cursor.brackets()) or "") or ()]
            known = [call for call in calls if call is not None]
            return known if calls and len(known) == len(calls) else None
        name = yield from cursor.name()
        if (yield from cursor.accept("[CALL_ID]")):
            yield from cursor.name()
        yield from cursor.accept("[ARGS]")
        yield from cursor.blanks()
        if (yield from cursor.peek()) != "{":
            return None
        text = yield from cursor.brackets()
        call = call_of(name, read_value(text or ""), tools) if name else of_json(text, tools)
        return None if call is None else [call]


class DeepSeekV3Calls:
    """Calls between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`."""

    _begin, _end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
    _call, _called, _separator = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"  # noqa: RUF001
    starts = (_begin,)
    markers = frozenset({_begin, _end, _call, _called, _separator})
    is_whole_answer = passes_refused = False

    def read(self, cursor: TextCursor, tools: KnownTools) -> Reading[list[Call] | None]:
        """Read all calls of a block."""
        yield from cursor.accept(self._begin)
        calls: list[Call] = []
        while True:
            yield from cursor.blanks()
            if calls and (yield from cursor.accept_or_end(self._end)):
                return calls
            call = yield from self._one(cursor, tools)
            if call is None:
                return None
            calls.append(call)

    def _one(self, cursor: TextCursor, tools: KnownTools) -> Reading[Call | None]:
        for wanted in (self._call, "function", self._separator):
            if not (yield from cursor.accept(wanted)):
                return None
        name = yield from cursor.name()
        for wanted in ("\n", "```json", "\n"):
            if not (yield from cursor.accept(wanted)):
                return None
        if (yield from cursor.peek()) != "{":
            return None
        arguments = read_value((yield from cursor.brackets()) or "")
        yield from cursor.blanks()
        if arguments is None or not (yield from cursor.accept_or_end("```")):
            return None
        yield from cursor.blanks()
        is_closed = yield from cursor.accept_or_end(self._called)
        return call_of(name, arguments, tools) if is_closed else None
