"""Grammars of answers that have to be calls of tools: a template's own wrapping around the functions' arguments.

What stands around name and arguments is taken from what the model's template writes for one call and for two
(`WrittenCall`), so that a model is held to the very text it was tuned on. Arguments keep to their schema: JSON as a
whole where the form has JSON, else each for itself. Notation: Lark's, with llguidance's `%json`, `<[id]>` for special
tokens and `suffix`. Reasoning before the calls stays free. What a form cannot be held to is refused by name.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from .tool_use import Function, ToolUse, types_of
from .written_calls import ID, Kind, WrittenCall

_SCALARS = frozenset({"integer", "number", "boolean", "null"})
_NOTES = frozenset({"type", "title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions"})
_OF_OBJECTS = _NOTES | {"properties", "required", "additionalProperties"}
_OF_ARRAYS = _NOTES | {"items"}
# Which a text without quotes is not held to.
_OF_TEXTS = ("minLength", "maxLength", "pattern", "format", "enum", "const", "not", "allOf")
_REFERENCES = ("$defs", "definitions")


class CallGrammar:
    """Writes the grammar of answers to one request."""

    def __init__(self, written: WrittenCall, special: Callable[[str], int | None], markers: frozenset[str]) -> None:
        """`special` gives the id of a text that is a special token; `markers` are texts that may be some."""
        self._written, self._special = written, special
        found = sorted((text for text in markers if special(text) is not None), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, [ID, *found])))
        self._rules: dict[str, str] = {}

    def lark(self, use: ToolUse, *, thinks: tuple[str, str] | None, may_begin_with_lines: bool) -> str:
        """Return the grammar of an answer that calls tools.

        Args:
            use: what has to be called.
            thinks: the tags around reasoning that the answer may begin with; None: it does not.
            may_begin_with_lines: whether line ends may come first.

        Raises:
            ValueError: a function's parameters that this form cannot be held to.
        """
        self._rules = {}
        written = self._written
        one = " | ".join(self._call(number, function) for number, function in enumerate(use.callable))
        several = "" if use.most_calls == 1 or written.between is None else f" ({self.text(written.between)} call)*"
        lines = "/\\n{0,2}/ " if may_begin_with_lines or thinks else ""
        start = f"{lines}{self.text(written.before)} call{several} {self.text(written.after)}"
        self._rules["call"] = one
        rules = [f"start: {'thought? ' if thinks else ''}{start}"]
        if thinks:
            rules += [f"thought: {self.text(thinks[0])} thinking", *self._up_to("thinking", thinks[1])]
        return "\n".join([*rules, *(f"{name}: {rule}" for name, rule in self._rules.items())])

    def text(self, text: str) -> str:
        """Return the text as a grammar has it, special tokens by their numbers, an id as any."""
        parts: list[str] = []
        at = 0
        for found in self._split.finditer(text):
            what = "/[a-zA-Z0-9]{9}/" if found[0] == ID else f"<[{self._special(found[0])}]>"
            parts += [_literal(text[at : found.start()]), what]
            at = found.end()
        return " ".join([*parts, _literal(text[at:])])

    def _up_to(self, name: str, end: str) -> list[str]:
        """Write the rule of any text up to `end` and with it."""
        number = self._special(end)
        if number is not None:
            return [rf"{name}: /(?s:.*)/ <[{number}]>"]
        return [rf"{name}[suffix={_literal(end)}]: /(?s:.*)/"]

    def _call(self, number: int, function: Function) -> str:
        kinds: dict[Kind, Callable[[int, Function], str]] = {
            "json": self._json, "tags": self._tags, "gemma": self._gemma, "python": self._python,
        }  # fmt: skip
        if self._written.kind != "json":
            _check_whole(function)
        arguments = kinds[self._written.kind](number, function)
        name = json.dumps(function.name)[1:-1] if self._written.kind == "json" else function.name
        return f"{_literal(name)} {self.text(self._written.middle)} {arguments}"

    def _json(self, number: int, function: Function) -> str:
        return self._rule(f"arguments_{number}", self.of_schema({"type": "object", **function.parameters}))

    def of_schema(self, schema: Mapping[str, Any]) -> str:
        """Write JSON of a schema, with the blanks that the template writes."""
        options: dict[str, Any] = {"lenient": False, "coerce_one_of": False}
        if self._written.separators is None:
            options["whitespace_pattern"] = r"[\x20\x0A\x0D\x09]{1,40}"
        else:
            item, key = self._written.separators
            options |= {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
        return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"

    def _tags(self, number: int, function: Function) -> str:
        """Write `<parameter=key>` for each argument, in the schema's order."""
        parts = []
        for index, (key, schema, is_required) in enumerate(_properties(function)):
            head = _literal(f"<parameter={key}>\n")
            name = f"value_{number}_{index}"
            end = "\n</parameter>\n"
            if choices := _choices(schema):
                held = f"({' | '.join(_literal(f'{choice}{end}') for choice in choices)})"
            elif _is_text(function, key, schema):
                held = f'{name} "\\n"'
                self._rules |= dict([self._up_to(name, "</parameter>")[0].split(": ", 1)])
            else:
                held = f"{self._rule(name, self.of_schema(_with_references(schema, function)))} {_literal(end)}"
            parts.append(f"({head} {held}){'' if is_required else '?'}")
        return " ".join(parts)

    def _python(self, number: int, function: Function) -> str:
        """Write `key=value`, values as JSON has them, which Python's reader here takes too."""
        listed = []
        for index, (key, schema, is_required) in enumerate(_properties(function)):
            value = self._rule(f"value_{number}_{index}", self.of_schema(_with_references(schema, function)))
            listed.append((f"{_literal(f'{key}=')} {value}", is_required))
        return self._listed(f"list_{number}", listed, ", ")

    def _gemma(self, number: int, function: Function) -> str:
        return self._members(f"members_{number}", function, function.parameters)

    def _members(self, name: str, function: Function, schema: Mapping[str, Any]) -> str:
        listed = []
        required = schema.get("required", ())
        for index, (key, held) in enumerate(schema.get("properties", {}).items()):
            value = self._gemma_value(f"{name}_{index}", function, key, held)
            listed.append((f"{_literal(f'{key}:')} {value}", key in required))
        return self._listed(name, listed, ",")

    def _gemma_value(self, name: str, function: Function, key: str, schema: Any) -> str:
        """Write a value as Gemma's calls have it, texts between quotes of their own."""
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        types, quote = types_of(schema), self.text(self._written.quote)
        if choices := _choices(schema):
            return f"({' | '.join(f'{quote} {_literal(choice)} {quote}' for choice in choices)})"
        if types and types <= _SCALARS:
            return self._rule(name, self.of_schema(schema))
        if _is_text(function, key, schema):
            self._rules |= dict([self._up_to(name, self._written.quote)[0].split(": ", 1)])
            return f'({quote} {name} | "null")' if "null" in types else f"{quote} {name}"
        if kind == "object" and schema.keys() <= _OF_OBJECTS and _undescribed(schema) is None:
            return f'"{{" {self._members(name, function, schema)} "}}"'
        if kind == "array" and schema.keys() <= _OF_ARRAYS and "items" in schema:
            item = self._gemma_value(f"{name}_item", function, key, schema["items"])
            return f'"[" ({item} ("," {item})*)? "]"'
        raise ValueError(
            f"tool_choice cannot hold an answer to the parameter {key!r} of {function.name!r} in this model's form of "
            "calls: give it one of the types string, integer, number, boolean, array with nothing but items or object "
            "with nothing but properties; or use tool_choice='auto'."
        )

    def _listed(self, name: str, items: list[tuple[str, bool]], comma: str) -> str:
        """Write items with commas between those that are there; of each, whether it must be."""
        for index in range(len(items), -1, -1):
            for state, before in (("first", ""), ("next", f"{_literal(comma)} ")):
                if index == len(items):
                    self._rules[f"{name}_{state}_{index}"] = '""'
                    continue
                item, is_required = items[index]
                rule = f"{before}{item} {name}_next_{index + 1}"
                self._rules[f"{name}_{state}_{index}"] = rule if is_required else f"{rule} | {name}_{state}_{index + 1}"
        return f"{name}_first_0"

    def _rule(self, name: str, rule: str) -> str:
        self._rules[name] = rule
        return name


def harmony_lark(use: ToolUse, special: Callable[[str], int | None]) -> str:
    """Return the grammar of an answer in the harmony format, behind the header that the prompt has begun, which calls
    one function, after reasoning or at once. A call ends the answer."""
    token = {name: f"<[{special(f'<|{name}|>')}]>" for name in ("channel", "message", "end", "start", "constrain")}
    thought = f'{token["channel"]} "analysis" {token["message"]} /(?s:.*)/ {token["end"]} {token["start"]} "assistant"'
    grammar = CallGrammar(WrittenCall("json", "", "", "", None, (", ", ": ")), special, frozenset())
    rules = [
        f'start: ({thought})* {token["channel"]} "commentary to=functions." call',
        f"call: {_harmony_calls(use, token)}",
    ]
    for number, function in enumerate(use.callable):
        rules.append(f"arguments_{number}: {grammar.of_schema({'type': 'object', **function.parameters})}")
    return "\n".join(rules)


def _harmony_calls(use: ToolUse, token: Mapping[str, str]) -> str:
    return " | ".join(
        f'{_literal(f"{function.name} ")} {token["constrain"]} "json" {token["message"]} arguments_{number}'
        for number, function in enumerate(use.callable)
    )


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _properties(function: Function) -> list[tuple[str, Any, bool]]:
    required = function.parameters.get("required", ())
    return [(key, schema, key in required) for key, schema in function.parameters.get("properties", {}).items()]


def _choices(schema: Any) -> list[str]:
    """Return the texts of which a value is one; none where it is not one of few texts."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else []) if isinstance(schema, Mapping) else []
    return list(values) if values and all(isinstance(value, str) for value in values) else []


def _check_whole(function: Function) -> None:
    """Refuse what arguments that are written one by one cannot be held to together."""
    stranger = next((keyword for keyword in function.parameters if keyword not in _OF_OBJECTS), None)
    if stranger is not None:
        raise ValueError(
            f"tool_choice cannot hold an answer to {stranger!r} of the parameters of {function.name!r} in this model's "
            "form of calls, which writes each for itself: remove it, and check what is called; or use "
            "tool_choice='auto'."
        )
    undescribed = _undescribed(function.parameters)
    if undescribed is not None:
        raise ValueError(
            f"tool_choice cannot hold an answer to the parameter {undescribed!r} of {function.name!r}, which is "
            "required and not among its properties: describe it there."
        )


def _undescribed(schema: Mapping[str, Any]) -> str | None:
    """Return what an object must have and its properties do not describe; None: they describe all of that."""
    described = schema.get("properties", {})
    return next((name for name in schema.get("required", ()) if name not in described), None)


def _is_text(function: Function, key: str, schema: Any) -> bool:
    """Whether a value is any text, or nothing.

    Raises:
        ValueError: it is a text that a form without quotes cannot be held to.
    """
    types = types_of(schema)
    if "string" not in types or not types <= {"string", "null"}:
        return False
    branches = [schema, *(branch for name in ("anyOf", "oneOf") for branch in schema.get(name, ()))]
    keyword = next((keyword for keyword in _OF_TEXTS for branch in branches if keyword in branch), None)
    if keyword is None:
        return True
    raise ValueError(
        f"tool_choice cannot hold an answer to {keyword!r} of the parameter {key!r} of {function.name!r} in this "
        "model's form of calls, where texts have no quotes: remove it, and check what is called; or use "
        "tool_choice='auto'."
    )


def _with_references(schema: Any, function: Function) -> Mapping[str, Any]:
    """Return a property's schema with the definitions that it may refer to."""
    if not isinstance(schema, Mapping):
        return {} if schema is True else {"not": {}}
    return {**{key: function.parameters[key] for key in _REFERENCES if key in function.parameters}, **schema}
