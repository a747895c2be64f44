"""A chat template as a program: compiled in a sandbox, with what it reads known before it runs.

Templates are Jinja programs from untrusted files, so they run in jinja2's immutable sandbox, are given plain data only,
and get the few extras that transformers gives them (`raise_exception`, `strftime_now`, `tojson`, `{% generation %}`,
loop controls, trimmed blocks). What a template reads is found in its syntax tree: a name that is spelled there may be
read in one branch only. Messages are not looked at here.
"""

import datetime
import json
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import CallBlock, Const, Filter, Getattr, Name, Node, Test
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


class RefusedByTemplate(jinja2.TemplateError):
    """What a template says with `raise_exception`."""


class ChatProgram:
    """A compiled template.

    Attributes:
        names: what it may read of messages and tools: attributes and the strings that it spells, such as "content".
        variables: what it may read that is not one of the extras, such as "messages"; also what it sets in one branch
            and reads behind it.
        settable: those of them that it does not set itself, or asks for before it does, such as "enable_thinking".
    """

    def __init__(self, text: str) -> None:
        """Compile `text`.

        Raises:
            jinja2.TemplateError: it is not Jinja.
        """
        environment = _environment()
        tree = environment.parse(text)
        self.names = frozenset(_names(tree))
        self.variables = frozenset(find_undeclared_variables(tree)) - environment.globals.keys()
        self.settable = self.variables & _settable(tree)
        self._template = environment.from_string(tree)

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """Run it. A template is a program: it can raise anything."""
        return self._template.render(messages=messages, **variables)


class _Generation(Extension):
    """Parses `{% generation %}`, which marks the assistant's text for training; it does not change the text."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Macro) -> str:
        return caller()


def _names(tree: Node) -> set[str]:
    attributes = {node.attr for node in tree.find_all(Getattr)}
    return attributes | {node.value for node in tree.find_all(Const) if isinstance(node.value, str)}


def _settable(tree: Node) -> set[str]:
    names = list(tree.find_all(Name))
    asked = [*tree.find_all(Test), *(each for each in tree.find_all(Filter) if each.name in ("default", "d"))]
    asked_for = {each.node.name for each in asked if isinstance(each.node, Name)}
    return {name.name for name in names} - {name.name for name in names if name.ctx == "store"} | asked_for


def _raise_exception(message: str) -> NoReturn:
    raise RefusedByTemplate(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own tojson escapes for HTML, which would put \u003c into prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment
