"""The lines of a batch run's output: results and errors, in the shape of OpenAI's batch files.

Pure functions of values: no files, no engine, no JAX here.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from ..api.outputs import CompletionOutput, RequestOutput
from .request_lines import BatchLineError, BatchRequest

_ENCODER = json.JSONEncoder(ensure_ascii=False)


def success_line(
    request: BatchRequest, output: RequestOutput, *, model: str, created: int, unique: str
) -> dict[str, Any]:
    """Return the output line of a request that ran, as OpenAI writes it.

    `created` is in seconds since 1970. `unique` becomes part of the response's ids: no other response of any run may
    have it, because results of several runs are put into one table.
    """
    is_chat = request.messages is not None
    prompt_tokens = len(output.prompt_token_ids)
    completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{unique}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": request.model or model,
        "choices": [_choice(completion, is_chat=is_chat) for completion in output.outputs],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return {
        "id": _line_id(request.line),
        "custom_id": request.custom_id,
        "response": {"status_code": 200, "request_id": f"req_{unique}", "body": body},
        "error": None,
    }


def _choice(completion: CompletionOutput, *, is_chat: bool) -> dict[str, Any]:
    text = {"message": _message(completion)} if is_chat else {"text": completion.text}
    calls_tools = completion.finish_reason == "stop" and bool(completion.tool_calls)
    reason = "tool_calls" if calls_tools else completion.finish_reason
    return {"index": completion.index, **text, "logprobs": None, "finish_reason": reason}


def _message(completion: CompletionOutput) -> dict[str, Any]:
    """Return the answer as a message. `reasoning`, which OpenAI's API does not have, is called as in vLLM 0.32."""
    calls = completion.tool_calls
    if calls is None:
        return {"role": "assistant", "content": completion.text}
    message: dict[str, Any] = {"role": "assistant", "content": completion.content or (None if calls else "")}
    if completion.reasoning:
        message["reasoning"] = completion.reasoning
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
    return message


def error_line(error: BatchLineError) -> dict[str, Any]:
    """Return the output line of an input line that could not be run."""
    return {
        "id": _line_id(error.line),
        "custom_id": error.custom_id,
        "response": None,
        "error": {"code": error.code, "message": str(error)},
    }


def _line_id(line: int) -> str:
    return f"batch_req_{line}"


def line_number(fields: Mapping[str, Any]) -> int:
    """Return the number of the input line that this output line answers.

    Raises:
        ValueError: it is not an output line of a batch run.
    """
    found = re.fullmatch(r"batch_req_([1-9][0-9]{0,17})", str(fields.get("id")))
    if found is None or not isinstance(fields.get("custom_id"), str) or not {"response", "error"} <= fields.keys():
        raise ValueError("this is not an output line of a batch run.")
    return int(found[1])


def encode_line(fields: dict[str, Any]) -> bytes:
    """Encode an output line as a line of UTF-8 JSON.

    Letters of any script stay as they are, but a line with lone surrogates, which UTF-8 cannot encode, is escaped to
    ASCII.
    """
    try:
        return _ENCODER.encode(fields).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(fields).encode("ascii") + b"\n"
