"""Finds the form of a conversation that a template takes, so that none of what was said is lost on the way.

Templates differ: some take content as text, some in parts; some tool calls with empty content, some with none; some the
arguments of a call as an object, some as JSON text; few know the role "developer". What a template takes cannot be read
off its text, so a conversation with marks in the place of its texts is rendered, once for each shape that conversations
have, in one form after the other until every mark is in the result. Where there is no such form, the message that is
left out is named. Reasoning is not marked: templates leave that of earlier turns out on purpose.

The first form is vLLM 0.32's wherever that loses nothing.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from ..errors import ChatTemplateError
from .chat_messages import REASONING
from .chat_program import ChatProgram, RefusedByTemplate

# Shapes of conversations that are remembered for one template; a chat has one or two, a long agent's run a few more.
_SHAPES = 1024
# A key of a part that no template reads: it is written only by those that spell the list as Python or JSON does.
_LEAK = "qzxleakxzq"


@dataclass(frozen=True)
class Form:
    """What a conversation looks like to a template."""

    content: Literal["given", "text", "parts"] = "given"  # texts as they were given, all joined, or all as parts
    missing: Literal["", None] = ""  # content of a message that has only tool calls
    arguments: Literal["object", "text"] = "object"  # those of tool calls
    function: Literal["function", "tool"] = "function"  # the role of OpenAI's older "function"

    def apply(self, chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the conversation in this form."""
        return [self._message(message) for message in chat]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        out = {**message, "content": self._content(message)}
        if message["role"] == "function":
            out["role"] = self.function
        if self.arguments == "text" and "tool_calls" in message:
            out["tool_calls"] = [_with_arguments(call, _as_text) for call in message["tool_calls"]]
        return out

    def _content(self, message: dict[str, Any]) -> str | list[dict[str, Any]] | None:
        content: str | list[dict[str, Any]] | None = message.get("content")
        if content is None:
            return self.missing
        if self.content == "parts":
            return content if isinstance(content, list) else [{"type": "text", "text": content}]
        # Templates that take parts rarely take them from tools, so that vLLM always joins those.
        if isinstance(content, list) and (self.content == "text" or message["role"] in ("tool", "function")):
            return "\n".join(part["text"] for part in content)
        return content


def adapt_names(chat: Sequence[dict[str, Any]], names: frozenset[str]) -> list[dict[str, Any]]:
    """Give a message's reasoning every name under which the template may read it."""
    read = [name for name in REASONING if name in names]
    out = []
    for message in chat:
        reasoning = max((message[name] for name in REASONING if name in message), key=len, default=None)
        out.append(message if reasoning is None else {**message, **dict.fromkeys(read, reasoning)})
    return out


def adapt_developer(chat: Sequence[dict[str, Any]], names: frozenset[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """Make "developer" "system" where the template does not know it, and merge system messages at the front.

    Also returns, for each message, the index that it, or the first of those merged, had. As vLLM does, system messages
    are merged only where there is a message of the developer's: most templates take one, at the front.
    """
    origins = list(range(len(chat)))
    if "developer" in names or all(message["role"] != "developer" for message in chat):
        return list(chat), origins
    chat = [{**m, "role": "system"} if m["role"] == "developer" else m for m in chat]
    system = [index for index in origins if chat[index]["role"] == "system"]
    if system == [0]:
        return chat, origins
    texts = filter(None, (_text(chat[index]) for index in system))
    rest = [index for index in origins if index not in system]
    return [{"role": "system", "content": "\n\n".join(texts)}, *(chat[i] for i in rest)], [system[0], *rest]


class FormFinder:
    """Finds forms for one template and remembers them by the shape of the conversation."""

    def __init__(self, program: ChatProgram, label: str) -> None:
        """`label`: what the template is called in messages."""
        self._program, self._label = program, label
        self._found: dict[object, Form] = {}

    def find(self, chat: Sequence[dict[str, Any]], variables: dict[str, Any], origins: Sequence[int]) -> Form:
        """Return the first form in which nothing of the conversation is left out.

        Args:
            chat: as `read_messages` gives it.
            variables: of the template, besides the messages.
            origins: the number of each message in the conversation that was given.

        Raises:
            ChatTemplateError: none; names the first message that is left out.
        """
        if "content" not in self._program.names:
            # It was not written for what is said, so nothing is expected of it; one that writes whole messages, as
            # `m | tojson`, has no list to write.
            return _without_parts(chat)
        shape = _shape(chat, variables)
        form = self._found.get(shape)
        if form is None:
            form = self._search(chat, variables, origins)
            if len(self._found) >= _SHAPES:
                self._found.clear()
            self._found[shape] = form
        return form

    def _search(self, chat: Sequence[dict[str, Any]], variables: dict[str, Any], origins: Sequence[int]) -> Form:
        marked = [_marked(index, message) for index, message in enumerate(chat)]
        refusal: Form | None = None
        lost: int | None = None
        for form in _forms(chat):
            try:
                text = self._program.render(_with_leaks(form.apply(marked)), variables).casefold()
            except RefusedByTemplate:
                refusal = refusal or form
                continue
            except Exception:  # a template is a program: it can raise anything
                continue
            if _LEAK in text:
                continue
            left_out = [index for index, message in enumerate(chat) if not _shows(index, message, text)]
            if not left_out:
                return form
            lost = left_out[0] if lost is None else max(lost, left_out[0])
        if lost is not None and refusal is None:
            raise self._left_out(origins[lost], chat[lost])
        # The template says what is wrong when it is given the texts themselves.
        return refusal or _without_parts(chat)

    def _left_out(self, index: int, message: dict[str, Any]) -> ChatTemplateError:
        if "tool_calls" in message:
            return ChatTemplateError(
                f"{self._label} leaves out the tool calls of message {index}: it has no place for them. Write them "
                "into 'content', or remove them."
            )
        return ChatTemplateError(
            f"{self._label} leaves out message {index} (role {message['role']!r}): it has no place for it there. Give "
            "it another role, or remove it."
        )


def _without_parts(chat: Sequence[dict[str, Any]]) -> Form:
    return Form("text" if any(isinstance(message.get("content"), list) for message in chat) else "given")


def _forms(chat: Sequence[dict[str, Any]]) -> Iterator[Form]:
    """Yield the forms that differ for this conversation, the likeliest first."""
    has_parts = any(isinstance(message.get("content"), list) for message in chat)
    has_calls = any("tool_calls" in message for message in chat)
    has_missing = any(message.get("content") is None for message in chat)
    contents: tuple[Any, ...] = ("given", "text", "parts") if has_parts else ("given", "parts")
    missing: tuple[Any, ...] = ("", None) if has_missing else ("",)
    arguments: tuple[Any, ...] = ("object", "text") if has_calls else ("object",)
    functions: tuple[Any, ...] = ("function",)
    if any(message["role"] == "function" for message in chat):
        functions = ("function", "tool")
    return (Form(*choice) for choice in product(contents, missing, arguments, functions))


def _mark(*place: int) -> str:
    """A word for a place that stands whatever templates do to texts: trim them, change their case, escape them."""
    return "qzx" + "x".join(map(str, place)) + "xzq"


def _marked(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with marks for its texts; those that are empty are left, as templates ask for that."""
    out, content = dict(message), message.get("content")
    if isinstance(content, list):
        out["content"] = [
            {**part, "text": _mark(index, n)} if part["text"].strip() else part for n, part in enumerate(content)
        ]
    elif content and content.strip():
        out["content"] = _mark(index, 0)
    if "tool_calls" in message:
        calls = enumerate(message["tool_calls"])
        out["tool_calls"] = [_marked_call(call, _call_mark(index, n)) for n, call in calls]
    return out


def _call_mark(index: int, number: int) -> str:
    return _mark(index, number, 0)


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    call = _with_arguments(call, lambda arguments: {**arguments, mark: mark})
    if "function" in call:
        return {**call, "function": {**call["function"], "name": mark}}
    return {**call, "name": mark}


def _with_leaks(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the conversation with a key in each part that is in the result only where the list itself is written."""
    return [
        {**message, "content": [{**part, _LEAK: ""} for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in chat
    ]


def _shows(index: int, message: dict[str, Any], text: str) -> bool:
    """Whether what stands for the texts of a message is all there."""
    # Some models are tuned on calls without a word beside them, and their templates leave it out.
    if "tool_calls" in message:
        return all(_call_mark(index, n) in text for n in range(len(message["tool_calls"])))
    content = message.get("content") or ""
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return all(_mark(index, n) in text for n, said in enumerate(texts) if said.strip())


def _shape(chat: Sequence[dict[str, Any]], variables: dict[str, Any]) -> object:
    """What decides, with the template, which form is right: all but the texts."""
    others = {name: value for name, value in variables.items() if name not in ("tools", "documents")}
    return tuple(_message_shape(message) for message in chat), bool(variables.get("tools")), repr(others)


def _message_shape(message: dict[str, Any]) -> tuple[object, ...]:
    return message["role"], _outline({name: value for name, value in message.items() if name != "role"})


def _outline(value: Any) -> object:
    """What of a value a template may ask for without writing it: which fields there are, and which of them are empty.

    Arguments of calls are the user's, and a template writes them whatever they are.
    """
    if isinstance(value, dict):
        return tuple((name, None if name == "arguments" else _outline(held)) for name, held in value.items())
    if isinstance(value, list):
        return tuple(map(_outline, value))
    if isinstance(value, str):
        return not value.strip()
    return value if isinstance(value, bool) else type(value)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _as_text(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _with_arguments(call: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    holder = call.get("function", call)
    changed = {**holder, "arguments": change(holder["arguments"])}
    return {**call, "function": changed} if "function" in call else changed
