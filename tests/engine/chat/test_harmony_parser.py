"""What a model writes in the harmony format, in parts; and what it writes in none."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.chat.answers import Parts, Piece, ToolCall, joined
from twinmesh.engine.chat.harmony_parser import HarmonyParser
from twinmesh.models.text.harmony_tokens import TEXTS, HarmonyTokens

MARKERS = HarmonyTokens(*range(len(TEXTS)))
OTHER = "<|endoftext|>"  # special, and no marker
IDS = {text: id_ for id_, text in enumerate((*TEXTS, OTHER))}
START = "<|start|>assistant"


def pieces(text):
    """Cut a text into tokens: the special ones, and words with the blanks before them."""
    for part in re.split(r"(<\|\w+\|>)", text):
        if part in IDS:
            yield Piece(IDS[part], part)
        else:
            yield from (Piece(100, word) for word in re.findall(r"\s*\S+|\s+", part))


def parser(begun=START):
    ids = map("call_{}".format, itertools.count())
    return HarmonyParser(MARKERS, frozenset(IDS.values()), pieces(begun), lambda: next(ids))


def parts(text, begun=START, size=1):
    reader, new = parser(begun), list(pieces(text))
    taken = [reader.push(new[start : start + size]) for start in range(0, len(new), size)]
    return joined([*taken, reader.finish()])


def call(name, arguments, number=0):
    return ToolCall(f"call_{number}", name, arguments)


THINK = "<|channel|>analysis<|message|>I think.<|end|>"
WELL_FORMED = {
    "an answer": (
        f"{THINK}{START}<|channel|>final<|message|>It is 3.<|return|>", Parts("I think.", "It is 3."),
    ),
    "a call": (
        f'{THINK}{START}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"a": 1}}<|call|>',
        Parts("I think.", "", (call("f", '{"a": 1}'),)),
    ),
    "a call whose recipient is in the author's place": (
        ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', Parts("", "", (call("f", '{"a": 1}'),)),
    ),
    "a call of a built-in tool, from the analysis": (
        "<|channel|>analysis to=python code<|message|>1 + 1<|call|>", Parts("", "", (call("python", "1 + 1"),)),
    ),
    "a preamble and two calls": (
        f"<|channel|>commentary<|message|>Let me see.<|end|>{START}<|channel|>commentary to=functions.a<|message|>{{}}"
        f"<|call|>{START}<|channel|>commentary to=functions.b<|message|>{{}}<|call|>",
        Parts("", "Let me see.", (call("a", "{}"), call("b", "{}", 1))),
    ),
    "two messages of a kind": (
        f"{THINK}{START}<|channel|>analysis<|message|>And again.<|end|>{START}<|channel|>final<|message|>A<|return|>",
        Parts("I think.\nAnd again.", "A"),
    ),
}  # fmt: skip
CUT = {
    "in a text": ("<|channel|>analysis<|message|>I thi", Parts("I thi")),
    "in a call": ("<|channel|>commentary to=functions.f<|message|>{", Parts("", "", (call("f", "{"),))),
    "behind a start": (f"{THINK}{START}", Parts("I think.")),
    "in the name of a channel": ("<|channel|>comment", Parts()),
    "in a recipient": ("<|channel|>commentary to=fun", Parts()),
    "in a recipient in the author's place": (" to=functions.f", Parts()),
    "before a content": ("<|channel|>commentary to=functions.f <|constrain|>json", Parts()),
    "behind nothing": ("", Parts()),
}
MALFORMED = {
    "no marker": ("  Hello there,\nyou.", Parts("", "  Hello there,\nyou.")),
    "no marker but an end": ("Hello there.<|return|>", Parts("", "Hello there.")),
    "no marker, and words of headers": ("tool calls are nice", Parts("", "tool calls are nice")),
    "no end": (f"<|channel|>analysis<|message|>A{START}<|channel|>final<|message|>B", Parts("A", "B")),
    "no end and no start": ("<|channel|>analysis<|message|>A<|channel|>final<|message|>B", Parts("A", "B")),
    "no start": (f"{THINK}assistant<|channel|>final<|message|>B", Parts("I think.", "B")),
    "no channel": ("<|message|>A<|return|>", Parts("", "A")),
    "no content": ("<|channel|>final Hello there<|return|>", Parts("", " Hello there")),
    "an unknown channel": ("<|channel|>musing<|message|>A", Parts("", "A")),
    "an unknown channel without content": ("<|channel|>Hello<|return|>", Parts("", "Hello")),
    "text behind a message": ("<|channel|>final<|message|>A<|end|>and more", Parts("", "A\nand more")),
    "text before a header": (f"Well{START}<|channel|>final<|message|>A", Parts("", "Well\nA")),
    "words in a header": ("<|channel|>final or not so<|message|>A", Parts("", " or not so\nA")),
    "a recipient without content": (" to=functions.f<|return|>", Parts("", " to=functions.f")),
    "markers in a content": ("<|channel|>final<|message|>a<|message|>b<|constrain|>c", Parts("", "abc")),
    "another special token": (f"<|channel|>final<|message|>a{OTHER}b", Parts("", "ab")),
    "another author": ("<|end|><|start|>user<|message|>Hi<|end|>", Parts("", "Hi")),
}


@pytest.mark.parametrize("case", WELL_FORMED | CUT | MALFORMED)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_answer_is_read_into_its_parts_however_it_comes(case, size):
    text, expected = (WELL_FORMED | CUT | MALFORMED)[case]
    assert parts(text, size=size) == expected


def test_characters_that_spell_a_marker_are_text():
    reader = parser()
    reader.push(pieces("<|channel|>final<|message|>"))
    assert reader.push([Piece(100, "<|"), Piece(100, "end"), Piece(100, "|>")]).content == "<|end|>"


def test_a_part_is_given_out_as_soon_as_it_comes():
    reader = parser()
    assert reader.push(pieces("<|channel|>analysis<|message|>I")) == Parts("I")
    assert reader.push(pieces(" think.<|end|><|start|>assistant<|channel|>final")) == Parts(" think.")
    assert reader.push(pieces("<|message|>A")) == Parts("", "A")


def test_an_answer_goes_on_where_the_prompt_has_ended():
    open_end = f"{START}<|channel|>final<|message|>One colour is"
    assert parts(" red.<|return|>", begun=open_end) == Parts("", " red.")
    assert parts(f"{START}<|channel|>final<|message|>A", begun="<|start|>user<|message|>Hi<|end|>") == Parts("", "A")
    assert parts("<|message|>A", begun=f"{START}<|channel|>analysis") == Parts("A")


WORDS = st.text("ab ï=:.", min_size=1, max_size=6).map(lambda text: f"{text}~")  # the last letter is in no markup
HEADERS = st.sampled_from(
    ["assistant", "analysis", "final", "commentary", " to=functions.f", "json", "analy", "functions.f", " ", "user"]
)


@given(st.lists(st.sampled_from([*TEXTS, OTHER]) | WORDS | HEADERS, max_size=14), st.integers(1, 5))
def test_whatever_a_model_writes_no_text_is_lost_or_twice_and_no_marker_shows(written, size):
    found = parts("".join(written), size=size)
    said = found.reasoning + found.content + "".join(call.arguments for call in found.tool_calls)
    names = "".join(call.name for call in found.tool_calls)
    lost = in_headers(written)
    assert said.count("~") + names.count("~") >= "".join(written).count("~") - lost
    assert said.count("~") <= "".join(written).count("~")
    assert "<|" not in said + names


def in_headers(written):
    """How many of the words may be names of channels, types or recipients: the first two that stand behind such a
    marker, if no blank is in them."""
    count = 0
    for found in re.finditer(r"<\|(?:channel|constrain)\|>([^<]*)|to=(\S*)", "".join(written)):
        count += sum(word.count("~") for word in (found[1] or found[2] or "").split()[:3])
    return count


@given(st.lists(WORDS, max_size=6), st.sampled_from(["final", "analysis", "commentary", "other"]))
def test_an_ordinary_message_is_kept_to_the_letter(words, channel):
    text = "".join(words)
    found = parts(f"<|channel|>{channel}<|message|>{text}<|end|>")
    assert (found.reasoning if channel == "analysis" else found.content) == text


def test_arguments_stay_the_models_own_text():
    arguments = json.dumps({"q": "a\n<b>"}, indent=2)
    (found,) = parts(f"<|channel|>commentary to=functions.f<|message|>{arguments}<|call|>").tool_calls
    assert found.arguments == arguments
