"""Chat templates: convert messages and tools to the text a model was tuned on, and that text to token ids.

Templates are Jinja programs from untrusted files, so they run in jinja2's immutable sandbox, are given plain data only,
and get the few extras that transformers gives them (`raise_exception`, `strftime_now`, `tojson`, `{% generation %}`,
loop controls, trimmed blocks). The template decides what a message needs besides its role: all its keys are passed on.
Text only: no images. `chat_files.py` and the checkpoints read templates.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ChatTemplateError
from .tokenizer import Tokenizer

type Message = Mapping[str, Any]
"""A dict with "role" (a string) and usually "content": a string, or a list of {"type": "text", "text": ...}."""
type Tool = Mapping[str, Any]
"""A JSON schema as transformers and OpenAI define it: {"type": "function", "function": {"name": ..., ...}}."""
type Source = str | Mapping[str, str] | Sequence[Mapping[str, str]] | None
"""One template, or several by name, as a dict or as [{"name": ..., "template": ...}]; None: the model has none."""


class _Generation(Extension):
    """Parses `{% generation %}`, which marks the assistant's text for training; it does not change the text."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Macro) -> str:
        return caller()


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


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


class ChatTemplate:
    """The chat templates of one model.

    Args:
        source: the templates' Jinja texts.
        tokenizer: the model's.
        name: the model's, for messages.

    Raises:
        ChatTemplateError: `source` has another form.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, *, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self.templates = _by_name(source, name)  # Jinja texts by name, usually "default" only
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """Render the conversation as text, with special tokens written out.

        Among several templates "tool_use" is chosen if there are tools, else "default", as in transformers.

        Args:
            messages: dicts with the string "role" and what the template reads: "content", "tool_calls" and the like.
            tools: JSON schemas of the functions that the model may call; None: no tools.
            add_generation_prompt: whether to open the assistant's turn at the end.

        Raises:
            ChatTemplateError: no template, messages or tools of another form, or a template that fails.
        """
        check_messages(messages)
        check_tools(tools)
        chat = [_plain(message, f"Message {i}") for i, message in enumerate(messages)]
        schemas = None if tools is None else [_plain(tool, f"Tool {i}") for i, tool in enumerate(tools)]
        # As in transformers, a key with the value None counts as absent.
        chat = [{key: value for key, value in message.items() if value is not None} for message in chat]
        try:
            text = self._template(has_tools=tools is not None).render(
                messages=chat,
                tools=schemas,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names(),
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program: it can raise anything
            raise ChatTemplateError(f"The chat template of {self._name} failed: {_one_line(error)}") from None
        self._check_parts(chat, text)
        return text

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        at_most: int | None = None,
    ) -> list[int]:
        """Render the conversation and convert it to token ids, with BOS only where the template writes it.

        Arguments and errors are those of `render`; `at_most` is as for `Tokenizer.encode`, whose errors it raises too.
        """
        text = self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return self._tokenizer.encode(text, add_special=False, at_most=at_most)

    def _names(self) -> dict[str, str]:
        """Return the special tokens that the model has, by the names that templates use, as transformers does."""
        special = self._tokenizer.special
        return {**special.others, **special.standard}

    def _template(self, has_tools: bool) -> jinja2.Template:
        if not self.templates:
            raise ChatTemplateError(f"{self._name} has no chat template: give it the prompt as plain text.")
        chosen = "tool_use" if has_tools and "tool_use" in self.templates else "default"
        if chosen not in self.templates:
            names = ", ".join(map(repr, self.templates))
            raise ChatTemplateError(f"{self._name} has no chat template 'default', only {names}.")
        if chosen not in self._compiled:
            self._compiled[chosen] = _environment().from_string(self.templates[chosen])
        return self._compiled[chosen]

    def _check_parts(self, chat: Sequence[dict[str, Any]], text: str) -> None:
        """Refuse content in parts if the template takes strings only.

        Such a template writes the list as Python spells it, which no model was tuned on.
        """
        for index, message in enumerate(chat):
            if isinstance(message.get("content"), list) and str(message["content"]) in text:
                raise ChatTemplateError(
                    f"The chat template of {self._name} takes content as a string only: join the parts of message "
                    f"{index}."
                )


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse malformed conversations: each message needs a role, and content or tool calls.

    Raises:
        ChatTemplateError: names the message and what is wrong with it.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError("A chat needs a non-empty list of messages with 'role' and 'content'.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"Message {index} is of type {type(message).__name__}, expected a dict.")
        if not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"Message {index} needs a string under 'role'.")
        _check_calls(index, message.get("tool_calls"))
        content = message.get("content")
        if isinstance(content, list | tuple):
            _check_content_parts(index, content)
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ChatTemplateError(
                f"Message {index} needs a string under 'content', or a list of text parts; only a message with "
                "'tool_calls' may do without."
            )


def check_tools(tools: Sequence[Tool] | None) -> None:
    """Refuse tools that are not a list of JSON schemas.

    Raises:
        ChatTemplateError: names the tool and what is wrong with it.
    """
    if tools is None:
        return
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ChatTemplateError("tools must be a list of JSON schemas, a dict each.")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            what = "a Python function" if callable(tool) else f"of type {type(tool).__name__}"
            raise ChatTemplateError(f"Tool {index} is {what}: give the JSON schema of the function, a dict.")


def _check_calls(index: int, calls: Any) -> None:
    is_list = isinstance(calls, list | tuple)
    if calls is not None and not (is_list and all(isinstance(call, Mapping) for call in calls)):
        raise ChatTemplateError(f"Message {index} has 'tool_calls' that are not a list of dicts.")


def _check_content_parts(index: int, parts: Sequence[Any]) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is not None and kind != "text":
            raise ChatTemplateError(f"Message {index} has content of type {kind!r}: only text is supported.")
        if kind is None or not isinstance(part.get("text"), str):
            raise ChatTemplateError(
                f"Message {index} has a part under 'content' that is not {{'type': 'text', 'text': a string}}."
            )


def _by_name(source: Source, name: str) -> dict[str, str]:
    if source is None:
        return {}
    named: object = source
    if isinstance(source, str):
        named = {"default": source}
    elif isinstance(source, list | tuple) and all(isinstance(item, Mapping) for item in source):
        named = {item.get("name"): item.get("template") for item in source}
    if not isinstance(named, Mapping) or not all(isinstance(text, str) for item in named.items() for text in item):
        raise ChatTemplateError(f"The chat template of {name} is neither a text nor texts by name.")
    return dict(cast(Mapping[str, str], named))


def _plain(value: Any, where: str) -> Any:
    """Rebuild `value` from JSON's types, so that a template can call no other type's methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise ChatTemplateError(f"{where} holds a value of type {type(value).__name__}, which JSON does not have.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "." if str(error) else f"{type(error).__name__}."
