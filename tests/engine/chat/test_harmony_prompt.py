"""Conversations for GPT-OSS: by its own template, and in the harmony format by openai-harmony.

Right texts are those of `fixtures/chat_gpt_oss.json`, which `make_harmony_fixtures.py` writes. What needs
openai-harmony and its vocabulary, of 200,000 tokens, is for `-m long`.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest
from helpers.harmony import byte_tokenizer, o200k_tokenizer
from twinmesh.engine.chat.answers import call_ids
from twinmesh.engine.chat.chat_format import ChatFormat
from twinmesh.engine.chat.harmony_parser import HarmonyFormat
from twinmesh.engine.chat.harmony_vocabulary import ranks_of
from twinmesh.engine.chat.reader import AnswerReader
from twinmesh.models.errors import ChatTemplateError
from twinmesh.models.text.chat import ChatTemplate

TABLE = json.loads((Path(__file__).parents[2] / "fixtures" / "chat_gpt_oss.json").read_text(encoding="utf-8"))
TEMPLATE = TABLE["template"]
CASES = {case["name"]: case for case in TABLE["cases"]}
CHAT = [{"role": "user", "content": "Asked."}]
REFUSED = {"two calls"}  # by the template


def undated(text):
    return re.sub(r"\d{4}-\d\d-\d\d", "TODAY", text)


def format_of(tokenizer, template=None):
    return ChatFormat(tokenizer, ChatTemplate(template, tokenizer, name="gpt-oss"))


def as_the_template_has_it(text):
    """What openai-harmony writes, where the template differs from it."""
    text = text.replace("<|constrain|>json", "json")  # the type of a call's content
    text = re.sub(r"(to=assistant<\|channel\|>commentary<\|message\|>)(.*?)<\|end\|>", _quoted, text)
    return re.sub(r"(# Instructions\n\n.*?)<\|end\|>", r"\1\n\n<|end|>", text)


def _quoted(found):
    return f"{found[1]}{json.dumps(found[2])}<|end|>"


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_the_template_of_the_checkpoint_writes_what_harmony_does(name):
    case = CASES[name]
    text = format_of(byte_tokenizer(), TEMPLATE).prompt(case["messages"], **case["options"])
    expected = as_the_template_has_it(case["text"])
    if "# Tools" in expected:  # the template has blank lines of its own between instructions and tools
        expected, text = (re.sub(r"\n+", "\n", each).replace("\n<|end|>", "<|end|>") for each in (expected, text))
    assert undated(text) == expected


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_an_effort_reaches_a_template_that_reads_it(effort):
    text = format_of(byte_tokenizer(), TEMPLATE).prompt(CHAT, reasoning_effort=effort)
    assert f"Reasoning: {effort}\n" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reasoning_effort": "max"}, "reasoning_effort='max' is not usable: it must be one of low, medium, high."),
        ({"reasoning_effort": 3}, "reasoning_effort=3 is not usable"),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "reasoning_effort='low' and 'high' in chat_template_kwargs differ: keep one of them.",
        ),
        (
            {"reasoning_effort": "low", "chat_template": "{{ messages[0].content }}"},
            "The chat_template that was given does not read 'reasoning_effort'",
        ),
    ],
)
def test_an_effort_that_nobody_reads_is_refused(options, says):
    with pytest.raises(ChatTemplateError, match=re.escape(says)):
        format_of(byte_tokenizer(), TEMPLATE).prompt(CHAT, **options)


def test_a_model_without_markers_and_without_a_template_is_refused_as_before(tiny_tokenizer):
    with pytest.raises(ChatTemplateError, match="has no chat template: give it the prompt as plain text"):
        format_of(tiny_tokenizer).prompt(CHAT)


@pytest.fixture
def tiny_tokenizer():
    from helpers.tiny_gguf import TOKENIZER
    from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf

    return tokenizer_from_gguf(TOKENIZER)


def test_an_answer_and_a_call_end_a_generation_and_a_message_does_not():
    tokenizer = byte_tokenizer()
    ends = {tokenizer.backend.id_to_token(id_) for id_ in tokenizer.eos_token_ids}
    assert ends == {"<|return|>", "<|call|>"}


def test_ranks_are_the_bytes_of_tokens_in_order():
    first, *_, last = ranks_of(byte_tokenizer()).splitlines()
    assert (first, len(ranks_of(byte_tokenizer()).splitlines())) == (b"IQ== 0", 256)  # "!"
    assert last.endswith(b" 255")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_another_vocabulary_with_the_markers_is_refused(template):
    pytest.importorskip("openai_harmony")
    options = {} if template is None else {"chat_template": "harmony"}
    with pytest.raises(ChatTemplateError, match=r"gpt-oss has .* another vocabulary than o200k_base"):
        format_of(byte_tokenizer(), template).encode(CHAT, **options)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai_harmony", None)
    with pytest.raises(
        ValueError, match=r"needs the package of the extra 'harmony': pip install 'twinmesh\[harmony\]'"
    ):
        format_of(byte_tokenizer()).encode(CHAT)


CALL = {"id": ["a"], "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("chat", "tools", "says"),
    [
        ([*CHAT, {"role": "assistant", "tool_calls": [CALL]}], None, r"Message \d has id=\['a'\]: it must be a text"),
        ([*CHAT, {"role": "tool", "content": "1", "tool_call_id": ["a"]}], None, r"has tool_call_id=\['a'\]: it must"),
        (CHAT, [{"function": {"parameters": {}}}], "Tool 0 needs a 'name' that is a string"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_sentence(chat, tools, says):
    pytest.importorskip("openai_harmony")
    with pytest.raises(ChatTemplateError, match=says) as refusal:
        format_of(byte_tokenizer()).encode(chat, tools)
    assert "\n" not in str(refusal.value)


# ---- with openai-harmony and its vocabulary


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    pytest.importorskip("openai_harmony")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TIKTOKEN_ENCODINGS_BASE", raising=False)
        made = format_of(o200k_tokenizer())
        made.encode(CHAT)
        yield made


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_a_model_without_a_template_is_talked_to_in_harmony(gpt_oss, name):
    case = CASES[name]
    ids = gpt_oss.encode(case["messages"], **case["options"])
    assert undated(o200k_tokenizer().decode(ids, skip_special=False)) == case["text"]


@pytest.mark.long
def test_the_vocabulary_is_the_one_that_openai_harmony_wants():
    digest = hashlib.sha256(ranks_of(o200k_tokenizer())).hexdigest()
    assert digest == "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


@pytest.mark.long
def test_a_marker_that_is_written_out_is_text(gpt_oss):
    markers = o200k_tokenizer().harmony
    counts = [gpt_oss.encode([{"role": "user", "content": text}]).count(markers.end) for text in ("a", "a <|end|> b")]
    assert counts == [2, 2]


@pytest.mark.long
def test_a_last_message_is_left_open(gpt_oss):
    chat = [*CHAT, {"role": "assistant", "content": "Said", "reasoning": "Thought."}]
    ids = gpt_oss.encode(chat, add_generation_prompt=False, continue_final_message=True)
    text = o200k_tokenizer().decode(ids, skip_special=False)
    end = "<|channel|>analysis<|message|>Thought.<|end|><|start|>assistant<|channel|>final<|message|>Said"
    assert text.endswith(end)


@pytest.mark.long
@pytest.mark.parametrize(
    "answer",
    [
        "<|channel|>analysis<|message|>Hm ï.<|end|><|start|>assistant<|channel|>final<|message|>Yes 東.<|return|>",
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>analysis<|message|>Hm",
    ],
)
def test_answers_are_read_as_openai_harmony_reads_them(gpt_oss, answer):
    harmony = pytest.importorskip("openai_harmony")
    encoding = gpt_oss._harmony._encoding  # noqa: SLF001
    ids = encoding.encode(answer, allowed_special="all")
    theirs = harmony.StreamableParser(encoding, harmony.Role.ASSISTANT)
    for token in ids:
        theirs.process(token)
    theirs.process_eos()
    tokenizer = o200k_tokenizer()
    parser = HarmonyFormat(tokenizer, tokenizer.harmony).parser(
        encoding.encode("<|start|>assistant", allowed_special="all"), call_ids("x")
    )
    ours = AnswerReader(parser, tokenizer, [], may_stop=False, skip_special=True).finish(ids, "", is_cut=False)
    said = [(m.channel, m.recipient, m.content[0].text) for m in theirs.messages]
    assert ours.reasoning == "".join(text for channel, _, text in said if channel == "analysis")
    assert ours.content == "".join(text for channel, to, text in said if channel != "analysis" and not to)
    calls = [(to.removeprefix("functions."), text) for _, to, text in said if to]
    assert [(call.name, call.arguments) for call in ours.tool_calls] == calls
