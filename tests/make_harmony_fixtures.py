"""Write `chat_gpt_oss.json`: GPT-OSS's own template, and conversations as openai-harmony writes them.

Run by a maintainer when the fixture has to change, with a Python that has the packages of `VERSIONS` (it does not
import twinmesh; trl needs none of what it depends on), and a folder with the vocabulary that openai-harmony would
download:

    TIKTOKEN_ENCODINGS_BASE=FOLDER python tests/make_harmony_fixtures.py

The template is from trl (Apache 2.0), which has it byte for byte as the model's repository does. A case is a
conversation in the shapes of OpenAI's API with what else `LLM.chat_prompt` takes, and the text of openai-harmony's
tokens, made by hand of the package's own objects, with TODAY in the place of the date.
"""
# Its packages are not in this project's environment.
# mypy: ignore-errors

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import openai_harmony as harmony
from openai_harmony import Author, DeveloperContent, Message, Role, SystemContent

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "chat_gpt_oss.json"
VERSIONS = {"openai-harmony": "0.0.8", "trl": "1.16.0"}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where."},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ASKED, THANKED = {"role": "user", "content": "Asked."}, {"role": "user", "content": "Thanked."}
CALLED = {"role": "assistant", "reasoning": "Thought.", "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "1", "content": '{"t": 3}'}
SAID = {"role": "assistant", "reasoning": "Thought again.", "content": "Said."}
SYSTEM = {"role": "system", "content": "Be kind."}


def system(**fields):
    content = SystemContent(conversation_start_date="TODAY", **fields)
    return Message.from_role_and_content(Role.SYSTEM, content)


def developer(instructions=None, tools=False):
    content = DeveloperContent(instructions=instructions)
    if tools:
        content = content.with_function_tools([harmony.ToolDescription.new("weather", "Tells it.", PARAMETERS)])
    return Message.from_role_and_content(Role.DEVELOPER, content)


def user(text):
    return Message.from_role_and_content(Role.USER, text)


def said(text, channel="final"):
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def called():
    message = said('{"city": "Oslo"}', "commentary")
    return message.with_recipient("functions.weather").with_content_type("<|constrain|>json")


def told():
    message = Message.from_author_and_content(Author.new(Role.TOOL, "functions.weather"), '{"t": 3}')
    return message.with_channel("commentary").with_recipient("assistant")


def cases():
    """Names, conversations, other arguments, and openai-harmony's messages."""
    high = {"reasoning_effort": "high"}
    yield "a question", [ASKED], {}, [system(), user("Asked.")]
    yield "an effort", [ASKED], high, [system(reasoning_effort="High"), user("Asked.")]
    named = {"chat_template_kwargs": {"model_identity": "You are X."}}
    yield "an identity", [ASKED], named, [system(model_identity="You are X."), user("Asked.")]
    yield "tools", [ASKED], {"tools": [TOOL]}, [system(), developer(None, True), user("Asked.")]
    yield "instructions", [SYSTEM, ASKED], {}, [system(), developer("Be kind."), user("Asked.")]
    both = [system(), developer("Be kind.", True), user("Asked.")]
    yield "instructions and tools", [SYSTEM, ASKED], {"tools": [TOOL]}, both
    tools = {"tools": [TOOL]}
    head = [system(), developer(None, True), user("Asked.")]
    yield "a call is answered", [ASKED, CALLED, TOLD], tools, [*head, said("Thought.", "analysis"), called(), told()]
    done = [*head, called(), told(), said("Said."), user("Thanked.")]
    yield "a turn with a call is over", [ASKED, CALLED, TOLD, SAID, THANKED], tools, done
    turns = [system(), user("Asked."), said("Said."), user("Thanked."), said("Said."), user("Thanked.")]
    yield "turns with reasoning are over", [ASKED, SAID, THANKED, SAID, THANKED], {}, turns
    again = [*head, said("Said."), user("Thanked."), said("Thought.", "analysis"), called(), told()]
    yield "a call is answered in a later turn", [ASKED, SAID, THANKED, CALLED, TOLD], tools, again
    two = [*head, said("Thought.", "analysis"), said("Let me see.", "commentary"), called(), called(), told(), told()]
    yield "two calls", [ASKED, CALLED | {"content": "Let me see.", "tool_calls": [CALL, CALL]}, TOLD, TOLD], tools, two


def main():
    for name, version in VERSIONS.items():
        if importlib.metadata.version(name) != version:
            raise SystemExit(f"{name} {version} is wanted.")
    encoding = harmony.load_harmony_encoding("HarmonyGptOss")
    keep_all = harmony.RenderConversationConfig(auto_drop_analysis=False)
    found = []
    for name, messages, options, written in cases():
        conversation = harmony.Conversation.from_messages(written)
        ids = encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, config=keep_all)
        found.append({"name": name, "messages": messages, "options": options, "text": encoding.decode(ids)})
    folder = Path(importlib.util.find_spec("trl").origin).parent
    template = (folder / "chat_templates" / "gptoss.jinja").read_text(encoding="utf-8")
    content = {"versions": VERSIONS, "template": template, "cases": found}
    FIXTURE.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
