"""The real Gemma 3 270M through pages, windows and a hand-off. Skipped where it has not been fetched."""

import numpy as np
import pytest
from helpers.core_engine import assert_at_rest, greedy, token_ids, watching
from twinmesh import LLM, SamplingParams
from twinmesh.engine.protocol.actions import StartTransfer
from twinmesh.engine.scheduler.request import State
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.models.errors import CheckpointError

WINDOW, LONG = 512, 2000


@pytest.fixture(scope="module")
def gemma3():
    try:
        path = resolve_model("gemma3-270m")
    except CheckpointError as error:
        pytest.skip(str(error))
    options = dict(max_model_len=2048, max_num_seqs=1, prefill_buckets=(256,), decode_buckets=(1,), dtype="float32")
    with LLM(path, topology="prefill=1,decode=1", **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(request):
    return np.load(request.path.parent.parent / "fixtures" / "gemma3_logits.npz")


def test_photosynthesis(gemma3, expected):
    (output,) = gemma3.generate(
        "Photosynthesis is the process by which", SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    )
    assert output.prompt_token_ids == expected["question_ids"].tolist()
    assert output.outputs[0].token_ids == expected["answer_ids"].tolist()
    assert output.outputs[0].text == " plants and algae convert light energy into chemical energy."


def test_tokens_after_more_than_a_window_are_those_of_transformers(gemma3, expected):
    rows = [i for i, row in enumerate(expected["rows"]) if row >= WINDOW]
    prompts = [expected["ids"][: expected["rows"][i] + 1].tolist() for i in rows]
    assert [ids[0] for ids in token_ids(gemma3.generate(prompts, greedy(1)))] == expected["top_ids"][rows, 0].tolist()


def test_a_long_prompt_keeps_and_moves_no_more_than_the_window(gemma3, expected):
    gemma3.update_params({})  # empties the prefix cache
    config = gemma3.config
    windowed, full = config.windows.index(WINDOW), config.windows.index(None)
    with watching(gemma3) as (seen, most):
        gemma3.generate(np.resize(expected["ids"], LONG).tolist(), greedy(20))
    whole = config.pages_for(LONG)
    assert most[State.PREFILL][windowed] <= config.most_pages(WINDOW) < whole
    assert most[State.PREFILL][full] == whole
    assert most["decoding"][windowed] <= config.pages_for(WINDOW) + 1
    assert most["decoding"][full] == config.pages_for(LONG + 19)
    transfers = [action for action in seen if isinstance(action, StartTransfer)]
    moved = [len(action.source_pages[windowed]) for action in transfers]
    assert moved == [0] * (len(transfers) - 1) + [whole - (LONG - WINDOW + 1) // config.page_size]
    assert sum(len(action.source_pages[full]) for action in transfers) == whole
    assert_at_rest(gemma3)
