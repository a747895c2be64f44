"""Batch files as workloads: lengths by a tokenizer, limits of answers, shared beginnings."""

import json

import pytest
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.workload import batch_workload
from twinmesh.engine.simulation.workload import page_hashes


def tokens_of(request):
    """A token a character, of the prompt or of the last message."""
    text = request.prompt if request.messages is None else request.messages[-1]["content"]
    return text if isinstance(text, list) else [ord(letter) for letter in text]


def chat(name, content, **body):
    messages = [{"role": "user", "content": content}]
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages, **body}}


def written(tmp_path, *lines):
    path = tmp_path / "in.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_come_at_once_as_batch_work_with_lengths_in_tokens(tmp_path):
    path = written(
        tmp_path, chat("a", "x" * 40, max_tokens=7), "", {"prompt": [1, 2, 3]}, chat("b", "y", max_tokens=9, n=2)
    )
    workload = batch_workload(path, tokens_of, SamplingParams(max_tokens=5))
    found = list(workload.requests)
    assert [(r.prompt_len, r.output_len, r.at) for r in found] == [(40, 7, 0.0), (3, 5, 0.0), (1, 9, 0.0), (1, 9, 0.0)]
    assert all(r.service.is_batch for r in found)
    assert "at their limit" in workload.name
    assert found == list(workload.requests)


def test_prompts_that_begin_alike_share_pages(tmp_path):
    same = "s" * 100
    workload = batch_workload(written(tmp_path, chat("a", same + "a" * 50), chat("b", same + "b" * 50)), tokens_of)
    a, b = (page_hashes(r.blocks, workload.block_tokens, r.prompt_len, 16) for r in workload.requests)
    assert len(a) == 9
    assert a[:6] == b[:6]
    assert not set(a[6:]) & set(b)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: this is not JSON"), (chat("b", "x", max_tokens=0), "line 2: max_tokens=0"),
        (chat("b", 5), "line 2: "), ({"custom_id": "c", "body": {}}, "line 2: "),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_run_is_named(tmp_path, line, message):
    workload = batch_workload(written(tmp_path, chat("a", "x"), line), refusing)
    with pytest.raises(ValueError, match=rf"in\.jsonl, {message}"):
        list(workload.requests)


def refusing(request):
    """A tokenizer that takes texts alone."""
    tokens = tokens_of(request) if isinstance(request.messages[-1]["content"], str) else None
    if tokens is None:
        raise ValueError("a content is no text.")
    return tokens


def test_without_a_limit_an_answer_has_no_length(tmp_path):
    workload = batch_workload(
        written(tmp_path, chat("a", "x", max_tokens=3)), tokens_of, SamplingParams(max_tokens=None)
    )
    assert len(list(workload.requests)) == 1
    with pytest.raises(ValueError, match="line 1: it has no max_tokens"):
        batch_workload(written(tmp_path, chat("a", "x")), tokens_of, SamplingParams(max_tokens=None))


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty: give a batch file"):
        batch_workload(written(tmp_path), tokens_of)
