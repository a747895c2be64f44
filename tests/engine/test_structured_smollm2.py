"""A real model under schemas and regular expressions. Skipped where it has not been fetched."""

import json
import re

import jsonschema
import pytest
from twinmesh import LLM, SamplingParams, StructuredOutputsParams
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.models.errors import CheckpointError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 30},
        "people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 3},
        "when": {"type": "string", "format": "date"},
        "rating": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 5}, {"type": "null"}]},
    },
    "required": ["title", "people", "when", "rating"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = resolve_model("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    options = dict(max_model_len=512, max_num_seqs=4, prefill_buckets=(64,), decode_buckets=(4,))
    with LLM(path, topology="prefill=1,decode=1", **options) as llm:
        yield llm


@pytest.mark.long
@pytest.mark.parametrize("schema", [PERSON, NESTED], ids=["person", "nested"])
@pytest.mark.parametrize("temperature", [0, 1.0, 3.0])
def test_a_real_models_answers_validate(smollm2, schema, temperature):
    kept = StructuredOutputsParams(json=schema)
    params = SamplingParams(n=3, temperature=temperature, seed=5, max_tokens=300, structured_outputs=kept)
    (output,) = smollm2.chat([{"role": "user", "content": "Invent something, in JSON."}], params)
    ended = [completion.text for completion in output.outputs if completion.finish_reason == "stop"]
    assert ended
    for text in ended:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.long
def test_a_real_model_answers_as_asked(smollm2):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    cities = StructuredOutputsParams(choice=["Berlin", "Paris", "Rome"])
    (output,) = smollm2.chat(question, SamplingParams(temperature=0, max_tokens=8, structured_outputs=cities))
    assert output.outputs[0].text == "Paris"
    phone = StructuredOutputsParams(regex=r"\+33 [1-9]( \d\d){4}")
    (output,) = smollm2.chat(question, SamplingParams(temperature=1, seed=1, max_tokens=40, structured_outputs=phone))
    assert re.fullmatch(phone.regex, output.outputs[0].text)
