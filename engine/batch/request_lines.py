"""The lines of a batch run's input: requests, in the shape of OpenAI's batch files or plain.

A line is an OpenAI batch line (`custom_id`, `method`, `url`, `body`) or a plain object whose fields are those of a
body (`prompt` or `messages`, with optional `custom_id`). A field that would change the result and is not implemented
is refused, never ignored; a null is a field that is not there (`plain_fields.py`). Pure functions of bytes and values:
no files, no engine, no JAX here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any, Literal, TypedDict, cast

from ..api.sampling_params import SamplingParams
from .line_fields import TOO_DEEP, Line, check_readable, kind_of, line_fields
from .plain_fields import plain_fields
from .structured_fields import structured_outputs

type Message = dict[str, Any]
type Tool = dict[str, Any]
Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Endpoint = "/v1/chat/completions"
COMPLETIONS: Endpoint = "/v1/completions"

_LONGEST_MESSAGE = 1000  # characters
_ENVELOPE = frozenset({"custom_id", "method", "url", "body"})
_NOT_OF_LINES = {
    "logprobs",
    "logprob_token_ids",
    "prompt_logprobs",
    "detokenize",
    "output_kind",
    "trace_decode_token_ids",
}
_SAMPLING = frozenset(field.name for field in fields(SamplingParams)) - _NOT_OF_LINES
# Whatever these hold, the completion is the same.
_WITHOUT_EFFECT = frozenset(
    {
        "model",
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "stream_options",
    }
)
# Fields of a message; in which form they reach the chat template, and what is refused, `models/text` says.
_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", "thinking")
_OF_RESPONSES = ("refusal", "annotations", "audio", "function_call")
# How a conversation becomes a prompt, as vLLM's server takes it.
_RENDERING = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
)
_OF_CHATS = frozenset({"tools", "tool_choice", "parallel_tool_calls", *_RENDERING})
_KNOWN = frozenset({"custom_id", "max_completion_tokens", "best_of", "response_format"}) | _SAMPLING | _WITHOUT_EFFECT
# Fields that are not implemented, each with the values that ask for nothing; null always asks for nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "logprobs": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}


class Rendering(TypedDict, total=False):
    """Arguments of `LLM.chat_prompt`."""

    add_generation_prompt: bool
    continue_final_message: bool
    chat_template: str
    chat_template_kwargs: dict[str, Any]
    reasoning_effort: Literal["low", "medium", "high"]


class BatchLineError(ValueError):
    """A line that cannot be run. `code` is for programs; the message, one sentence, begins with the line number."""

    def __init__(self, code: str, line: int, custom_id: str | None, message: str) -> None:
        super().__init__(f"line {line}: {_shortened(message)}")
        self.code = code
        self.line = line
        self.custom_id = custom_id if custom_id is not None else default_id(line)


def _shortened(message: str) -> str:
    """Cut the middle out of a message that shows a value of any length: each error is written to the output."""
    half = _LONGEST_MESSAGE // 2
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"


@dataclass(frozen=True)
class BatchRequest:
    """One line that can be run: a conversation (`messages`) or a `prompt`; the other of the two is None."""

    line: int  # its number in the input, from 1
    custom_id: str
    messages: list[Message] | None
    prompt: str | list[int] | None  # text or token ids
    model: str | None  # the name that the line gives, which the output line repeats
    sampling_params: SamplingParams
    tools: list[Tool] | None = None  # JSON schemas of the functions that the model may call in a conversation
    tool_choice: Any = None  # as the line has it; None: it says nothing
    parallel_tool_calls: Any = None
    # What the line says of the other arguments of `LLM.chat_prompt`.
    rendering: Rendering = field(default_factory=Rendering)


def parse_line(text: Line, line: int, defaults: SamplingParams) -> BatchRequest:
    """Read one line of a batch file.

    Args:
        text: the line, UTF-8; or its fields.
        line: its number, from 1.
        defaults: sampling parameters for what the line does not set. A line without a seed draws with `line_seed`, so
            that lines with the same prompt give different samples, and a line gives the same sample whenever it is run.

    Raises:
        BatchLineError: the line is not JSON, lacks a prompt, or asks for what is not implemented or out of range.
    """
    custom_id = None
    try:
        fields = line_fields(text)
        custom_id = _custom_id(fields)
        check_readable(fields)
        body, endpoint = _open_envelope(fields)
        body = plain_fields(body)
        _check_fields(body, endpoint)
        messages, prompt = (_messages(body), None) if endpoint == CHAT else (None, _prompt(body))
        tools = _tools(body) if endpoint == CHAT else None
        rendering = _rendering(body) if endpoint == CHAT else Rendering()
        params = _sampling_params(body, line, defaults)
    except json.JSONDecodeError as error:
        message = f"this is not JSON ({error.msg} at column {error.colno}): put one JSON object on each line."
        raise BatchLineError("invalid_json_line", line, custom_id, message) from None
    except ValueError as error:
        raise BatchLineError("invalid_request", line, custom_id, str(error)) from None
    except RecursionError:  # JSON is read to a greater depth than Python's own functions reach
        raise BatchLineError("invalid_request", line, custom_id, TOO_DEEP) from None
    name = custom_id or default_id(line)
    asked = (body.get("tool_choice"), body.get("parallel_tool_calls")) if endpoint == CHAT else (None, None)
    return BatchRequest(line, name, messages, prompt, body.get("model"), params, tools, *asked, rendering)


def default_id(line: int) -> str:
    """Return the name of a line without a custom_id."""
    return f"line-{line}"


def read_custom_id(text: Line, line: int) -> str:
    """Return the name under which this line's result will be written, whether it can be run or not."""
    # Most inputs in which no line has a name need no parsing here; \u could spell the field's name.
    if isinstance(text, bytes) and b"custom_id" not in text and b"\\u" not in text:
        return default_id(line)
    try:
        return _custom_id(line_fields(text)) or default_id(line)
    except ValueError:
        return default_id(line)


def line_seed(seed: int | None, line: int) -> int:
    """Return a seed, 0 to 2**32 - 1, for a line without one: 4 bytes of a hash of the run's seed and the line number.

    Their sum would not do: completion i of a line draws with the line's seed + i, which would be a later line's seed.
    """
    return int.from_bytes(blake2b(f"{seed or 0}:{line}".encode(), digest_size=4).digest())


def _custom_id(fields: dict[str, Any]) -> str | None:
    custom_id = fields.get("custom_id")
    if custom_id is None or (isinstance(custom_id, str) and custom_id):
        return custom_id
    raise ValueError(f"custom_id={custom_id!r} is not usable: it must be a text that is not empty.")


def _open_envelope(fields: dict[str, Any]) -> tuple[dict[str, Any], Endpoint]:
    """Return the fields of the request itself, and the endpoint that they are for."""
    if not fields.keys() & {"method", "url", "body"}:
        return fields, CHAT if "messages" in fields else COMPLETIONS
    strangers = sorted(fields.keys() - _ENVELOPE)
    if strangers:
        raise ValueError(f"{strangers[0]!r} is not a field of a batch line: move it into 'body', or remove it.")
    if fields.get("method", "POST") != "POST":
        raise ValueError(f"method={fields['method']!r} is not usable: it must be 'POST'.")
    url, body = fields.get("url"), fields.get("body")
    if url not in (CHAT, COMPLETIONS):
        raise ValueError(f"url={url!r} is not served: it must be {CHAT!r} or {COMPLETIONS!r}.")
    if not isinstance(body, dict):
        raise ValueError(f"'body' is {kind_of(body)}, not a JSON object: put the request's fields in it.")
    return body, CHAT if url == CHAT else COMPLETIONS


def _check_fields(body: dict[str, Any], endpoint: Endpoint) -> None:
    prompt = "messages" if endpoint == CHAT else "prompt"
    for name, value in body.items():
        if name == prompt or name in _KNOWN or value is None or (name in _OF_CHATS and endpoint == CHAT):
            continue
        if name not in _NEUTRAL:
            raise ValueError(f"{name!r} is not supported here: remove it; {prompt!r} and {_listing()} are.")
        if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL[name]):
            raise ValueError(f"{name}={value!r} is not supported yet, and would change the result: remove {name!r}.")
    if not isinstance(body.get("model"), str | None):
        raise ValueError(f"model={body['model']!r} is not usable: it must be a name.")


def _messages(body: dict[str, Any]) -> list[Message]:
    """Return the conversation. The engine checks roles and contents, which depend on the chat template."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('there are no messages: write "messages": [{"role": "user", "content": "Hello"}].')
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} is {kind_of(message)}, not an object with 'role' and 'content'.")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Message) -> Message:
    """Return the fields of a message that go to the chat template, without those that hold nothing.

    Answers copied from a response have such fields (`"annotations": []`), and some templates only ask whether a field
    is there.
    """
    held = {name: value for name, value in message.items() if name == "content" or value not in (None, [], {})}
    strangers = sorted(held.keys() - {*_MESSAGE, *_OF_RESPONSES})
    if strangers:
        raise ValueError(f"{strangers[0]!r} in message {index} is not supported: remove it; {', '.join(_MESSAGE)} are.")
    return held


_NAMES: Mapping[type, str] = {bool: "true or false", str: "a text", dict: "an object"}


def _rendering(body: dict[str, Any]) -> Rendering:
    kinds: dict[str, type] = {"chat_template": str, "chat_template_kwargs": dict, "reasoning_effort": str}
    given = {name: body[name] for name in _RENDERING if body.get(name) is not None}
    for name, value in given.items():
        kind = kinds.get(name, bool)
        if type(value) is not kind:
            raise ValueError(f"{name}={value!r} is not usable: it must be {_NAMES[kind]}.")
    return cast(Rendering, given)


def with_variables(rendering: Rendering, variables: Mapping[str, Any]) -> Rendering:
    """Add variables of the chat template that the line does not set; one that is null it does not set."""
    if not variables:
        return rendering
    own = rendering.get("chat_template_kwargs", {})
    set_by_line = {name: value for name, value in own.items() if value is not None}
    if "reasoning_effort" in rendering:  # the line's, by its other name
        variables = {name: value for name, value in variables.items() if name != "reasoning_effort"}
    return {**rendering, "chat_template_kwargs": {**variables, **set_by_line}}


def _tools(body: dict[str, Any]) -> list[Tool] | None:
    """Return the schemas for the chat template; the engine reports what is wrong with one of them."""
    tools = body.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("'tools' must be a list of objects, each the JSON schema of a function.")
    return tools or None


def _prompt(body: dict[str, Any]) -> str | list[int]:
    prompt = body.get("prompt")
    if prompt is None:
        raise ValueError("there is no prompt: give 'prompt' (a text) or 'messages' (a conversation).")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # OpenAI takes a list of prompts; a list of one is that one
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(part, str | list) for part in prompt):
        raise ValueError(f"'prompt' holds {len(prompt)} prompts: put each on a line of its own.")
    if prompt and isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise ValueError("'prompt' must be one text, or one list of token ids, that is not empty.")


def _sampling_params(body: dict[str, Any], line: int, defaults: SamplingParams) -> SamplingParams:
    given = {name: body[name] for name in _SAMPLING & body.keys() if body[name] is not None}
    limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    if len(limits) == 2 and limits[0] != limits[1]:
        raise ValueError("max_tokens and max_completion_tokens differ: give one of them.")
    if limits:
        given["max_tokens"] = limits[0]
    if "logit_bias" in given:
        given["logit_bias"] = _biases(given["logit_bias"])
    constrained = structured_outputs(given.pop("structured_outputs", None), body.get("response_format"))
    asks_for_text = constrained is None and body.get("response_format") is not None
    if constrained is not None or (asks_for_text and defaults.structured_outputs is not None):
        given["structured_outputs"] = constrained
    _check_best_of(body.get("best_of"), given.get("n", defaults.n))
    if not given:  # most lines of most inputs: nothing has to be checked again, which took half of a short line's time
        return defaults.with_seed(line_seed(defaults.seed, line))
    if given.get("seed", -1) == -1:
        given["seed"] = line_seed(defaults.seed, line)
    return replace(defaults, **given)


def _check_best_of(best_of: object, n: object) -> None:
    """Refuse a `best_of` other than `n`, the number of completions that are generated anyway."""
    if best_of is None or (type(best_of) is int and best_of == n):
        return
    if type(best_of) is int and type(n) is int and best_of < n:
        raise ValueError(f"best_of={best_of} is not usable: it must be at least n={n}.")
    raise ValueError(f"best_of={best_of!r} is not supported yet, and would change the result: remove 'best_of'.")


def _biases(given: object) -> object:
    """Turn the keys, which JSON has as texts, into token ids; `SamplingParams` reports whatever else is wrong."""
    if not isinstance(given, dict):
        return given
    return {int(token) if token.isdecimal() else token: bias for token, bias in given.items()}


def _listing() -> str:
    return ", ".join(sorted(_SAMPLING))
