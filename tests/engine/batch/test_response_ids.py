"""Ids of responses: no two have the same, in a file or between files: results can be kept in a table by them."""

import json

import pytest
from helpers.batch_files import BatchFiles, chat_line, prompts
from helpers.fake_llm import FakeLLM


@pytest.fixture
def files(tmp_path):
    return BatchFiles(tmp_path)


def ids(files):
    """The ids of a run's responses, of both kinds."""
    found = [line["response"] for line in files.read() if line["response"]]
    return [response["body"]["id"] for response in found] + [response["request_id"] for response in found]


def assert_unique(names, count):
    assert len(names) == len(set(names)) == count


def test_an_interrupted_run_goes_on_with_other_ids(files):
    with pytest.raises(KeyboardInterrupt):
        files.run(prompts(9), llm=FakeLLM(interrupt_after=4))
    files.run(llm=FakeLLM())
    assert_unique(ids(files), 18)


def test_lines_that_failed_in_the_engine_get_new_ids_where_they_are_run_again(files):
    files.run(prompts(5), llm=FakeLLM(fail="3"))
    first = ids(files)
    files.run(retry_errors=True)
    assert_unique(ids(files), 10)
    assert set(first) < set(ids(files))


def test_a_run_that_starts_over_has_other_ids(files):
    files.run(prompts(3))
    before = ids(files)
    files.run(restart=True)
    assert_unique(before + ids(files), 12)


def test_one_engine_gives_two_files_other_ids(tmp_path):
    llm, seen = FakeLLM(), []
    for name in ("one.jsonl", "two.jsonl"):
        files = BatchFiles(tmp_path, output_name=name)
        files.run(prompts(3), llm=llm)
        seen += ids(files)
    assert_unique(seen, 12)


def test_conversations_and_several_completions_have_ids_of_their_own(files):
    files.run([chat_line("a"), chat_line("b", n=3), {"prompt": "c", "n": 2}, {"prompt": "c"}])
    assert_unique(ids(files), 8)
    kinds = {line["custom_id"]: line["response"]["body"]["id"].split("-")[0] for line in files.read()}
    assert kinds == {"a": "chatcmpl", "b": "chatcmpl", "line-3": "cmpl", "line-4": "cmpl"}


def test_responses_in_parquet_have_them_too(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    files = BatchFiles(tmp_path, output_name="out.parquet")
    files.run(prompts(4))
    rows = [json.loads(row["response"]) for row in parquet.read_table(files.target).to_pylist()]
    assert_unique([row["body"]["id"] for row in rows] + [row["request_id"] for row in rows], 8)
