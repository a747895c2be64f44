"""Grammars compiled for one vocabulary: what they let through, and the sentences with which they are refused."""

import json
import re
import sys
import warnings

import pytest
from helpers.byte_words import ByteWords, allowed
from twinmesh import StructuredOutputsParams
from twinmesh.engine.chat.chat_format import FINAL_CHANNEL
from twinmesh.engine.structured.grammar import Grammars
from twinmesh.engine.structured.opening import Opening
from twinmesh.engine.structured.vocabulary import bits

FIELDS = {"name": {"type": "string"}, "age": {"type": "integer"}}
PERSON = {"type": "object", "properties": FIELDS, "required": ["name"]}
ENDS = ByteWords.eos_token_ids


@pytest.fixture(scope="module")
def grammars():
    return Grammars(ByteWords())


def takes(grammar, text):
    """Whether every byte of a text is allowed where it comes, and whether the text may end there."""
    matcher = grammar.matcher()
    for byte in text.encode():
        if byte not in allowed(matcher):
            return False, False
        matcher.push(byte)
    return True, bool(ENDS & {*allowed(matcher)})


def test_an_answer_may_end_exactly_where_its_grammar_may(grammars):
    matcher = grammars.compile(StructuredOutputsParams(json=PERSON)).matcher()
    for byte in b'{"name":"x","age":1':
        assert not ENDS & {*allowed(matcher)}
        matcher.push(byte)
    matcher.push(ord("}"))
    assert {*allowed(matcher)} == ENDS
    assert matcher.is_over


@pytest.mark.parametrize(
    ("params", "good", "bad"),
    [
        ({"json": PERSON}, '{"name": "a", "age": 3}', '{"age":3,"name":"a"}'),
        ({"json": json.dumps(PERSON)}, '{"name":"a"}', '{"name":1'),
        ({"json": PERSON, "disable_any_whitespace": True}, '{"name":"a"}', '{ "name"'),
        ({"json": PERSON, "disable_additional_properties": True}, '{"name":"a"}', '{"name":"a","b":1}'),
        ({"json": PERSON}, '{"name":"a","b":1}', "[]"),
        ({"json": PERSON, "whitespace_pattern": "[ ]"}, '{ "name": "a"}', '{  "name"'),
        ({"json": PERSON}, "{" + 40 * " " + '"name":"a"}', "{" + 41 * " "),
        ({"json_object": True}, '{"a":[1,null,{}]}', "[1]"),
        ({"regex": r"[a-z]+\d{2}"}, "ab12", "ab1x"),
        ({"choice": ["yes", 'n"o\n', "né"]}, 'n"o\n', "nope"),
        ({"choice": ["yes", "né"]}, "né", "nes"),
        ({"grammar": 'start: "a" NUMBER\nNUMBER: /[0-9]+/'}, "a10", "b"),
        ({"grammar": 'root ::= "a" b\nb ::= [0-9]'}, "a1", "aa"),
    ],
)
def test_what_is_asked_for_is_what_may_come(grammars, params, good, bad):
    grammar = grammars.compile(StructuredOutputsParams(**params))
    assert takes(grammar, good) == (True, True)
    assert takes(grammar, bad)[1] is False


def test_a_regular_expression_that_may_go_on_may_end_or_go_on(grammars):
    assert takes(grammars.compile(StructuredOutputsParams(regex="a+")), "aa") == (True, True)
    matcher = grammars.compile(StructuredOutputsParams(regex="a+")).matcher()
    matcher.push(ord("a"))
    assert {ord("a"), *ENDS} <= {*allowed(matcher)}


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"json": "{"}, r"json is not JSON \(.* at line 1, column 2\)"),
        ({"json": {"type": "objct"}}, r"Invalid type: objct"),
        ({"json": {"properties": {"a": {"items": {"uniqueItems": True}}}}}, r"'uniqueItems' at /properties/a/items, "),
        ({"json": {"not": {}}}, r"keyword 'not' at the top, which cannot be kept to: remove it"),
        ({"json": {"type": "string", "format": "iri"}}, r"format 'iri', which cannot be kept to"),
        ({"json": {"oneOf": [{"minimum": 1}, {"maximum": 3}]}}, r"'oneOf' at the top whose schemas may overlap"),
        ({"json": False}, r"json is False, which admits nothing: give a schema"),
        ({"json": "[]"}, r"json is no JSON schema: it must be an object, or True"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, r"admits nothing \(minimum \(5\)"),
        ({"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, r"admits nothing"),
        ({"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}}, r"nothing that ends"),
        ({"json": {"$ref": "#/$defs/nowhere"}}, r"'/\$defs/nowhere' does not exist"),
        ({"regex": "a(b"}, r"unclosed group at character 2 of 'a\(b'"),
        ({"regex": r"\bfoo"}, r"lookarounds not supported yet"),
        ({"regex": r"[^\x00-\x{10FFFF}]"}, r"regex admits nothing: loosen it"),
        ({"grammar": "start: foo"}, r'wrong at line 1, column 8 \(unknown name: "foo"\)'),
        ({"grammar": 'start: "a"\nb: /x'}, r"wrong at line \d, column \d+ \(lexer error\)"),
        ({"grammar": "root ::= foo"}, r"no GBNF \(Rule 'foo' not found\)"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_in_a_sentence(grammars, params, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        grammars.compile(StructuredOutputsParams(**params))
    said = str(refused.value)
    assert said.startswith("structured_outputs.")
    assert said.endswith(".")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({}, "needs one of json, regex, choice, grammar, json_object, and has none"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice: give one"),
        ({"regex": ""}, "regex='' is not usable"),
        ({"json": 3}, "json=3 is not usable: it must be a JSON schema"),
        ({"choice": []}, "choice=.. is not usable"),
        ({"choice": "yes"}, "choice='yes' is not usable"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"json_object": "yes"}, "json_object='yes' is not usable: it must be True or False"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace is about JSON, and regex is not"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "leave one of them out"),
        ({"json": {"const": object()}}, "json is not JSON"),
        ({"regex": "a", "after": "é" * 65}, "after has more than 128 bytes: give the end of that text"),
    ],
)
def test_parameters_that_ask_for_nothing_or_for_several_are_refused(params, sentence):
    with pytest.raises(ValueError, match=sentence):
        StructuredOutputsParams(**params).schema()


def test_a_keyword_that_nobody_keeps_to_is_named_once():
    grammars = Grammars(ByteWords())
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLenght": 3, "title": "A"}}}
    with pytest.warns(UserWarning, match=re.escape("'minLenght' at /properties/a, which is no keyword")):
        grammars.compile(StructuredOutputsParams(json=schema))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grammars.compile(StructuredOutputsParams(json={**schema, "title": "another"}))


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"extra 'structured': pip install 'twinmesh\[structured\]'"):
        Grammars(ByteWords()).compile(StructuredOutputsParams(regex="a"))


def test_what_was_compiled_once_is_not_compiled_again(grammars):
    first = grammars.compile(StructuredOutputsParams(regex="ab"))
    assert grammars.compile(StructuredOutputsParams(regex="ab")) is first


def test_completions_of_one_grammar_do_not_disturb_each_other(grammars):
    grammar = grammars.compile(StructuredOutputsParams(regex="ab"))
    one, other = grammar.matcher(), grammar.matcher()
    one.push(ord("a"))
    assert {*allowed(one)} == {ord("b")}
    assert {*allowed(other)} == {ord("a")}


# ---- behind a block of reasoning


def spelled(*texts):
    return [ByteWords.pieces.index(text) for text in texts]


def test_behind_reasoning_all_is_free_but_the_end_until_the_text_that_ends_it(grammars):
    grammar = grammars.compile(StructuredOutputsParams(regex="ab", after="</think>"))
    matcher = grammar.matcher([*b"Hello <think>"])
    assert not ENDS & {*allowed(matcher)}
    assert set(range(256)) <= {*allowed(matcher)}
    for token in spelled(b"x", b"</", b"think"):
        matcher.push(token)
    ok, brace, more = spelled(b">\n", b">{", b"> x")
    assert {ok, ord(">")} <= {*allowed(matcher)}
    assert not {brace, more} & {*allowed(matcher)}  # they would begin the answer outside its grammar
    matcher.push(ok)
    assert {*allowed(matcher)} == {ord("a")}


def test_a_token_that_ends_no_reasoning_may_hold_its_last_character(grammars):
    matcher = grammars.compile(StructuredOutputsParams(regex="ab", after="</think>")).matcher()
    assert set(spelled(b">{", b"> x")) <= {*allowed(matcher)}


def test_reasoning_that_the_prompt_has_ended_does_not_begin_again(grammars):
    grammar = grammars.compile(StructuredOutputsParams(regex="ab", after="</think>"))
    assert {*allowed(grammar.matcher([*b"<think>\n\n</think>\n\n"]))} == {ord("a")}
    assert {*allowed(grammar.matcher([*b"</think> more"]))} != {ord("a")}


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        (b"<|start|>assistant<|channel|>final<|message|>", True),
        (b"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>", True),
        (b"<|channel|>final <|constrain|>json<|message|>", True),
        (b"<|channel|>analysis<|message|>", False),
        (b"<|channel|>commentary to=functions.f <|constrain|>json<|message|>", False),
        (b"<|channel|>final<|message|>Hi", False),
    ],
)
def test_harmonys_final_channel_is_where_an_answer_begins(text, begins):
    assert Opening(FINAL_CHANNEL, ByteWords.pieces).stands_at_end(text) is begins


def test_a_schema_cannot_have_keywords_passed_over(grammars):
    for lenient in ({"lenient": True}, {"coerce_one_of": True}):
        schema = {"x-guidance": lenient, "uniqueItems": True, "oneOf": [{"minimum": 1}, {"maximum": 3}]}
        with pytest.raises(ValueError, match="which cannot be kept to"):
            grammars.compile(StructuredOutputsParams(json=schema))


def test_bits_are_those_of_tokens():
    assert bits([0, 33], 2).tolist() == [1, 2]
