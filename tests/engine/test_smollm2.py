"""The real small model, through pages, a hand-off and both meshes. Skipped where it has not been fetched."""

import pytest
from twinmesh import LLM, SamplingParams
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.models.errors import CheckpointError

FRANCE = [504, 3575, 282, 4649, 314, 7042, 30, 2]


@pytest.fixture(scope="module", params=["both=1", "prefill=1,decode=1"])
def smollm2(request):
    try:
        path = resolve_model("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    options = dict(max_model_len=512, max_num_seqs=4, prefill_buckets=(64,), decode_buckets=(4,))
    with LLM(path, topology=request.param, **options) as llm:
        yield llm


def test_the_capital_of_france(smollm2):
    (output,) = smollm2.chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0, max_tokens=32)
    )
    assert output.outputs[0].token_ids == FRANCE
    assert output.outputs[0].text == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"


def test_answers_in_a_batch_of_long_and_short_prompts_equal_answers_alone(smollm2):
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    prompts = ["The sky is", "Once upon a time " * 40, "1, 2, 3, 4,"]
    alone = [smollm2.generate(prompt, greedy)[0].outputs[0].token_ids for prompt in prompts]
    together = smollm2.generate(prompts, greedy)
    assert [output.outputs[0].token_ids for output in together] == alone
