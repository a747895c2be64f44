"""Loads that commands name: a batch file is counted in tokens of the model at hand, and the help has all generators."""

import json

import pytest
from helpers.tiny_gguf import write_tiny_gguf
from twinmesh.engine.simulation.loads.generators import GENERATORS
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.scripts.loads import HELP, read_load


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [
        {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
         "url": "/v1/chat/completions"},
        {"prompt": "hello hello", "max_tokens": 4},
        {"prompt": [1, 2, 3]},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_batch_file_has_the_lengths_that_the_engine_would_see(tmp_path, lines):
    model = tmp_path / "model.gguf"
    write_tiny_gguf(model)
    checkpoint = open_checkpoint(model)
    chat = checkpoint.chat_template().encode([{"role": "user", "content": "hi"}])
    text = checkpoint.tokenizer().encode("hello hello")
    found = [(r.prompt_len, r.output_len) for r in read_load(lines, str(model)).requests]
    assert found == [(len(chat), 3), (len(text), 4), (3, 16)]


def test_a_batch_file_without_the_model_s_files_is_refused(lines):
    with pytest.raises(ValueError, match=r"in\.jsonl is a batch file, and llama-3\.1-8b is not here"):
        read_load(lines, "llama-3.1-8b")


def test_other_loads_need_no_model():
    assert len(list(read_load("poisson:rate=1,requests=3,input=5,output=5", "nothing").requests)) == 3


def test_every_generator_is_in_the_help():
    assert all(f"\n  {name} " in HELP for name in GENERATORS)
    assert max(map(len, HELP.splitlines())) <= 120
