"""Answers that mark their parts in the text: every form of calls, reasoning, and what is neither."""

import itertools
import json

import pytest
from helpers.chat_families import FAMILIES, OTHER, TOOL, chat_template, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.chat.answers import Parts, Piece, ToolCall, call_ids, joined
from twinmesh.engine.chat.chat_format import ChatFormat
from twinmesh.engine.chat.parser_names import REASONINGS, SYNTAXES
from twinmesh.engine.chat.text_parser import TextFormat
from twinmesh.engine.chat.tool_use import read_tool_use

USE = read_tool_use([TOOL, OTHER])
CITY = '{"city": "Oslo"}'


def form(syntax, reasoning=None, *, use=USE, begun=""):
    thoughts = None if reasoning is None else REASONINGS[reasoning]
    return TextFormat(
        tokenizer(), thoughts and thoughts.tags, SYNTAXES.get(syntax), use.known, use.most_calls,
        always_reasons=thoughts is not None and thoughts.is_always, begun=begun,
    )  # fmt: skip


def read(form, pieces, prompt=""):
    """Read pieces of text, each a token of its own."""
    numbers = itertools.count()
    ids = tokenizer().encode(prompt, add_special=False)
    parser = form.parser(ids, lambda: f"call_{next(numbers)}")
    return joined([*(parser.push([Piece(-1, text)]) for text in pieces), parser.finish()])


def calls(*given):
    return tuple(ToolCall(f"call_{number}", name, arguments) for number, (name, arguments) in enumerate(given))


WEATHER = ("weather", CITY)
DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"  # noqa: RUF001
DEEPSEEK_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"  # noqa: RUF001
CODER = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
READ = {
    "hermes": (
        f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>', ("", [WEATHER]),
    ),
    "hermes, words around two": (
        f'Let me see.\n<tool_call>{{"name": "weather", "arguments": {CITY}}}</tool_call>\n'
        '<tool_call>{"name": "time.now"}</tool_call>\nDone.  ',
        ("Let me see.\nDone.  ", [WEATHER, ("time.now", "{}")]),
    ),
    "hermes, the end is missing where all ends": (
        f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_', ("", [WEATHER]),
    ),
    "hermes, arguments as text": (
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>', ("", [WEATHER]),
    ),
    "hermes, its marker in an argument": (
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>\\"}"}}</tool_call>',
        ("", [("weather", '{"city": "</tool_call>\\"}"}')]),
    ),
    "llama3_json": (f'{{"name": "weather", "parameters": {CITY}}}', ("", [WEATHER])),
    "llama3_json, behind its tag, and another": (
        f'<|python_tag|>{{"name": "weather", "parameters": {CITY}}}; {{"type": "function", "name": "time.now", '
        '"parameters": {}}', ("", [WEATHER, ("time.now", "{}")]),
    ),
    "llama3_json, words before": (
        f'So:\n{{"name": "weather", "parameters": {CITY}}}', ("So:", [WEATHER]),
    ),
    "llama3_json, as for built-in tools": ('<|python_tag|>weather.call(city="Oslo")', ("", [WEATHER])),
    "mistral": (
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {CITY}, "id": "abcdefghi"}}, '
        '{"name": "time.now", "arguments": {}}]',
        ("", [WEATHER, ("time.now", "{}")]),
    ),
    "mistral, since version 11": (
        f"Well. [TOOL_CALLS]weather[ARGS]{CITY}[TOOL_CALLS]time.now[CALL_ID]abcdefghi[ARGS]{{}}",
        ("Well.", [WEATHER, ("time.now", "{}")]),
    ),
    "deepseek_v3": (
        DEEPSEEK.format(DEEPSEEK_CALL.format("weather", CITY) + "\n" + DEEPSEEK_CALL.format("time.now", "{}")),
        ("", [WEATHER, ("time.now", "{}")]),
    ),
    "qwen3_coder": (CODER, ("", [WEATHER])),
    "qwen3_coder, values by their types": (
        "<tool_call><function=weather><parameter=city>\n5\n</parameter><parameter=days>5</parameter>"
        '<parameter=at>{"lat": 1.5}</parameter><parameter=x>True</parameter></function></tool_call>',
        ("", [("weather", '{"city": "5", "days": 5, "at": {"lat": 1.5}, "x": true}')]),
    ),
    "qwen3_coder, half of a character, which a file can only hold escaped": (
        '<tool_call><function=weather><parameter=days>"\\ud800"</parameter></function></tool_call>',
        ("", [("weather", '{"days": "\\ud800"}')]),
    ),
    "qwen3_coder, a tag is missing": (CODER.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"),
        ("", [WEATHER])),
    "functiongemma": (
        "<start_function_call>call:weather{city:<escape>Oslo<escape>,at:{lat:1.5},days:null}<end_function_call>",
        ("", [("weather", '{"city": "Oslo", "at": {"lat": 1.5}, "days": null}')]),
    ),
    "gemma4": ('<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>', ("", [WEATHER])),
    "pythonic": ('[weather(city="Oslo"), time.now()]', ("", [WEATHER, ("time.now", "{}")])),
    "pythonic, literals": (
        "[weather(city='O\\'s\\u006co\\n', days=[1, -2.5e1, None], at={'lat': True, \"b\": (1,)})]",
        ("", [("weather", '{"city": "O\'slo\\n", "days": [1, -25.0, null], "at": {"lat": true, "b": [1]}}')]),
    ),
    "pythonic, in a fence": (
        '```tool_code\nprint(weather(city="Oslo"))\ntime.now()\n```', ("", [WEATHER, ("time.now", "{}")]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_calls_are_read_out_of_the_text(name):
    text, (content, called) = READ[name]
    assert read(form(name.split(",")[0]), [text]) == Parts("", content, calls(*called))


MALFORMED = {
    "hermes": (
        '<tool_call>{"name": "weather", "arguments": {"city": "Os',
        '<tool_call>{"name": "weather", "arguments": {"city": ',
        f'<tool_call>{{"name": "rain", "arguments": {CITY}}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>',
        "<tool_call>{'name': 'weather'}</tool_call>",
        '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>weather</tool_call> ",
        "<tool_call>",
        "<tool_",
        "</tool_call>",
        f'<tool_call>{{"name": "weather", "arguments": {CITY}}} and so on',
        "<tool_call>{" + '"a":{' * 5000,
        '<tool_call>{"name": "weather", "arguments": {"days": 1' + "0" * 9000 + "}}}",
    ),
    "llama3_json": (
        "for (;;) { f(); }",
        '{"name": "weather", "parameters": ',
        '{"name": "Anna", "age": 5}',
        "<|python_tag|>print(1)",
        '<|python_tag|>weather.call("Oslo")',
        '{"name": "x", "parameters": {"name": "weather", "parameters": {}}}',
        "{",
        "{}",
    ),
    "mistral": (
        "[TOOL_CALLS]",
        "[TOOL_CALLS] []",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {CITY}}}',
        '[TOOL_CALLS] [{"name": "weather", "arguments": {}}, {"name": "rain", "arguments": {}}]',
        "[TOOL_CALLS]rain[ARGS]{}",
        "[TOOL_CALLS]weather[ARGS]",
        "[TOOL_CALLS]weather[ARGS][1]",
        "[TOOL_CALLS]weather",
    ),
    "deepseek_v3": (
        DEEPSEEK.format(""),
        DEEPSEEK.format(DEEPSEEK_CALL.format("rain", "{}")),
        DEEPSEEK_CALL.format("weather", "{}"),
        DEEPSEEK.format(DEEPSEEK_CALL.format("weather", "[]"))[:-5],
        DEEPSEEK.format("Hm."),
    ),
    "qwen3_coder": (
        CODER[:40],
        CODER.replace("weather", "rain"),
        CODER.replace("</parameter>", ""),
        "<function=weather>\nHm.",
        "<tool_call>\n<function=weather",
    ),
    "functiongemma": (
        "<start_function_call>call:weather{city:Oslo}<end_function_call>",
        "<start_function_call>call:rain{}<end_function_call>",
        "<start_function_call>call:weather{city:<escape>Os",
        "<start_function_call>weather{}",
        "<start_function_call>call:weather{a:1,a:2}",
        "<start_function_call>call:weather{a:" + "[" * 5000,
        "<start_function_call>call:weather{a:1e999}<end_function_call>",
    ),
    "pythonic": (
        "[1, 2]",
        "[weather(city=Oslo)]",
        '[weather("Oslo")]',
        "[weather(city='Oslo'",
        "[rain()]",
        "[]",
        "[weather()",
        "Use [weather(city='Oslo')].",
        "```tool_code\nimport os\n```",
        "[weather(city='Oslo') weather()]",
    ),
}


@pytest.mark.parametrize(("syntax", "text"), [(name, text) for name, texts in MALFORMED.items() for text in texts])
def test_what_is_no_call_stays_content_as_it_was_written(syntax, text):
    assert read(form(syntax), [text]) == Parts("", text)


THINK = {
    "it opens the block": ("qwen3", "", "<think>\nHm.\n\nSo.\n</think>\n\nYes.", ("Hm.\n\nSo.", "Yes.")),
    "the prompt opened it": ("qwen3", "assistant\n<think>\n", "Hm.\n</think>\nYes.", ("Hm.", "Yes.")),
    "both do": ("deepseek_r1", "<think>\n", "<think>\nHm.</think>Yes.", ("Hm.", "Yes.")),
    "nobody does, and it ends": ("deepseek_r1", "", "Hm.</think>Yes.", ("Hm.", "Yes.")),
    "the prompt closed it": ("deepseek_r1", "<think>\n\n</think>\n\n", "Yes. <think>", ("", "Yes. <think>")),
    "a user's words are no block": ("qwen3", "Write <think> now<|im_end|>\n", "Yes.", ("", "Yes.")),
    "it does not think": ("qwen3", "", "  Yes. <think>No</think>", ("", "  Yes. <think>No</think>")),
    "it is cut off": ("qwen3", "", "<think>\nHm.\n</thi", ("Hm.\n</thi", "")),
    "before the tag is whole": ("qwen3", "", "\n<thi", ("", "\n<thi")),
    "nothing is thought": ("qwen3", "", "<think>\n\n</think>\n\nYes.", ("", "Yes.")),
    "with other tags": ("mistral", "", "[THINK]Hm.[/THINK]Yes.", ("Hm.", "Yes.")),
    "with Gemma's": ("gemma4", "", "<|channel>thought\nHm.<channel|>Yes.", ("Hm.", "Yes.")),
}  # fmt: skip


@pytest.mark.parametrize("name", THINK)
def test_reasoning_is_what_stands_before_the_answer(name):
    reasoning, prompt, text, (thought, said) = THINK[name]
    assert read(form(None, reasoning), [text], prompt) == Parts(thought, said)


def test_a_call_in_reasoning_is_thought_and_one_behind_it_is_made():
    call = READ["hermes"][0]
    assert read(form("hermes", "qwen3"), [f"<think>\n{call}\n</think>\n\n{call}"]) == Parts(call, "", calls(WEATHER))


@pytest.mark.parametrize(("begun", "thought"), [("<think>\nHm", " I see."), ("<think>a</think>b", ""), ("Yes", "")])
def test_an_answer_that_is_gone_on_with_has_begun_where_its_beginning_says(begun, thought):
    found = read(form(None, "qwen3", begun=begun), [" I see."])
    assert found == (Parts(thought) if thought else Parts("", " I see."))


def test_at_most_one_call_is_read_if_that_is_asked_for():
    use = read_tool_use([TOOL], None, parallel_tool_calls=False)
    call = READ["hermes"][0]
    assert read(form("hermes", use=use), [call + call]) == Parts("", call, calls(WEATHER))
    two = f"[TOOL_CALLS] [{', '.join([f'''{{"name": "weather", "arguments": {CITY}}}'''] * 2)}]"
    assert read(form("mistral", use=use), [two]) == Parts("", two)


def test_special_tokens_that_are_no_markers_are_in_no_part():
    ids = tokenizer().encode(f"a<|python_tag|>{READ['llama3_json'][0]}<|eot_id|><|im_end|>", add_special=False)
    parser = form("llama3_json").parser([], call_ids("x"))
    found = joined([parser.push([Piece(i, tokenizer().decode_token(i)) for i in ids]), parser.finish()])
    assert (found.content, found.tool_calls[0].arguments) == ("a", CITY)


def test_content_goes_out_at_once_but_for_what_may_begin_a_call():
    parser = form("hermes", "qwen3").parser([], call_ids("x"))
    given = [parser.push([Piece(-1, text)]) for text in ("<think>a", "b\n", "c</think>d", " <", "e <tool_", "call>{")]
    assert [(part.reasoning, part.content) for part in given] == [
        ("a", ""), ("b", ""), ("\nc", "d"), ("", ""), ("", " <e"), ("", ""),
    ]  # fmt: skip
    assert parser.finish().content == " <tool_call>{"


FRAGMENTS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        "a",
        '{"name": "weather", "arguments": {}}',
        "{",
        "}",
        '"',
        "\\",
        "[TOOL_CALLS]",
        "weather",
        "[ARGS]",
        "{}",
        "[",
        "]",
        "(",
        ")",
        "city=",
        '"Oslo"',
        "<|python_tag|>",
        ";",
        '{"name": "weather", "parameters": ',
        "<function=weather>",
        "<parameter=city>",
        "</parameter>",
        "</function>",
        ",",
        "<start_function_call>",
        "call:weather{",
        "city:",
        "<escape>",
        "<end_function_call>",
        "```tool_code\n",
        "```",
        ":",
        "<",
        "[THINK]",
        "[/THINK]",
        "ï",
        "'",
        "weather(",
        "print(",
        *(text for text, _ in READ.values()),
    ]
)


@given(
    st.lists(FRAGMENTS, max_size=8).map("".join),
    st.sampled_from([*SYNTAXES, None]),
    st.sampled_from([*REASONINGS, None]),
    st.randoms(use_true_random=False),
)
def test_however_a_text_is_cut_its_parts_are_the_same_and_nothing_is_lost(text, syntax, reasoning, random):
    one = form(syntax, reasoning)
    whole = read(one, [text])
    cuts = sorted({0, len(text), *(random.randrange(len(text) + 1) for _ in range(random.randrange(6)))})
    assert read(one, [text[a:b] for a, b in itertools.pairwise(cuts)]) == whole
    assert read(one, text) == whole
    if not whole.tool_calls and not whole.reasoning:
        left = whole.content.replace("\n", "")
        for tag in one.tags.markers if one.tags else ():
            text = text.replace(tag, "")
            left = left.replace(tag, "")
        assert left == text.replace("\n", "")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(-1e6, 1e6)
    | st.text("aé\"'\\ {}<>:,[]\n/", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("ab_", min_size=1, max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
ARGUMENTS = st.fixed_dictionaries({"city": st.text("aé\"'\\ {}<>:,[]\n/", max_size=8)}, optional={"days": VALUES})


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(st.lists(ARGUMENTS, min_size=1, max_size=2))
def test_what_a_template_writes_for_calls_is_read_back(family, given):
    if family == "llama3_1":
        given = given[:1]  # it writes one call
    template = chat_template(family)
    made = [
        {"id": f"glacier{number:02}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for number, arguments in enumerate(given)
    ]
    asked, turn = {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": made}
    prompt = template.render([asked], tools=[TOOL, OTHER])
    written = template.render([asked, turn], tools=[TOOL, OTHER], add_generation_prompt=False).removeprefix(prompt)
    answer = written.split("<|im_end|>")[0].split("<|eot_id|>")[0]
    found = read(ChatFormat(tokenizer(), template).answers([asked], USE, {}), [answer])
    assert [(call.name, json.loads(call.arguments)) for call in found.tool_calls] == [("weather", one) for one in given]
    assert (found.content, found.reasoning) == ("", "")
