"""Writes conversations in OpenAI's harmony format, with the package openai-harmony: for models without a template.

What the format says and the package's objects leave open is decided here, as GPT-OSS's own template does: the first
messages of the system and the developer are the developer's instructions; reasoning is kept only before calls of tools
that no answer has followed. (openai-harmony 0.0.8 would drop that before the first answer alone.) Unlike the template a
message may call several tools, and may say something besides: that goes to the channel "commentary". Texts are texts
here: a marker that is written out in one is none.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

from ...models.errors import ChatTemplateError
from ...models.text.chat import ChatOptions, check_effort
from ...models.text.chat_messages import REASONING, Message, Tool, plain, read_messages, read_tools
from ...models.text.tokenizer import Tokenizer
from ..host.extras import need
from .harmony_vocabulary import load_encoding

_SYSTEM = ("system", "developer")
_TOOLS = ("tool", "function")
_VARIABLES = ("builtin_tools", "model_identity", "reasoning_effort")
_BUILTIN = ("browser", "python")
_FINAL = "<|start|>assistant<|channel|>final<|message|>"


class HarmonyPrompts:
    """Writes prompts for one model."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name

    @cached_property
    def _package(self) -> ModuleType:
        module: ModuleType = need("openai_harmony", "harmony", f"The harmony format of {self._name}")
        return module

    @cached_property
    def _encoding(self) -> Any:
        return load_encoding(self._tokenizer, self._name)

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] | None, options: ChatOptions) -> list[int]:
        """Turn a conversation into token ids; arguments and errors are those of `ChatTemplate.render`.

        Raises:
            ValueError: openai-harmony is not installed, or does not fit the model's tokenizer, too.
        """
        chat, schemas = read_messages(messages), read_tools(tools)
        opens = options.get("add_generation_prompt", True)
        is_left_open = options.get("continue_final_message", False)
        if opens and is_left_open:
            raise ChatTemplateError(
                "continue_final_message and add_generation_prompt exclude each other: the one leaves the last message "
                "open, the other begins a new one. Set add_generation_prompt to False."
            )
        left = _left_open(chat) if is_left_open else None
        if is_left_open:
            chat[-1] = {**chat[-1], "content": ""}
        writer = _Writer(self._package, _variables(options), schemas)
        try:
            written = writer.write(chat, is_open=is_left_open)
            return _ids(self._package, self._encoding, written, left, opens=opens)
        except ChatTemplateError:
            raise
        except Exception as error:  # of the package, which has one class for all, and pydantic's of several lines
            why = " ".join(str(error).split())
            raise ChatTemplateError(f"The harmony format of {self._name} failed: {why}.") from None


class _Writer:
    """Makes the package's messages of one conversation."""

    def __init__(self, package: ModuleType, variables: Mapping[str, Any], tools: list[dict[str, Any]] | None) -> None:
        self._package, self._variables, self._tools = package, variables, tools
        self._called: dict[str | None, str] = {}  # names of functions by a call's id; None: of the latest
        self._messages: list[Any] = []

    def write(self, chat: list[dict[str, Any]], *, is_open: bool) -> list[Any]:
        """Make the messages; the content of one that `is_open` is left to the caller.

        Raises:
            ChatTemplateError: a role, or an answer of a tool, that has no place.
        """
        first = next((n for n, message in enumerate(chat) if message["role"] not in _SYSTEM), len(chat))
        self._messages = [self._system()]
        instructions = "\n\n".join(filter(None, (_text(message) for message in chat[:first])))
        if instructions or self._tools:
            self._messages.append(self._developer(instructions))
        last_answer = max((n for n, message in enumerate(chat) if _is_answer(message)), default=-1)
        for index in range(first, len(chat)):
            self._add(index, chat[index], keeps_reasoning=index > last_answer)
        if is_open and self._messages[-1].channel == "final":
            self._messages.pop()
        return self._messages

    def _system(self) -> Any:
        content = self._package.SystemContent.new()
        content = content.with_conversation_start_date(datetime.datetime.now().strftime("%Y-%m-%d"))
        effort, identity = self._variables.get("reasoning_effort"), self._variables.get("model_identity")
        if effort is not None:
            content = content.with_reasoning_effort(self._package.ReasoningEffort(effort.capitalize()))
        if identity is not None:
            content = content.with_model_identity(identity)
        for name in _BUILTIN:
            if name in self._variables.get("builtin_tools", ()):
                content = content.with_browser_tool() if name == "browser" else content.with_python_tool()
        return self._package.Message.from_role_and_content(self._package.Role.SYSTEM, content)

    def _developer(self, instructions: str) -> Any:
        content = self._package.DeveloperContent.new()
        if instructions:
            content = content.with_instructions(instructions)
        if self._tools:
            content = content.with_function_tools([self._tool(n, tool) for n, tool in enumerate(self._tools)])
        return self._package.Message.from_role_and_content(self._package.Role.DEVELOPER, content)

    def _tool(self, index: int, tool: dict[str, Any]) -> Any:
        function = tool.get("function", tool)
        name, parameters = (function.get(key) if isinstance(function, dict) else None for key in ("name", "parameters"))
        if not isinstance(name, str) or not isinstance(parameters, dict | None):
            raise ChatTemplateError(f"Tool {index} needs a 'name' that is a string and 'parameters' that are a schema.")
        return self._package.ToolDescription.new(name, str(function.get("description") or ""), parameters or None)

    def _add(self, index: int, message: dict[str, Any], *, keeps_reasoning: bool) -> None:
        role, text = message["role"], _text(message)
        if role in _SYSTEM:
            self._say("developer", text)
        elif role == "user":
            self._say("user", text)
        elif role in _TOOLS:
            self._add_result(index, message, text)
        elif role == "assistant":
            reasoning = max((message[name] for name in REASONING if name in message), key=len, default="")
            if reasoning and keeps_reasoning:
                self._say("assistant", reasoning, "analysis")
            if text or not (reasoning or message.get("tool_calls")):
                self._say("assistant", text, "commentary" if message.get("tool_calls") else "final")
            for call in message.get("tool_calls", ()):
                self._add_call(index, call)
        else:
            raise ChatTemplateError(
                f"The harmony format leaves out message {index} (role {role!r}): it has no place for it. Give it "
                "another role, or remove it."
            )

    def _add_call(self, index: int, call: dict[str, Any]) -> None:
        function = call.get("function", call)
        self._called |= dict.fromkeys((_id(index, "id", call), None), function["name"])
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        message = self._say("assistant", arguments, "commentary")
        message.with_recipient(f"functions.{function['name']}").with_content_type("<|constrain|>json")

    def _add_result(self, index: int, message: dict[str, Any], text: str) -> None:
        called = self._called.get(_id(index, "tool_call_id", message)) or self._called.get(None)
        name = str(message.get("name") or "").removeprefix("functions.") or called
        if not name:
            raise ChatTemplateError(f"Message {index} is a tool's, and no message before it calls one: remove it.")
        author = self._package.Author.new(self._package.Role.TOOL, f"functions.{name}")
        made = self._package.Message.from_author_and_content(author, text)
        self._messages.append(made.with_channel("commentary").with_recipient("assistant"))

    def _say(self, role: str, text: str, channel: str | None = None) -> Any:
        message = self._package.Message.from_role_and_content(self._package.Role(role), text)
        self._messages.append(message if channel is None else message.with_channel(channel))
        return message


def _ids(package: ModuleType, encoding: Any, messages: list[Any], left: str | None, *, opens: bool) -> list[int]:
    conversation = package.Conversation.from_messages(messages)
    _check_text(conversation.to_json())
    config = {"config": package.RenderConversationConfig(auto_drop_analysis=False)}
    ids: list[int]
    if opens:
        ids = encoding.render_conversation_for_completion(conversation, package.Role.ASSISTANT, **config)
    else:
        ids = encoding.render_conversation(conversation, **config)
    if left is not None:
        ids += encoding.encode(_FINAL, allowed_special="all") + encoding.encode(left, disallowed_special=())
    return ids


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls") and bool(_text(message))


def _id(index: int, key: str, fields: Mapping[str, Any]) -> str | None:
    found = fields.get(key)
    if not isinstance(found, str | None):
        raise ChatTemplateError(f"Message {index} has {key}={found!r}: it must be a text, that of a tool call.")
    return found


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _left_open(chat: list[dict[str, Any]]) -> str:
    """Return the text of the last message, which is to be gone on with."""
    if not _is_answer(chat[-1]):
        raise ChatTemplateError("continue_final_message: the last message is no answer of the assistant's to continue.")
    return _text(chat[-1])


def _check_text(text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and the package cannot read."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ChatTemplateError("The conversation has a lone surrogate: it is not Unicode.") from None


def _variables(options: ChatOptions) -> dict[str, Any]:
    """Return what a caller sets besides, by the names of GPT-OSS's template."""
    given = options.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise ChatTemplateError(f"chat_template_kwargs is of type {type(given).__name__}, expected a dict.")
    known = {name: plain(value, "chat_template_kwargs") for name, value in given.items() if value is not None}
    stranger = next((name for name in known if name not in _VARIABLES), None)
    if stranger is not None:
        raise ChatTemplateError(
            f"The harmony format does not read {stranger!r} (in chat_template_kwargs): it reads "
            f"{', '.join(_VARIABLES)}."
        )
    effort = options.get("reasoning_effort") or known.get("reasoning_effort")
    if effort is not None:
        check_effort(effort, known)
        known["reasoning_effort"] = effort
    _check("model_identity", known, lambda value: isinstance(value, str), "a text")
    _check(
        "builtin_tools", known, lambda value: isinstance(value, list) and all(name in _BUILTIN for name in value),
        f"a list of {' and '.join(_BUILTIN)}",
    )  # fmt: skip
    return known


def _check(name: str, known: Mapping[str, Any], is_right: Callable[[Any], bool], what: str) -> None:
    if name in known and not is_right(known[name]):
        raise ChatTemplateError(f"{name}={known[name]!r} is not usable: it must be {what}.")
