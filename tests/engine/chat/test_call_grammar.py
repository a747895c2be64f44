"""Answers that have to call tools: whatever the grammar lets through is read as calls that fit their schemas."""

import json
import random

import numpy as np
import pytest
from helpers.chat_families import FAMILIES, OTHER, chat_template, source, tokenizer
from helpers.harmony import byte_tokenizer
from twinmesh.engine.chat.answers import Piece, call_ids, joined
from twinmesh.engine.chat.chat_format import ChatFormat
from twinmesh.engine.chat.tool_use import read_tool_use
from twinmesh.models.text.chat import ChatTemplate

pytest.importorskip("llguidance")
from twinmesh.engine.structured.grammar import Grammars
from twinmesh.engine.structured.params import StructuredOutputsParams

CHAT = [{"role": "user", "content": "q"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "exact": {"type": "boolean"},
        "at": {
            "type": "object",
            "properties": {"lat": {"type": "number"}},
            "required": ["lat"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string"}},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city", "exact"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}
GRAMMARS = Grammars(tokenizer())


def forced(chat, grammars, prompt, use):
    lark, after = chat.grammar(prompt, CHAT, use, {})
    return grammars.compile(StructuredOutputsParams(grammar=lark, after=after))


def answer(words, matcher, seed, *, most=400):
    """Draw tokens that the grammar lets through, soon those that close something; None: it became too long."""
    draw, mask, out, ending = random.Random(seed), np.zeros(matcher.words, np.int32), [], []
    for number in range(most):
        if matcher.may_end and (matcher.is_over or draw.random() < 0.6):
            return out
        matcher.fill(mask)
        (may,) = np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: words.vocab_size])
        may = [token for token in may.tolist() if token not in words.eos_token_ids]
        closing = [token for token in may if words.piece(token) in (b'"', b"<", b"}", b"]", b",")]
        special = [token for token in may if token in words.control_ids]
        pick = special or (closing if closing and (number > 200 or draw.random() < 0.4) else may)
        if not ending and draw.random() < 0.1:
            ending = words.encode("\n</parameter>\n", add_special=False)
        following = ending.pop(0) if ending else None
        out.append(following if following in may and not special else draw.choice(pick))
        matcher.push(out[-1])
        assert matcher.failure is None
    return None


def read(words, chat, prompt, use, ids):
    parser = chat.answers(CHAT, use, {}).parser(prompt, call_ids("x"))
    pieces, stream = [], words.stream(False, prompt)
    pieces = [Piece(token, stream.push((token,))) for token in ids]
    return joined([parser.push(pieces), parser.push([Piece(-1, stream.finish())]), parser.finish()])


def check(found, names):
    jsonschema = pytest.importorskip("jsonschema")
    assert found.tool_calls
    for call in found.tool_calls:
        assert call.name in names
        jsonschema.validate(json.loads(call.arguments), SCHEMA if call.name == "weather" else {"type": "object"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_whatever_a_grammar_lets_through_is_read_as_calls_that_fit(family, choice):
    use = read_tool_use([WEATHER, OTHER], choice)
    template = chat_template(family)
    prompt = template.encode(CHAT, tools=[WEATHER, OTHER])
    chat = ChatFormat(tokenizer(), template)
    grammar = forced(chat, GRAMMARS, prompt, use)
    whole = 0
    for seed in range(6):
        ids = answer(tokenizer(), grammar.matcher(prompt), seed)
        if ids is not None:
            whole += 1
            found = read(tokenizer(), chat, prompt, use, ids)
            check(found, {"weather"} if choice == NAMED else {"weather", "time.now"})
            assert found.content == ""
            assert choice == "required" or len(found.tool_calls) == 1
    assert whole >= 3


def spelled(text):
    return tokenizer().encode(text, add_special=False)


def takes(matcher, text):
    """How many tokens of a text the grammar lets through, of how many."""
    ids, mask = spelled(text), np.zeros(matcher.words, np.int32)
    for number, token in enumerate(ids):
        matcher.fill(mask)
        if not mask[token // 32] >> token % 32 & 1:
            return number, len(ids)
        matcher.push(token)
    return len(ids), len(ids)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "exact": true}}\n</tool_call>'


@pytest.mark.parametrize(
    ("opens", "variables", "answer"),
    [
        ("", {}, f"<think>\nHm {{.\n</think>\n\n{CALL}\n{CALL}"),
        ("", {}, CALL),
        ("", {"enable_thinking": False}, CALL),
        ("<think>\n", {}, f"Hm {{.\n</think>\n\n{CALL}"),
        ("<think>\n", {}, f"Hm {{.\n</think>{CALL}"),
    ],
)
def test_reasoning_is_free_and_what_follows_is_called(opens, variables, answer):
    template = source("qwen3").replace(
        "'<|im_start|>assistant\\n' }}", f"'<|im_start|>assistant\\n{opens}' }}}}".replace("\n", "\\n")
    )
    template = ChatTemplate(template, tokenizer(), name="tiny")
    prompt = template.encode(CHAT, tools=[WEATHER], chat_template_kwargs=variables)
    chat = ChatFormat(tokenizer(), template)
    matcher = forced(chat, GRAMMARS, prompt, read_tool_use([WEATHER], "required")).matcher(prompt)
    taken, of = takes(matcher, answer)
    assert (taken, matcher.may_end) == (of, True)
    check(read(tokenizer(), chat, prompt, read_tool_use([WEATHER], "required"), spelled(answer)), {"weather"})


def test_one_call_is_all_where_several_at_a_time_are_not_wanted():
    template = chat_template("qwen2_5")
    chat, use = ChatFormat(tokenizer(), template), read_tool_use([WEATHER], "required", parallel_tool_calls=False)
    matcher = forced(chat, GRAMMARS, template.encode(CHAT, tools=[WEATHER]), use).matcher()
    assert takes(matcher, CALL)[0] == len(spelled(CALL))
    assert matcher.is_over
    several = forced(chat, GRAMMARS, [], read_tool_use([WEATHER], "required")).matcher()
    assert takes(several, f"{CALL}\n{CALL}") == (len(spelled(f"{CALL}\n{CALL}")),) * 2


def test_in_the_harmony_format_a_call_comes_behind_reasoning_or_at_once():
    words = byte_tokenizer()
    chat = ChatFormat(words, ChatTemplate(None, words, name="tiny"))
    prompt, use = words.encode("<|start|>assistant", add_special=False), read_tool_use([WEATHER, OTHER], "required")
    grammar = forced(chat, Grammars(words), prompt, use)
    whole = [ids for seed in range(6) if (ids := answer(words, grammar.matcher(prompt), seed)) is not None]
    assert len(whole) >= 3
    for ids in whole:
        check(read(words, chat, prompt, use, ids), {"weather", "time.now"})


@pytest.mark.parametrize(
    ("family", "schema", "says"),
    [
        ("qwen3_coder", {"type": "string", "pattern": "a+"}, "cannot hold an answer to 'pattern' of the parameter 'a'"),
        (
            "functiongemma",
            {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
            "cannot hold an answer to the",
        ),
        ("functiongemma", {}, "cannot hold an answer to the parameter 'a' of 'f' in this model's form of calls"),
    ],
)
def test_what_a_form_cannot_be_held_to_is_refused(family, schema, says):
    use = read_tool_use([{"name": "f", "parameters": {"properties": {"a": schema}}}], "required")
    with pytest.raises(ValueError, match=says):
        ChatFormat(tokenizer(), chat_template(family)).grammar([], CHAT, use, {})


def test_a_value_may_be_of_several_types_without_quotes():
    schema = {"properties": {"a": {"type": ["integer", "null"]}}, "required": ["a"]}
    use = read_tool_use([{"name": "f", "parameters": schema}], "required")
    chat = ChatFormat(tokenizer(), chat_template("functiongemma"))
    for value in ("5", "null"):
        matcher = forced(chat, GRAMMARS, [], use).matcher()
        text = f"<start_function_call>call:f{{a:{value}}}<end_function_call>"
        assert takes(matcher, text) == (len(spelled(text)),) * 2


@pytest.mark.parametrize("family", ["qwen3_coder", "functiongemma", "pythonic"])
def test_what_is_required_and_not_described_is_refused_where_each_is_written_for_itself(family):
    use = read_tool_use([{"name": "f", "parameters": {"required": ["b"]}}], "required")
    with pytest.raises(ValueError, match="the parameter 'b' of 'f', which is required and not among its properties"):
        ChatFormat(tokenizer(), chat_template(family)).grammar([], CHAT, use, {})


def test_what_binds_parameters_together_is_refused_where_each_is_written_for_itself():
    use = read_tool_use([{"name": "f", "parameters": {"minProperties": 1}}], "required")
    ChatFormat(tokenizer(), chat_template("hermes")).grammar([], CHAT, use, {})
    with pytest.raises(ValueError, match="cannot hold an answer to 'minProperties' of the parameters of 'f'"):
        ChatFormat(tokenizer(), chat_template("pythonic")).grammar([], CHAT, use, {})


def test_a_template_that_writes_no_calls_cannot_be_held_to_any():
    with pytest.raises(ValueError, match="the chat template of tiny does not show how calls are written: use 'auto'"):
        ChatFormat(tokenizer(), chat_template("smollm2")).grammar([], CHAT, read_tool_use([WEATHER], "required"), {})
