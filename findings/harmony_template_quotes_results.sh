#!/usr/bin/env bash
# openai-harmony 0.0.8 and GPT-OSS's own chat template (as trl 1.16.0 has it): both are OpenAI's, and write the same conversation
# differently. The template runs what a tool has returned through `tojson`, so that the model reads a quoted JSON string, with its
# quotes and line ends escaped, where openai-harmony writes the text; and it puts `json` before arguments where the format's
# documentation has `<|constrain|>json`. A server that renders with the one gives other tokens than one that renders with the other.
#
# Seen on 2026-11-30 (of each the end):
#   as found: openai-harmony: ... <|start|>functions.f to=assistant<|channel|>commentary<|message|>{"t": 3}<|end|>
#   as found: the template: ... <|start|>functions.f to=assistant<|channel|>commentary<|message|>"{\"t\": 3}"<|end|>
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare openai-harmony==0.0.8 jinja2==3.1.6 -- "$@"
fetch_o200k
# Of trl only the template is wanted, and none of what it depends on.
"$folder/venv/bin/python" -m pip install --disable-pip-version-check --no-deps trl==1.16.0 >"$folder/pip.log" 2>&1 ||
    die "trl 1.16.0 could not be installed."
run_python <<'PY'
import importlib.util
import json
from pathlib import Path

import jinja2
from finding import expect
from openai_harmony import Author, Conversation, Message, Role, load_harmony_encoding

returned = '{"t": 3}'
chat = [
    {"role": "user", "content": "Asked."},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": returned},
]
environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
environment.filters["tojson"] = json.dumps  # as in transformers
environment.globals["strftime_now"] = lambda how: "today"
text = (Path(importlib.util.find_spec("trl").origin).parent / "chat_templates" / "gptoss.jinja").read_text()
template = environment.from_string(text).render(messages=chat, add_generation_prompt=True)

call = Message.from_role_and_content(Role.ASSISTANT, '{"a": 1}').with_channel("commentary")
result = Message.from_author_and_content(Author.new(Role.TOOL, "functions.f"), returned)
messages = [
    Message.from_role_and_content(Role.USER, "Asked."),
    call.with_recipient("functions.f").with_content_type("<|constrain|>json"),
    result.with_channel("commentary").with_recipient("assistant"),
]
encoding = load_harmony_encoding("HarmonyGptOss")
harmony = encoding.decode(
    encoding.render_conversation_for_completion(Conversation.from_messages(messages), Role.ASSISTANT)
)
user = "<|start|>user<|message|>Asked.<|end|>"
harmony, template = (each.partition(user)[2].removesuffix("<|start|>assistant") for each in (harmony, template))
head = "<|start|>assistant to=functions.f<|channel|>commentary "
back = '<|message|>{"a": 1}<|call|><|start|>functions.f to=assistant<|channel|>commentary<|message|>'
expect(harmony == head + "<|constrain|>json" + back + returned + "<|end|>", f"openai-harmony: {harmony}")
expect(template == head + "json" + back + json.dumps(returned) + "<|end|>", f"the template: {template}")
PY
