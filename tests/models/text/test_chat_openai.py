"""Every field of a message, in every shape that OpenAI's types allow, with five families' own templates: against vLLM.

The table is `fixtures/chat_openai.json`, which `make_chat_fixtures.py` writes: shapes from the types of the pinned
openai, right values from the pinned vLLM. Here is only where another value is right: what vLLM leaves out in silence
is refused.
"""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.models.errors import ChatTemplateError
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.tokenizer import SpecialTokens

TABLE = json.loads((Path(__file__).parents[2] / "fixtures" / "chat_openai.json").read_text(encoding="utf-8"))
TEMPLATES, CASES = TABLE["templates"], TABLE["cases"]
TOOLS = {"qwen2_5", "qwen3", "llama3_1"}  # those that take tools


class Special:
    """A tokenizer, as far as templates are concerned."""

    special = SpecialTokens(bos="<s>", eos="</s>")


CHATS = {name: ChatTemplate(text, Special(), name=name) for name, text in TEMPLATES.items()}


def outcome(name, messages, **options):
    """Return the text, or None and the words of a refusal."""
    try:
        return CHATS[name].render(messages, **options), ""
    except ChatTemplateError as refused:
        return None, str(refused)


def in_vllm(case, name, key="vllm"):
    """Return the text, or None and the words of a refusal."""
    found = TABLE["texts"][case[key][name]]
    return (found, "") if isinstance(found, str) else (None, found["error"])


def is_lost(case, text):
    """Whether a text, a part or a call's name of the conversation is not in the prompt."""
    said = [call["function"]["name"] for message in case["messages"] for call in calls_of(message)]
    for message in case["messages"]:
        content = message.get("content") or message.get("refusal") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        said += [part.get("text") or part.get("refusal") or "" for part in parts]
    return any(text.count(each) < said.count(each) for each in said)


def calls_of(message):
    """Return the calls that a message holds, in their newer form."""
    older = message.get("function_call")
    return [*(message.get("tool_calls") or []), *([{"type": "function", "function": older}] if older else [])]


def complaint(message):
    """Return what is said of a message that has no form for any template; None: it has one."""
    calls = calls_of(message)
    functions = [call.get("function") or {} for call in calls]
    parts = message.get("content") if isinstance(message.get("content"), list) else []
    found = {
        "needs a string under 'role'": message["role"] is None,
        "has 'audio': only text is supported": message.get("audio") is not None,
        "has content of type '.+': only text is supported": {part["type"] for part in parts} - {"text", "refusal"},
        "is of type 'custom': only functions": any(call.get("type") == "custom" for call in calls),
        "needs {'function'": any(function.get("name") is None for function in functions),
        "'arguments' that are not JSON": any(function.get("arguments") == '{"city": ' for function in functions),
        "'arguments' that are not an object": any(function.get("arguments") == "[1]" for function in functions),
        "both 'content' and 'refusal'": message.get("refusal") and message.get("content"),
        "needs a string under 'content'": says_nothing(message),
    }
    return next((says for says, holds in found.items() if holds), None)


def says_nothing(message):
    """Whether there is neither content nor anything that stands for it."""
    names = ("content", "refusal", "tool_calls", "function_call", "reasoning", "reasoning_content", "thinking")
    rest = any(message.get(name) for name in names)
    return message.get("content") is None and not rest and message["role"] not in ("tool", "function")


def expected(case, name):
    """Return the right text, or None and a pattern for the right refusal."""
    message = case["messages"][case["at"]]
    says = complaint(message)
    if says:
        return None, says
    text, words = in_vllm(case, name)
    if name == "gemma3" and message["role"] in ("system", "developer") and isinstance(message["content"], list):
        return in_parts_for_gemma3(case, message), ""
    if text is None:  # the template's own words
        return None, re.escape(words)
    if not is_lost(case, text):
        return text, ""
    if name == "llama3_1" and calls_of(message):  # it writes a call without the words beside it: so it was tuned
        return text, ""
    as_tool = in_vllm(case, name, "as_tool")[0] if "as_tool" in case else None
    if as_tool is not None and not is_lost(case, as_tool):
        return as_tool, ""
    return None, "leaves out"


def in_parts_for_gemma3(case, message):
    """Return the right text of a system message, of whose parts Gemma 3's template reads the first."""
    joined = "\n".join(part["text"] for part in message["content"])
    same = (each for each in CASES if each["type"] == case["type"] and each["field"] == "content")
    (plain,) = [each for each in same if each["messages"][each["at"]]["content"] == "Content."]
    text, _ = in_vllm(plain, "gemma3")
    return text.replace("Content.", joined)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_field_in_every_shape_is_what_it_is_in_vllm_or_refused(name):
    wrong = []
    for case in CASES:
        text, says = expected(case, name)
        got, error = outcome(name, case["messages"])
        if got != text or not re.search(says, error):
            wrong.append((case["type"], case["field"], case["messages"], got or error, text or says))
    assert wrong == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_caller_sets_besides_is_what_it_is_in_vllm_or_refused(name):
    """vLLM ignores variables that the template does not read, and tools where it reads none."""
    for case in TABLE["options"]:
        text, words = in_vllm(case, name)
        unread = {"enable_thinking", "date_string", "tools_in_user_message"} & set(
            case["options"].get("chat_template_kwargs", ())
        )
        says = re.escape(words)
        if case["options"].get("continue_final_message") and case["options"]["add_generation_prompt"]:
            text, says = None, "exclude each other"
        elif case.get("tools") and name not in TOOLS:
            text, says = None, "takes no tools"
        elif any(variable not in TEMPLATES[name] for variable in unread):
            text, says = None, "does not read"
        got, error = outcome(name, case["messages"], tools=case.get("tools"), **case["options"])
        assert got == text
        assert re.search(says, error)


WORDS = st.text("ab é<{\n", min_size=1, max_size=8).filter(str.strip)
CONTENTS = WORDS | st.lists(WORDS, min_size=1, max_size=3)
CALLS = st.none() | st.lists(st.dictionaries(st.sampled_from("xyz"), WORDS, max_size=2), min_size=1, max_size=2)


def as_openai(content):
    return content if isinstance(content, str) else [{"type": "text", "text": text} for text in content]


@st.composite
def conversations(draw):
    """Turns as OpenAI has them, some with a system or developer message and with calls of tools."""
    chat = [
        {"role": role, "content": as_openai(draw(CONTENTS))}
        for role in draw(st.lists(st.sampled_from(["system", "developer"]), max_size=2))
    ]
    for _ in range(draw(st.integers(1, 3))):
        chat.append({"role": "user", "content": as_openai(draw(CONTENTS))})
        calls = draw(CALLS)
        if calls:
            functions = [{"name": f"f{n}", "arguments": json.dumps(each)} for n, each in enumerate(calls)]
            chat.append(
                {"role": "assistant", "content": None, "tool_calls": [{"function": each} for each in functions]}
            )
            chat += [{"role": "tool", "content": as_openai(draw(CONTENTS))} for _ in calls]
        chat.append({"role": "assistant", "content": as_openai(draw(CONTENTS)), "reasoning": "r"})
    return chat


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), conversations())
def test_every_word_is_in_the_prompt_or_the_conversation_is_refused(name, chat):
    text, error = outcome(name, chat)
    if text is None:
        assert re.search("leaves out|failed: ", error)
        assert "\n" not in error
        return
    for message in chat:
        content = message["content"] or ""
        for said in [content] if isinstance(content, str) else [part["text"] for part in content]:
            # Llama 3.1's template writes what a tool said as JSON.
            assert said.strip() in text or json.dumps(said, ensure_ascii=False)[1:-1] in text
        for call in message.get("tool_calls", ()):
            assert call["function"]["name"] in text
            assert json.dumps(json.loads(call["function"]["arguments"]), ensure_ascii=False) in text
