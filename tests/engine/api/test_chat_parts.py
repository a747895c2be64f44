"""Answers to conversations in their parts, on every way to callers, without an engine; plain prompts have none."""

import asyncio

import pytest
from helpers.fake_core import CONFIG, FakeCore, make_fake
from helpers.harmony import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from twinmesh import LLM, AsyncLLM, RequestOutputKind, SamplingParams
from twinmesh.engine.api.detokenizer import Detokenizer, StopSearch
from twinmesh.engine.chat.answers import call_ids, joined
from twinmesh.engine.chat.harmony_parser import HarmonyFormat
from twinmesh.engine.chat.reader import AnswerReader

TOKENIZER = byte_tokenizer()
TEMPLATE = "<|start|>user<|message|>{{ messages[0].content }}<|end|>{{ '<|start|>assistant' if add_generation_prompt }}"
CHAT = [{"role": "user", "content": "q"}]
ANSWER = "<|channel|>analysis<|message|>Hm ï.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"


def ids(text):
    return TOKENIZER.encode(text, add_special=False)


def end(core, name, text, **fields):
    """Send an answer token by token; its last one ends it, unless `fields` say otherwise."""
    for token in ids(text)[:-1]:
        core.send(name, [token])
    core.send(name, ids(text)[-1:], **({"finish_reason": "stop"} | fields))


@pytest.fixture
def core():
    return FakeCore()


@pytest.fixture
def llm(core):
    return make_fake(LLM, core, template=TEMPLATE, tokenizer=TOKENIZER, config=CONFIG)


def deltas(llm, core, text, params=None, **fields):
    stream = llm.stream_chat(CHAT, params)
    end(core, stream.request_id, text, **fields)
    return list(stream), stream.result().outputs[0]


def test_a_stream_gives_each_part_as_it_comes_and_the_text_as_before(llm, core):
    steps, output = deltas(llm, core, ANSWER)
    assert "".join(step.text for step in steps) == output.text == "analysisHm ï.assistantfinalYes."
    assert [step.reasoning for step in steps if step.reasoning] == ["H", "m", " ", "ï", "."]
    assert "".join(step.content for step in steps) == "Yes."
    assert (output.reasoning, output.content, output.tool_calls) == ("Hm ï.", "Yes.", ())


def test_parts_of_a_call_have_its_id_and_its_name(llm, core):
    steps, output = deltas(llm, core, CALL)
    new = [call for step in steps for call in step.tool_calls]
    assert [(call.name, call.arguments) for call in new] == [("f", ""), ("f", "{"), ("f", "}")]
    assert {call.id for call in new} == {output.tool_calls[0].id}
    assert (output.tool_calls[0].name, output.tool_calls[0].arguments) == ("f", "{}")
    assert (output.reasoning, output.content, output.finish_reason) == ("", "", "stop")


def test_calls_of_two_answers_have_different_ids(llm, core):
    assert deltas(llm, core, CALL)[1].tool_calls[0].id != deltas(llm, core, CALL)[1].tool_calls[0].id


@pytest.mark.parametrize("asks", [{"skip_special_tokens": False}, {"include_stop_str_in_output": True}])
def test_what_the_text_holds_changes_no_part(llm, core, asks):
    _, output = deltas(llm, core, ANSWER, SamplingParams(**asks))
    assert (output.reasoning, output.content) == ("Hm ï.", "Yes.")


def test_a_token_that_the_caller_wants_to_stop_at_is_in_no_part(llm, core):
    (dot,) = ids(".")
    params = SamplingParams(stop_token_ids=[dot])
    text = "<|channel|>final<|message|>Yes."
    assert deltas(llm, core, text, params, stop_reason=dot)[1].content == "Yes"


def test_a_stop_string_cuts_parts_where_it_cuts_the_text(llm, core):
    stream = llm.stream_chat(CHAT, SamplingParams(stop=["Yes"]))
    text = ANSWER.removesuffix(".<|return|>")
    end(core, stream.request_id, text, stop_reason="Yes")
    steps, output = list(stream), stream.result().outputs[0]
    assert output.text == "analysisHm ï.assistantfinal"
    assert (output.reasoning, output.content) == ("Hm ï.", "")
    assert "Y" not in "".join(step.content for step in steps)


def test_without_text_and_without_a_chat_there_are_no_parts(llm, core):
    for stream in (llm.stream_chat(CHAT, SamplingParams(detokenize=False)), llm.stream("q")):
        end(core, stream.request_id, ANSWER)
        steps, output = list(stream), stream.result().outputs[0]
        assert {(step.reasoning, step.content, step.tool_calls) for step in steps} == {(None, None, None)}
        assert (output.reasoning, output.content, output.tool_calls) == (None, None, None)


def test_a_model_whose_format_is_not_known_gives_no_parts():
    llm = make_fake(LLM, FakeCore(answers=True), template="{{ messages[0].content }}")
    (output,) = llm.chat([{"role": "user", "content": "the sea"}])
    assert output.outputs[0].text
    assert output.outputs[0].tool_calls is None


def test_chat_gives_whole_outputs_with_parts():
    llm = make_fake(LLM, FakeCore(answers=True), template=TEMPLATE, tokenizer=TOKENIZER)
    outputs = llm.chat([CHAT, CHAT], SamplingParams(max_tokens=30))  # the fake repeats the prompt
    assert [output.outputs[0].content for output in outputs] == ["q", "q"]
    assert outputs[0].outputs[0].text == "userqassistant"


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_coroutines_get_parts_so_far_or_what_is_new(kind):
    async def follow():
        core = FakeCore()
        llm = make_fake(AsyncLLM, core, template=TEMPLATE, tokenizer=TOKENIZER)
        asked = llm.chat(CHAT, SamplingParams(output_kind=kind), "mine")
        first = asyncio.ensure_future(anext(asked))
        while not core.running:
            await asyncio.sleep(0)
        end(core, "mine", ANSWER)
        return [await first, *[output async for output in asked]]

    found = [output.outputs[0] for output in asyncio.run(follow())]
    if kind is RequestOutputKind.DELTA:
        assert ("".join(o.reasoning for o in found), "".join(o.content for o in found)) == ("Hm ï.", "Yes.")
    else:
        assert (found[-1].reasoning, found[-1].content) == ("Hm ï.", "Yes.")


def test_a_running_output_keeps_its_parts_while_the_answer_grows():
    async def follow():
        core = FakeCore()
        asked = make_fake(AsyncLLM, core, template=TEMPLATE, tokenizer=TOKENIZER).chat(CHAT, None, "mine")
        early = asyncio.ensure_future(anext(asked))
        while not core.running:
            await asyncio.sleep(0)
        core.send("mine", ids("<|channel|>analysis<|message|>ab"))
        early = (await early).outputs[0]
        end(core, "mine", "c<|end|><|start|>assistant<|channel|>final<|message|>d", finish_reason="length")
        return early, [output async for output in asked][-1].outputs[0]

    early, late = asyncio.run(follow())
    assert (early.reasoning, early.content, early.tool_calls) == ("ab", "", ())
    assert (late.reasoning, late.content) == ("abc", "d")


TEXTS = st.lists(st.sampled_from(["ab", "ï", "b", "a", "€", " "]), max_size=8).map("".join)


@given(TEXTS, TEXTS, st.sampled_from(["ab", "ba", "ïb", "€"]), st.booleans())
def test_parts_end_with_the_text_wherever_a_stop_string_begins(thought, said, stop, skip_special):
    """The content is what is left of the text behind the content's beginning."""
    text = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{said}"
    shown, cut, taken = run_with_stop(ids(text), stop, skip_special)
    head = text[: text.rindex("<|message|>") + len("<|message|>")]
    before = len(TOKENIZER.decode(ids(head), skip_special=skip_special))
    assert taken.content == shown[before:]
    assert cut or taken.reasoning == thought


def run_with_stop(tokens, stop, skip_special):
    """Detokenise as the collector does, with text held back; return the text, whether it was cut, and the parts."""
    prompt = ids("<|start|>assistant")
    reader = AnswerReader(
        HarmonyFormat(TOKENIZER, TOKENIZER.harmony).parser(prompt, call_ids("x")), TOKENIZER, prompt,
        may_stop=True, skip_special=skip_special,
    )  # fmt: skip
    search = StopSearch(TOKENIZER, [stop], min_tokens=0, skip_special=skip_special, after=prompt)
    text, shown, parts = Detokenizer(TOKENIZER, [stop], skip_special=skip_special, after=prompt), "", []
    for number, token in enumerate(tokens):
        is_cut = search.push(token) is not None
        is_last = is_cut or number == len(tokens) - 1
        new = text.push([token]) + (text.finish() if is_last else "")
        shown += new
        parts.append(reader.finish([token], new, is_cut=is_cut) if is_last else reader.push([token], new))
        if is_last:
            return shown, is_cut, joined(parts)
    raise AssertionError("an answer has a token")
