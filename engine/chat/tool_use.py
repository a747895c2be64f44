"""Which tools a request has, and which of them its answer may, must or must not call: read and checked. No templates.

What is a fault is refused here, before anything is rendered or runs: tools without a name or with the same one,
parameters that are no schema, a choice of what there is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...models.text.chat_messages import Tool, read_tools
from .call_syntax import NO_TOOLS, KnownTools

type ToolChoice = Literal["auto", "none", "required"] | Mapping[str, Any]
"""As OpenAI has it; a mapping is `{"type": "function", "function": {"name": ...}}`."""

_WORDS = ("auto", "none", "required")
_TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "contains", "propertyNames")


@dataclass(frozen=True)
class Function:
    """A function that may be called."""

    name: str
    parameters: Mapping[str, Any]  # the JSON schema of its arguments, an object


@dataclass(frozen=True)
class ToolUse:
    """The functions of a request, and what becomes of them."""

    functions: tuple[Function, ...] = ()
    calls: Literal["auto", "none", "required"] = "auto"
    named: str | None = None  # the one that must be called, where `calls` is "required"
    is_parallel: bool = True  # whether there may be several calls

    @property
    def is_forced(self) -> bool:
        """Whether the answer has to be calls."""
        return self.calls == "required"

    @property
    def callable(self) -> tuple[Function, ...]:
        """The functions that may be called."""
        if self.calls == "none":
            return ()
        return tuple(function for function in self.functions if self.named in (None, function.name))

    @property
    def most_calls(self) -> int | None:
        """How many calls there may be; None: any number."""
        if self.calls == "none":
            return 0
        return None if self.is_parallel and self.named is None else 1

    @property
    def known(self) -> KnownTools:
        """What a reader of calls has to know."""
        functions = self.callable
        if not functions:
            return NO_TOOLS
        types = {
            function.name: {
                name: types_of(schema) for name, schema in function.parameters.get("properties", {}).items()
            }
            for function in functions
        }
        return KnownTools(frozenset(types), types)


def read_tool_use(
    tools: Sequence[Tool] | None, tool_choice: ToolChoice | None = None, parallel_tool_calls: bool | None = None
) -> ToolUse:
    """Read what a request says of tools; None is as where nothing is said.

    Raises:
        ValueError: what is wrong, where, and what to do.
    """
    functions = tuple(_function(index, tool) for index, tool in enumerate(read_tools(tools) or ()))
    numbers: dict[str, int] = {}
    for index, function in enumerate(functions):
        first = numbers.setdefault(function.name, index)
        if first != index:
            raise ValueError(f"Tools {first} and {index} are both called {function.name!r}: give each its own name.")
    if parallel_tool_calls not in (None, True, False):
        raise ValueError(f"parallel_tool_calls={parallel_tool_calls!r} is not usable: it must be True or False.")
    calls, named = _choice(tool_choice, tuple(numbers))
    return ToolUse(functions, calls, named, parallel_tool_calls is not False)


def _choice(given: object, names: tuple[str, ...]) -> tuple[Literal["auto", "none", "required"], str | None]:
    if given is None or given == "auto":
        return "auto", None
    if given == "none":
        return "none", None
    match given:
        case "required":
            named = None
        case {"type": "function", "function": {"name": str(named), **more}, **rest} if not rest and not more:
            pass
        case _:
            raise ValueError(
                f"tool_choice={given!r} is not usable: it must be {', '.join(map(repr, _WORDS))} or "
                '{"type": "function", "function": {"name": the function}}.'
            )
    if not names:
        raise ValueError(f"tool_choice={given!r} needs tools to choose from, and there are none: give tools.")
    if named is not None and named not in names:
        raise ValueError(
            f"tool_choice names the function {named!r}, which is not among the tools: name one of "
            f"{', '.join(map(repr, names))}."
        )
    return "required", named


def _function(index: int, tool: dict[str, Any]) -> Function:
    kind = tool.get("type", "function")
    if kind != "function" and "function" not in tool and "parameters" not in tool:
        raise ValueError(f"Tool {index} is of type {kind!r}: only functions are supported.")
    function = tool.get("function", tool)  # some templates take functions without the shell around them
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f'Tool {index} has no name: write {{"type": "function", "function": {{"name": a text, "parameters": the '
            "JSON schema of an object}}."
        )
    parameters = function.get("parameters")
    if parameters is None:
        return Function(name, {"type": "object", "properties": {}})
    fault = _fault(parameters, "parameters")
    if fault is None and parameters.get("type", "object") != "object":
        fault = f"its type is {parameters['type']!r}, not 'object'"
    if fault is not None:
        raise ValueError(f"Tool {index} ({name!r}) has 'parameters' that are no JSON schema of an object: {fault}.")
    return Function(name, parameters)


def _fault(schema: Any, where: str) -> str | None:
    """Say what makes this no JSON schema; None: nothing that is seen without a reader of schemas."""
    if isinstance(schema, bool) and where != "parameters":
        return None
    if not isinstance(schema, dict):
        return f"{where} is {schema!r}, not an object"
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _TYPES:
            return f"{where} has the type {kind!r}, which JSON does not have"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return f"{where} has 'required': {required!r}, not a list of names"
    inner: list[tuple[str, Any]] = [(key, schema[key]) for key in _SCHEMAS if key in schema and key != "items"]
    items = schema.get("items")
    inner += _numbered(items) if isinstance(items, list) else [("items", items)] if "items" in schema else []
    for key in _SCHEMAS_BY_NAME:
        if not isinstance(schema.get(key, {}), dict):
            return f"{where} has {key!r}: {schema[key]!r}, not an object"
        inner += [(f"{key}.{name}", held) for name, held in schema.get(key, {}).items()]
    for key in _LISTS_OF_SCHEMAS:
        if not isinstance(schema.get(key, []), list):
            return f"{where} has {key!r}: {schema[key]!r}, not a list"
        inner += [(f"{key}.{number}", held) for number, held in enumerate(schema.get(key, []))]
    return next((fault for key, held in inner if (fault := _fault(held, f"{where}.{key}")) is not None), None)


def _numbered(items: list[Any]) -> list[tuple[str, Any]]:
    """Name the schemas of an older form of "items", a list."""
    return [(f"items.{number}", held) for number, held in enumerate(items)]


def types_of(schema: Any) -> frozenset[str]:
    """Return the types of what fits a schema; empty: it does not say."""
    if not isinstance(schema, dict):
        return frozenset()
    if "type" in schema:
        kinds = schema["type"]
        return frozenset(kinds if isinstance(kinds, list) else [kinds])
    if isinstance(schema.get("enum"), list) and all(isinstance(value, str) for value in schema["enum"]):
        return frozenset({"string"})
    for key in ("anyOf", "oneOf"):
        if key in schema:
            found = [types_of(one) for one in schema[key]]
            return frozenset().union(*found) if all(found) else frozenset()
    return frozenset()
