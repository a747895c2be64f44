"""Reads conversations in the shapes that OpenAI's API has, and gives them the one that chat templates are written for.

A message may be copied from a response, as a dict or as the object that OpenAI's client returns, or be written as a
request has it. What comes out is plain JSON: content is a string or a list of {"type": "text", "text": ...}, the
arguments of a tool call are an object, fields that hold nothing are gone. What has no such form (audio, a call of a
custom tool, arguments that are not JSON) is refused by name. The template is not looked at here; see `chat_forms.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ChatTemplateError

type Message = Mapping[str, Any]
"""A dict with "role" (a string) and usually "content": a string, or a list of {"type": "text", "text": ...}."""
type Tool = Mapping[str, Any]
"""A JSON schema as transformers and OpenAI define it: {"type": "function", "function": {"name": ..., ...}}."""

# What a message's reasoning is called: by OpenRouter and vLLM, by DeepSeek and Qwen, by GPT-OSS's template and Ollama.
REASONING = ("reasoning", "reasoning_content", "thinking")
# Types of a part whose text is under "text"; the last two are those of OpenAI's Responses API.
_TEXT = frozenset({"text", "input_text", "output_text"})
# Levels of what is given; JSON's writer, and Python's own copies, end at several times as many.
_DEEPEST = 100
# How a value of a subclass becomes one of the type itself: `str` of an enumeration's member is the member's name.
_SCALARS: Mapping[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}


def read_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the conversation as plain JSON in the shape that templates are written for.

    A message with tool calls may come back without "content"; every other one has it.

    Raises:
        ChatTemplateError: names the message and what is wrong with it.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError("A chat needs a non-empty list of messages with 'role' and 'content'.")
    return [_read_message(index, message) for index, message in enumerate(messages)]


def read_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Return the schemas as plain JSON; None where there is none.

    Raises:
        ChatTemplateError: names the tool and what is wrong with it.
    """
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ChatTemplateError("tools must be a list of JSON schemas, a dict each.")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            what = "a Python function" if callable(tool) else f"of type {type(tool).__name__}"
            raise ChatTemplateError(f"Tool {index} is {what}: give the JSON schema of the function, a dict.")
    return [plain(tool, f"Tool {index}") for index, tool in enumerate(tools)] or None


def plain(value: Any, where: str) -> Any:
    """Rebuild `value` from JSON's types, so that a template can call no other type's methods.

    Objects of pydantic, which OpenAI's client returns, become what they hold, and members of an enumeration of texts
    or numbers what they stand for.

    Raises:
        ChatTemplateError: it holds a value of another type, or is nested too deeply; `where` says what it is.
    """
    return _plain(value, where, _DEEPEST)


def _plain(value: Any, where: str, depth: int) -> Any:
    """Rebuild `value`, in which there may be `depth` levels."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth == 0:
        raise ChatTemplateError(f"{where} is nested too deeply: {_DEEPEST} levels are the most.")
    if isinstance(value, Mapping):
        return {_plain(key, where, depth - 1): _plain(item, where, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth - 1) for item in value]
    for kind, as_kind in _SCALARS.items():
        if isinstance(value, kind):
            return as_kind(value)
    dump = getattr(value, "model_dump", None)
    if callable(dump) and not isinstance(value, type):
        return _plain(dump(), where, depth - 1)
    raise ChatTemplateError(f"{where} holds a value of type {type(value).__name__}, which JSON does not have.")


def _read_message(index: int, given: Any) -> dict[str, Any]:
    read = plain(given, f"Message {index}")
    if not isinstance(read, dict):
        raise ChatTemplateError(f"Message {index} is of type {type(given).__name__}, expected a dict.")
    message = _without_nulls(read)
    if not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"Message {index} needs a string under 'role'.")
    if "audio" in message:
        raise ChatTemplateError(
            f"Message {index} has 'audio': only text is supported. Put its transcript under 'content'."
        )
    message.pop("annotations", None)  # places in the text, which says the same without them
    _read_calls(index, message)
    _check_reasoning(index, message)
    _read_refusal(index, message)
    _read_content(index, message)
    return message


def _read_calls(index: int, message: dict[str, Any]) -> None:
    """Make the arguments of the tool calls objects, and a call of OpenAI's older form, "function_call", one of them."""
    calls, older = message.pop("tool_calls", None), message.pop("function_call", None)
    is_list = isinstance(calls, list)
    if calls is not None and not (is_list and all(isinstance(call, dict) for call in calls)):
        raise ChatTemplateError(f"Message {index} has 'tool_calls' that are not a list of dicts.")
    if calls and older:
        raise ChatTemplateError(f"Message {index} has both 'tool_calls' and 'function_call': keep one of them.")
    if older:
        calls = [{"type": "function", "function": older}]
    if calls:
        message["tool_calls"] = [_read_call(f"Message {index}, tool call {n},", call) for n, call in enumerate(calls)]


def _read_call(where: str, given: dict[str, Any]) -> dict[str, Any]:
    call = _without_nulls(given)
    kind = call.get("type", "function")
    if kind != "function":
        raise ChatTemplateError(f"{where} is of type {kind!r}: only functions are supported.")
    function = call.get("function", call)  # some templates take calls without the shell around them
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ChatTemplateError(f"{where} needs {{'function': {{'name': a string, 'arguments': an object}}}}.")
    function = _without_nulls(function)
    function["arguments"] = _read_arguments(f"{where} of {function['name']!r},", function.get("arguments"))
    return {**call, "function": function} if "function" in call else function


def _read_arguments(where: str, arguments: Any) -> dict[str, Any]:
    """Return the object that a call's arguments are, or that their JSON text spells; an empty text is none."""
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ChatTemplateError(f"{where} has 'arguments' that are not JSON ({error}): correct them.") from None
        arguments = plain(arguments, f"{where} under 'arguments',")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, dict):
        raise ChatTemplateError(f'{where} has \'arguments\' that are not an object, such as {{"city": "Oslo"}}.')
    return arguments


def _check_reasoning(index: int, message: dict[str, Any]) -> None:
    given = {name: message[name] for name in REASONING if name in message}
    for name, text in given.items():
        if not isinstance(text, str) or message["role"] != "assistant":
            raise ChatTemplateError(f"{name!r} in message {index} must be a text, in a message of the assistant's.")
    different = {text: name for name, text in given.items() if text}
    if len(different) > 1:
        names = " and ".join(map(repr, different.values()))
        raise ChatTemplateError(f"Message {index} has different texts under {names}: keep one of them.")


def _read_refusal(index: int, message: dict[str, Any]) -> None:
    """Make a refusal what it is, the assistant's text: OpenAI puts it beside an empty content."""
    refusal = message.pop("refusal", None)
    if not refusal:
        return
    if not isinstance(refusal, str):
        raise ChatTemplateError(f"Message {index} has a 'refusal' that is not a string.")
    if message.get("content"):
        raise ChatTemplateError(f"Message {index} has both 'content' and 'refusal': keep one of them.")
    message["content"] = refusal


def _read_content(index: int, message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_read_part(index, part) for part in content] or ""
    elif content is None and "tool_calls" not in message:
        # A tool may have nothing to say; an answer may have been cut off while the model was thinking.
        if message["role"] not in ("tool", "function") and not any(message.get(name) for name in REASONING):
            raise ChatTemplateError(
                f"Message {index} needs a string under 'content', or a list of text parts; only a message with "
                "'tool_calls', 'refusal' or reasoning may do without."
            )
        message["content"] = ""
    elif content is not None and not isinstance(content, str):
        raise ChatTemplateError(f"Message {index} needs a string under 'content', or a list of text parts.")


def _read_part(index: int, given: Any) -> dict[str, Any]:
    part = _without_nulls(given) if isinstance(given, dict) else {}
    kind = part.pop("type", None)
    if kind is not None and kind not in _TEXT and kind != "refusal":
        raise ChatTemplateError(f"Message {index} has content of type {kind!r}: only text is supported.")
    text = part.pop("refusal" if kind == "refusal" else "text", None)
    if kind is None or not isinstance(text, str):
        raise ChatTemplateError(
            f"Message {index} has a part under 'content' that is not {{'type': 'text', 'text': a string}}."
        )
    return {"type": "text", "text": text, **part}


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
