"""Tools in conversations: which are taken, what is called and what is thought, on every way to callers."""

import asyncio
import dataclasses

import pytest
from helpers.chat_families import OTHER, TOOL, source, tokenizer
from helpers.fake_core import CONFIG, FakeCore, make_fake
from twinmesh import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from twinmesh.engine.chat.chat_format import ChatFormat
from twinmesh.engine.options import EngineOptions
from twinmesh.models.text.chat import ChatTemplate

CHAT = [{"role": "user", "content": "q"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
THOUGHT = f"<think>\nHm.\n</think>\n\nSo.\n{CALL}"
LONG = dataclasses.replace(CONFIG, max_model_len=4096)


def make(kind=LLM, core=None, template="qwen3", config=LONG, **options):
    return make_fake(
        kind, core or FakeCore(), template=source(template), tokenizer=tokenizer(), config=config, **options
    )


def end(core, name, text, **fields):
    """Send an answer token by token, and the end of the turn, unless `fields` say how it ends."""
    ids = tokenizer().encode(text + ("" if fields else "<|im_end|>"), add_special=False)
    for token in ids[:-1]:
        core.send(name, [token])
    core.send(name, ids[-1:], **({"finish_reason": "stop"} | fields))


def answered(text, *, tools=(TOOL, OTHER), params=None, template="qwen3", config=LONG, seed=0, **asks):
    """What a stream of this answer gives, step by step, and the whole."""
    core = FakeCore()
    llm = make(core=core, template=template, config=config, seed=seed)
    stream = llm.stream_chat(CHAT, params, tools=list(tools), **asks)
    end(core, stream.request_id, text)
    return list(stream), stream.result().outputs[0]


def test_reasoning_words_and_calls_come_apart_as_they_are_written():
    steps, output = answered(THOUGHT)
    (call,) = output.tool_calls
    assert (output.reasoning, output.content, output.finish_reason) == ("Hm.", "So.", "stop")
    assert (call.name, call.arguments) == ("weather", '{"city": "Oslo"}')
    assert [step.reasoning for step in steps if step.reasoning] == ["H", "m", "."]
    assert [step.content for step in steps if step.content] == ["S", "o", "."]
    assert [made for step in steps for made in step.tool_calls] == [call]
    assert "".join(step.text for step in steps) == output.text == THOUGHT


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_coroutines_get_them_too(kind):
    async def follow():
        core = FakeCore()
        params = SamplingParams(output_kind=kind)
        asked = make(AsyncLLM, core).chat(CHAT, params, "mine", tools=[TOOL], tool_choice="auto")
        first = asyncio.ensure_future(anext(asked))
        while not core.running:
            await asyncio.sleep(0)
        end(core, "mine", THOUGHT)
        return [await first, *[output async for output in asked]]

    found = [output.outputs[0] for output in asyncio.run(follow())]
    calls = [call.name for output in found for call in output.tool_calls]
    assert calls[-1:] == ["weather"]
    assert kind is not RequestOutputKind.DELTA or calls == ["weather"]


@pytest.mark.parametrize("asks", [{"tool_choice": "none"}, {"tools": ()}, {"tools": [OTHER]}])
def test_where_nothing_of_that_name_may_be_called_a_call_is_content(asks):
    output = answered(CALL, **asks)[1]
    assert (output.content, output.tool_calls) == (CALL, ())


def test_at_most_one_is_called_where_several_at_a_time_are_not_wanted():
    output = answered(f"{CALL}\n{CALL}", parallel_tool_calls=False)[1]
    assert (len(output.tool_calls), output.content) == (1, CALL)


def test_an_answer_that_was_cut_off_says_so_and_its_call_is_content():
    core = FakeCore()
    llm = make(core=core)
    stream = llm.stream_chat(CHAT, tools=[TOOL])
    end(core, stream.request_id, CALL[:40], finish_reason="length")
    output = stream.result().outputs[0]
    assert (output.finish_reason, output.content, output.tool_calls) == ("length", CALL[:40], ())


def test_a_stop_string_ends_a_call_that_is_not_whole():
    core = FakeCore()
    llm = make(core=core)
    stream = llm.stream_chat(CHAT, SamplingParams(stop=["Oslo"]), tools=[TOOL])
    end(core, stream.request_id, CALL[: CALL.index("Oslo") + 4], stop_reason="Oslo")
    output = stream.result().outputs[0]
    assert (output.content, output.tool_calls) == (CALL[: CALL.index("Oslo")], ())


def test_ids_are_the_same_when_a_deterministic_run_is_repeated_and_else_nobody_elses():
    def ids(config, seed=0):
        core = FakeCore()
        llm = make(core=core, config=config, seed=seed)
        found = []
        for _ in range(2):
            stream = llm.stream_chat(CHAT, tools=[TOOL])
            end(core, stream.request_id, f"{CALL}\n{CALL}")
            found += [call.id for call in stream.result().outputs[0].tool_calls]
        return found

    again = dataclasses.replace(LONG, deterministic=True, prefill_buckets=(16,), decode_buckets=(32,))
    assert ids(again) == ids(again) != ids(again, seed=1)
    assert len({*ids(again), *ids(LONG), *ids(LONG)}) == 12


def test_completions_of_one_request_name_their_calls_apart():
    core = FakeCore()
    llm = make(core=core)
    stream = llm.stream_chat(CHAT, SamplingParams(n=2), tools=[TOOL])
    for sequence in list(core.running):
        end(core, sequence, CALL)
    first, second = stream.result().outputs
    assert first.tool_calls[0].id != second.tool_calls[0].id


def test_a_conversation_goes_on_with_what_was_called():
    _, output = answered(THOUGHT)
    made = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in output.tool_calls
    ]
    llm = make()
    for name in ("reasoning", "reasoning_content", "thinking"):
        turn = {"role": "assistant", "content": output.content, name: output.reasoning, "tool_calls": made}
        result = {"role": "tool", "tool_call_id": made[0]["id"], "content": "7"}
        text = tokenizer().decode(llm.chat_prompt([*CHAT, turn, result], [TOOL]), skip_special=False)
        assert THOUGHT in text


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        ({"tools": [TOOL, OTHER, TOOL]}, "Tools 0 and 2 are both called 'weather': give each its own name."),
        ({"tools": [TOOL, {"type": "function", "function": {"name": ""}}]}, "Tool 1 has no name: write "),
        ({"tools": [{"name": 3}]}, "Tool 0 has no name"),
        ({"tools": [{"type": "web_search"}]}, "Tool 0 is of type 'web_search': only functions"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice='always' is not usable: it must be 'auto', 'none',"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}}, "is not usable: it must be"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "rain"}}},
            "tool_choice names the function 'rain', which is not among the tools: name one of 'weather'.",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice='required' needs tools to choose from"),
        ({"tools": [TOOL], "parallel_tool_calls": 2}, "parallel_tool_calls=2 is not usable"),
        ({"tools": [{"name": "f", "parameters": []}]}, "Tool 0 ('f') has 'parameters' that are no JSON schema of an "),
        ({"tools": [{"name": "f", "parameters": {"type": "array"}}]}, "its type is 'array', not 'object'"),
        (
            {"tools": [{"name": "f", "parameters": {"properties": []}}]},
            "has 'properties': [], not an object",
        ),
        (
            {"tools": [{"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}]},
            "parameters.properties.a has the type 'text', which JSON does not have",
        ),
        ({"tools": [{"name": "f", "parameters": {"required": "a"}}]}, "has 'required': 'a', not a list of names"),
        (
            {"tools": [{"name": "f", "parameters": {"properties": {"a": {"items": {"anyOf": [5]}}}}}]},
            "parameters.properties.a.items.anyOf.0 is 5, not an object",
        ),
    ],
)
def test_tools_that_cannot_be_called_are_refused_before_anything_runs(asks, says):
    core = FakeCore()
    llm = make(core=core)
    for start in (llm.chat, llm.stream_chat):
        with pytest.raises(ValueError, match=r"\.$") as refused:
            start(CHAT, **asks)
        assert says in str(refused.value)
    assert core.batches == []


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_parameters_of_another_type_are_refused_where_tools_have_to_be_called_too(choice):
    llm, wrong = make(), {"temperature": 0}
    asks = dict(tools=[TOOL], tool_choice=choice)
    for start in (lambda: llm.chat(CHAT, [wrong], **asks), lambda: llm.stream_chat(CHAT, wrong, **asks)):
        with pytest.raises(ValueError, match=r"^sampling_params of type dict are not usable: give SamplingParams\.$"):
            start()


def fits(template, calls=None, thoughts=None):
    return ChatFormat(tokenizer(), ChatTemplate(template, tokenizer(), name="tiny"), calls, thoughts)


@pytest.mark.parametrize(
    ("calls", "thoughts", "template", "says"),
    [
        ("mistral", None, "qwen3", "which writes calls as 'hermes' reads them: leave it out."),
        ("hermes", None, "smollm2", "which writes no calls of that form: leave it out."),
        ("openai", None, "qwen3", "it is for models with harmony's markers."),
        (None, "mistral", "qwen3", "neither that nor the vocabulary has [THINK] and [/THINK]; leave it out."),
        (None, "openai_gptoss", "qwen3", "it is for models with harmony's markers."),
    ],
)
def test_a_parser_that_does_not_fit_the_template_is_refused(calls, thoughts, template, says):
    with pytest.raises(ValueError, match=r"\.$") as refused:
        fits(source(template), calls, thoughts)
    assert str(refused.value).endswith(says)
    assert "of tiny" in str(refused.value)


def test_parsers_that_fit_may_be_asked_for_by_all_their_names():
    for calls in ("hermes", "qwen3_json"):
        fits(source("qwen3"), calls, "deepseek_r1")
    fits("{{ tools }}{{ messages[0].content }}", "pythonic", "qwen3")  # whose vocabulary has <think>


def test_an_option_names_the_parsers_that_there_are():
    with pytest.raises(ValueError, match=r"tool_call_parser='granite' is not usable: use one of deepseek_v3, .*openai"):
        EngineOptions("m", tool_call_parser="granite")
    with pytest.raises(ValueError, match=r"reasoning_parser='think' is not usable: use one of deepseek_r1, gemma4"):
        EngineOptions("m", reasoning_parser="think")


def test_a_template_that_is_given_decides_how_its_answers_are_read():
    core = FakeCore()
    llm = make(core=core)
    stream = llm.stream_chat(CHAT, tools=[TOOL], chat_template=source("mistral"))
    end(core, stream.request_id, '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}')
    assert [call.name for call in stream.result().outputs[0].tool_calls] == ["weather"]
