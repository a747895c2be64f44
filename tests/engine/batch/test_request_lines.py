"""Lines of a batch file: what they ask for, and what is refused."""

import json

import pytest
from helpers.batch_files import DEFAULTS, BatchFiles, chat_line
from twinmesh import StructuredOutputsParams
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.request_lines import BatchLineError, line_seed, parse_line, read_custom_id
from twinmesh.models.errors import ChatTemplateError
from twinmesh.models.text.chat import ChatTemplate


def parsed(fields, line=1, defaults=DEFAULTS):
    return parse_line(json.dumps(fields).encode(), line, defaults)


def test_a_line_overrides_the_defaults_and_null_does_not():
    fields = {"prompt": "x", "temperature": 0.5, "top_k": 3, "max_tokens": None, "seed": 1}
    assert parsed(fields).sampling_params == SamplingParams(temperature=0.5, top_k=3, max_tokens=8, seed=1)


def test_every_way_of_sampling_may_be_asked_for():
    asked = {
        "n": 2,
        "stop": ["\n"],
        "min_p": 0.1,
        "presence_penalty": 1,
        "min_tokens": 2,
        "bad_words": ["no"],
        "seed": 3,
    }
    params = parsed({"prompt": "x", **asked, "logit_bias": {"5": -100, "7": 1.5}}).sampling_params
    assert params == SamplingParams(temperature=0.0, max_tokens=8, **asked, logit_bias={5: -100, 7: 1.5})


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_token_limit_are_read(name):
    assert parsed(chat_line("a", **{name: 7})).sampling_params.max_tokens == 7


def test_lines_without_a_seed_draw_one_each_from_the_runs_and_from_their_number():
    defaults = SamplingParams(seed=9)
    seeds = [parsed({"prompt": "x"}, line, defaults).sampling_params.seed for line in range(1, 1000)]
    assert len(set(seeds)) == len(seeds)
    assert seeds[6] == parsed({"prompt": "y"}, 7, defaults).sampling_params.seed == line_seed(9, 7)
    assert seeds[6] != line_seed(10, 7)
    assert parsed({"prompt": "x", "seed": 5}, 3, defaults).sampling_params.seed == 5


def test_a_run_without_a_seed_draws_the_same_in_every_start():
    assert parsed({"prompt": "x"}, 7, SamplingParams()).sampling_params.seed == line_seed(0, 7)


def test_a_list_of_one_prompt_is_that_prompt():
    assert parsed({"prompt": ["one text"]}).prompt == "one text"
    assert parsed({"prompt": [[5, 6]]}).prompt == [5, 6]
    assert parsed({"prompt": [5]}).prompt == [5]


def test_answers_that_were_copied_from_a_response_are_messages_without_what_holds_nothing():
    empty = {"annotations": [], "refusal": None, "tool_calls": [], "function_call": None, "audio": None}
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    messages = [{"role": "user", "content": "2+2?"}, {**answer, **empty}, {"role": "assistant", "content": None}]
    assert parsed({"messages": messages}).messages == [messages[0], answer, {"role": "assistant"}]


def test_what_a_response_may_hold_goes_to_the_chat_template_which_says_what_it_cannot_take():
    held = {"refusal": "no", "annotations": [{"type": "url_citation"}], "audio": {"id": "1"}, "function_call": {"a": 1}}
    thought = {"reasoning": "a", "reasoning_content": "a", "thinking": "a"}
    answer = {"role": "assistant", **held, **thought}
    assert parsed({"messages": [{**answer, "content": None}]}).messages == [answer]


def test_a_line_says_how_its_conversation_is_rendered():
    options = {
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": False,
        "continue_final_message": True,
        "chat_template": "{{ messages }}",
        "reasoning_effort": "low",
    }
    assert parsed(chat_line("a", **options)).rendering == options
    assert parsed(chat_line("a", **dict.fromkeys(options))).rendering == {}
    assert parsed({"prompt": "x", **dict.fromkeys(options)}).rendering == {}


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "prompt": "b"}',
        '{"custom_id": "a", "prompt": "x", "custom_id": "b"}',
        '{"messages": [{"role": "user", "content": "a", "role": "user"}]}',
    ],
)
def test_a_key_that_is_there_twice_is_an_error_and_not_its_last_value(text):
    with pytest.raises(BatchLineError, match=r"^line 3: the key '(prompt|custom_id|role)' is there twice") as caught:
        parse_line(text.encode(), 3, DEFAULTS)
    assert caught.value.custom_id == read_custom_id(text.encode(), 3) == "line-3"


def test_fields_that_ask_for_nothing_or_do_not_matter_are_accepted():
    neutral = {
        "best_of": 1,
        "stream_options": {"include_usage": True},
        "stream": False,
        "stop": [],
        "logprobs": None,
        "presence_penalty": 0,
        "tools": [],
        "tool_choice": "none",
    }
    idle = {"user": "me", "metadata": {"a": "b"}, "response_format": {"type": "text"}, "prompt_cache_key": "k"}
    assert parsed(chat_line("a", **neutral, **idle)).custom_id == "a"
    assert parsed({"prompt": "x", "n": 2, "best_of": 2}).sampling_params.n == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "x", "n": 0}, "n=0"),
        ({"prompt": "x", "n": True}, "n=True"),
        ({"prompt": "x", "best_of": 2}, "best_of=2 is not supported"),
        ({"prompt": "x", "best_of": 1, "n": 2}, "best_of=1 is not usable: it must be at least n=2"),
        ({"prompt": "x", "best_of": "1"}, "best_of='1'"),
        ({"prompt": "x", "best_of": True}, "best_of=True"),
        ({"prompt": "x", "logprobs": 0}, "logprobs=0"),
        ({"prompt": "x", "prompt_logprobs": 1}, "'prompt_logprobs'"),
        ({"prompt": "x", "stop": [""]}, "stop=''"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty=3"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias='a'"),
        ({"prompt": "x", "logit_bias": [1]}, "logit_bias=[1]"),
        ({"prompt": "x", "temprature": 0.5}, "'temprature'"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": ""}, "'prompt'"),
        ({"prompt": ["a", "b"]}, "'prompt' holds 2 prompts: put each on a line of its own."),
        ({"prompt": [[1], [2]]}, "'prompt' holds 2 prompts"),
        ({"prompt": []}, "'prompt' must be"),
        ({"prompt": [""]}, "'prompt' must be"),
        ({"prompt": [["a"]]}, "'prompt' must be"),
        ({"prompt": ["a", 1]}, "'prompt' must be"),
        ({"prompt": [True]}, "'prompt'"),
        ({"max_tokens": 3}, "no prompt"),
        ({"messages": []}, "no messages"),
        ({"messages": ["hi"]}, "message 0"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "'weight' in message 0"),
        (
            {"messages": [{}], "chat_template_kwargs": [1]},
            "chat_template_kwargs=[1] is not usable: it must be an object",
        ),
        ({"messages": [{}], "chat_template_kwargs": "{}"}, "chat_template_kwargs='{}'"),
        ({"messages": [{}], "chat_template": 3}, "chat_template=3 is not usable: it must be a text"),
        ({"messages": [{}], "add_generation_prompt": 0}, "add_generation_prompt=0 is not usable: it must be true or"),
        ({"messages": [{}], "continue_final_message": "content"}, "continue_final_message='content'"),
        ({"messages": [{}], "reasoning_effort": 1}, "reasoning_effort=1 is not usable: it must be a text"),
        ({"prompt": "x", "reasoning_effort": "low"}, "'reasoning_effort' is not supported here"),
        ({"prompt": "x", "chat_template_kwargs": {}}, "'chat_template_kwargs' is not supported here"),
        ({"prompt": "x", "add_generation_prompt": True}, "'add_generation_prompt' is not supported here"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": {}}, "'tools'"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": ["f"]}, "'tools'"),
        ({"prompt": "x", "tool_choice": "required"}, "tool_choice='required'"),
        ({"prompt": "x", "tools": [{}]}, "'tools'"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "3"}, "max_tokens"),
        ({"prompt": "x", "ignore_eos": "yes"}, "ignore_eos"),
        ({"prompt": "x", "stop_token_ids": 2}, "stop_token_ids"),
        ({"prompt": "x", "stop_token_ids": ["2"]}, "stop_token_ids"),
        ({"prompt": "x", "max_tokens": 1, "max_completion_tokens": 2}, "differ"),
        ({"prompt": "x", "custom_id": 4}, "custom_id=4"),
        ({"prompt": "x", "model": 4}, "model=4"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "/v1/embeddings"),
        ({"custom_id": "a", "url": "/v1/completions", "body": 3}, "'body'"),
        ({"custom_id": "a", "url": "/v1/completions"}, "'body'"),
        ({"custom_id": "a", "url": "/v1/completions", "method": "GET", "body": {}}, "method='GET'"),
        ({"url": "/v1/completions", "body": {"prompt": "x"}, "temperature": 0}, "'temperature'"),
        ([1], "a list"),
        (None, "missing"),
    ],
)
def test_what_cannot_be_run_as_asked_is_refused_by_name(fields, says):
    with pytest.raises(BatchLineError) as caught:
        parsed(fields, line=7)
    assert str(caught.value).startswith("line 7: ")
    assert says in str(caught.value)
    assert caught.value.code == "invalid_request"


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("text", "column"),
    [
        (BOM + b'{"prompt": "a"}', 1),
        (BOM, 1),
        (BOM + b'{"custom_id": "a", "prompt": "b"}', 1),
        (b'{"prompt": "a"}' + BOM + b'{"prompt": "b"}', 16),
        (b'{"prompt": "a"} ' + BOM, 17),
        (b'{"prompt":' + BOM + b'"a"}', 11),
    ],
)
def test_a_byte_order_mark_on_a_later_line_is_named(text, column):
    says = f"line 2: a byte order mark (EF BB BF) stands at column {column}, as where files were joined: remove it, and"
    with pytest.raises(BatchLineError) as refused:
        parse_line(text, 2, DEFAULTS)
    assert str(refused.value).startswith(says)
    assert read_custom_id(text, 2) == refused.value.custom_id == "line-2"


def test_the_sign_of_a_byte_order_mark_in_a_text_is_a_character_like_others():
    assert parsed({"prompt": "\ufeffa\ufeff"}).prompt == "\ufeffa\ufeff"


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(BatchLineError, match=r"^line 2: "):
        parse_line(text, 2, DEFAULTS)


def nested(depth, is_list=False):
    """JSON of so many levels, as text: there are depths that Python's reader reaches and other functions do not."""
    start, end = ("[", "]") if is_list else ('{"a":', "}")
    return start * depth + "1" + end * depth


DEEP = {
    "content": '"messages": [{"role": "user", "content": VALUE}]',
    "arguments": '"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": VALUE}}]}]',
    "tools": '"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": VALUE}]',
    "variables": '"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": VALUE',
    "prompt": '"prompt": VALUE',
    "stop": '"prompt": "a", "stop": VALUE',
    "logit_bias": '"prompt": "a", "logit_bias": VALUE',
    "metadata": '"prompt": "a", "metadata": VALUE',
    "body": '"method": "POST", "url": "/v1/completions", "body": VALUE',
    "an unknown field": '"prompt": "a", "whatever": VALUE',
}


@pytest.mark.parametrize("place", DEEP)
@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("depth", [150, 600, 1000, 2500, 9000, 200_000])
def test_a_line_that_is_nested_too_deeply_is_refused_here_or_where_its_place_is_read(place, is_list, depth):
    line = '{"custom_id": "deep", ' + DEEP[place].replace("VALUE", nested(depth, is_list)) + "}"
    request = refused = None
    try:
        request = parse_line(line.encode(), 1, DEFAULTS)
    except BatchLineError as error:
        refused = error
    if refused is not None:
        assert str(refused).startswith("line 1: ")
        assert refused.custom_id in ("deep", "line-1")  # whether JSON itself could be read
        return
    if request.messages is None:
        assert place == "metadata"  # which is not looked at
        return
    with pytest.raises(ChatTemplateError, match=r"nested too deeply|needs a string under 'content'|not an object"):
        ChatTemplate("{{ messages[0].content }}{{ tools }}{{ a }}", None, name="T").render(
            request.messages, tools=request.tools, **request.rendering
        )


@pytest.mark.parametrize("place", ["prompt", "stop", "logit_bias", "body", "an unknown field"])
def test_such_a_line_is_an_error_of_its_own(tmp_path, place):
    line = '{"custom_id": "deep", ' + DEEP[place].replace("VALUE", nested(1000)) + "}"
    files = BatchFiles(tmp_path)
    files.run([line, {"prompt": "b", "custom_id": "b"}])
    found = {each["custom_id"]: each for each in files.read()}
    assert found["b"]["response"]["body"]["choices"][0]["text"] == "b"
    assert found["deep"]["error"]["message"].startswith("line 1: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "temperature": "x" * 100_000},
        {"prompt": "a", "stop": [5] * 100_000},
        {"prompt": "a", "x" * 100_000: 1},
        {"prompt": "a", "tool_choice": "x" * 100_000},
        {"prompt": "a", "logit_bias": {"x" * 100_000: 1}},
        {"prompt": "a", "model": [0] * 100_000},
        {"custom_id": ["x" * 100_000], "prompt": "a"},
        {"url": "x" * 100_000, "body": {"prompt": "a"}},
    ],
    ids=lambda fields: ",".join(name[:20] for name in fields),
)
def test_a_value_of_any_length_makes_no_long_message(fields):
    with pytest.raises(BatchLineError) as refused:
        parsed(fields)
    assert len(str(refused.value)) < 1100
    assert str(refused.value).startswith("line 1: ")
    assert str(refused.value).endswith(".")


# ---- what answers keep to

SCHEMA = {"type": "object", "properties": {"a": {"const": None}}}


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, {"json": SCHEMA}),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, {"regex": "a+"}),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
         {"json": SCHEMA, "disable_any_whitespace": True}),
    ],
)  # fmt: skip
def test_a_line_says_what_its_answer_keeps_to(fields, asked):
    line = json.dumps({"prompt": "a", **fields}).encode()
    assert parse_line(line, 1, SamplingParams()).sampling_params.structured_outputs == StructuredOutputsParams(**asked)


def test_a_line_that_asks_for_text_keeps_to_nothing_that_the_defaults_ask_for():
    defaults = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    assert parsed({"prompt": "a"}, defaults=defaults).sampling_params.structured_outputs is not None
    text = parsed({"prompt": "a", "response_format": {"type": "text"}}, defaults=defaults)
    assert text.sampling_params.structured_outputs is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": "json"}, 'response_format=\'json\' is not usable: it must be {"type": "json_object"}, '),
        ({"response_format": {"type": "yaml"}}, "is not usable: it must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format has no schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "has 'schema', which json_object has not"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "sort": 1}}}, "has 'sort'"),
        ({"structured_outputs": "a+"}, "structured_outputs is a text, not an object"),
        ({"structured_outputs": {"regexp": "a+"}}, "structured_outputs has no 'regexp'"),
        ({"structured_outputs": {"regex": "a+", "choice": ["b"]}}, "has regex and choice: give one"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "leave one out"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "leave ignore_eos out"),
    ],
)
def test_a_line_whose_answer_cannot_keep_to_it_is_an_error(fields, message):
    with pytest.raises(BatchLineError, match=r"^line 4: ") as raised:
        parse_line(json.dumps({"prompt": "a", **fields}).encode(), 4, SamplingParams())
    assert message in str(raised.value)
    assert raised.value.code == "invalid_request"
