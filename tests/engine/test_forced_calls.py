"""Answers that have to call tools, through whole engines: whatever happens to a request, it calls what it has to.

The tiny model's weights are random, so nothing but the grammar makes an answer a call.
"""

import json

import jsonschema
import pytest
from helpers.chat_families import source
from twinmesh import SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
PET = {"type": "function", "function": {"name": "pet", "parameters": SCHEMA}}
NAP = {"type": "function", "function": {"name": "nap", "parameters": {"type": "object", "additionalProperties": False}}}
NAMED = {"type": "function", "function": {"name": "pet"}}
CHAT = [{"role": "user", "content": "Hi"}]
HOT = dict(temperature=1.0, max_tokens=160)
# A prompt without its tools, which are long for an engine of tests.
TEMPLATE = source("hermes").replace("{{ tools | tojson }}", "{{ tools | length }}")
PARALLEL = {"tools": [PET, NAP], "tool_choice": "required", "chat_template": TEMPLATE}


@pytest.fixture(scope="module")
def engine(make_llm):
    """Prefill on one mesh, decode on two; deterministic, so that its programs are those of `test_determinism.py`."""
    with make_llm("prefill=1,decode=2", deterministic=True, prefill_buckets=(32,), decode_buckets=(4,)) as llm:
        yield llm


def check(completion, names=("pet", "nap")):
    assert (completion.finish_reason, completion.content, completion.reasoning) == ("stop", "", "")
    assert completion.tool_calls
    for call in completion.tool_calls:
        assert call.name in names
        jsonschema.validate(json.loads(call.arguments), SCHEMA if call.name == "pet" else {"maxProperties": 0})


def test_a_named_function_is_called_once_and_by_every_completion(engine):
    params = SamplingParams(n=2, seed=1, **HOT)
    (output,) = engine.chat(CHAT, params, tools=[PET, NAP], tool_choice=NAMED, chat_template=TEMPLATE)
    for completion in output.outputs:
        check(completion, ("pet",))
        assert len(completion.tool_calls) == 1


def test_calls_are_the_same_alone_preempted_and_migrated(engine):
    def run(disturb=lambda name: None):
        stream = engine.stream_chat(CHAT, SamplingParams(seed=5, **HOT), **PARALLEL)
        for number, _ in enumerate(stream):
            if number in (3, 9, 15):
                disturb(stream.request_id)
        return stream.result().outputs[0]

    alone, preempted, migrated = run(), run(engine.preempt), run(engine.migrate)
    check(alone)
    assert alone.token_ids == preempted.token_ids == migrated.token_ids
    calls = [[(call.name, call.arguments) for call in one.tool_calls] for one in (alone, preempted, migrated)]
    assert calls[0] == calls[1] == calls[2]


def test_a_call_that_is_cut_off_is_content_and_says_so(engine):
    (output,) = engine.chat(CHAT, SamplingParams(temperature=0, max_tokens=12), **PARALLEL)
    (completion,) = output.outputs
    assert (completion.finish_reason, completion.tool_calls) == ("length", ())
    assert completion.content == completion.text


def test_what_a_call_cannot_go_with_is_refused(engine):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(ValueError, match="structured_outputs and a tool_choice that asks for"):
        engine.chat(CHAT, params, **PARALLEL)
    pet = {"type": "function", "function": {"name": "pet", "parameters": {"properties": {"a": {"uniqueItems": True}}}}}
    with pytest.raises(ValueError, match="uniqueItems"):
        engine.chat(CHAT, None, **{**PARALLEL, "tools": [pet]})
