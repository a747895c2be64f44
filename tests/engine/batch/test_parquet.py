"""Batch runs from and to Parquet."""

import errno
import json

import pytest
from helpers.batch_files import DEFAULTS, BatchFiles, prompts
from helpers.fake_llm import FakeLLM
from twinmesh.engine.batch.session import Batch
from twinmesh.engine.errors import BatchStopped

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'twinmesh[parquet]'")
from pyarrow import parquet  # noqa: E402


@pytest.fixture
def files(tmp_path):
    return BatchFiles(tmp_path, "in.parquet", "out.parquet")


def write(files, rows, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), files.source, **options)


def rows(files):
    return parquet.read_table(files.target).to_pylist()


def names(files):
    return sorted(path.name for path in files.folder.iterdir())


def test_rows_become_rows_in_the_same_order(files):
    write(files, [{"prompt": text, "custom_id": text} for text in ("a", "bb", "ccc")])
    files.run(window=2)
    assert [(row["custom_id"], row["line"], row["text"], row["completion_tokens"]) for row in rows(files)] == [
        ("a", 1, "a", 1),
        ("bb", 2, "bb", 2),
        ("ccc", 3, "ccc", 3),
    ]
    response = json.loads(rows(files)[0]["response"])
    assert response["body"]["choices"][0]["finish_reason"] == rows(files)[0]["finish_reason"] == "stop"
    assert names(files) == ["in.parquet", "out.parquet", "out.parquet.run", "tiny.gguf"]


def test_nulls_are_fields_that_are_not_there_and_nested_fields_may_be_json(files):
    message = {"role": "user", "content": "hi", "name": None}
    write(
        files,
        [
            {"custom_id": "chat", "messages": [message], "prompt": None, "body": None, "temperature": 0.5},
            {"custom_id": "json", "messages": None, "prompt": None, "temperature": None,
             "body": json.dumps({"prompt": "body"})},
            {"custom_id": None, "messages": None, "prompt": "plain", "body": None, "temperature": 0.0},
        ],
    )  # fmt: skip
    llm = FakeLLM()
    files.run(llm=llm)
    assert [(row["custom_id"], row["text"]) for row in rows(files)] == [
        ("chat", "\x01hi"),
        ("json", None),
        ("line-3", "plain"),
    ]
    assert sorted(params.temperature for params in llm.sampling) == [0.0, 0.5]
    assert "url=None is not served" in rows(files)[1]["error_message"]


def test_openai_lines_as_rows(files):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    write(files, [line, {**line, "custom_id": "b", "body": {**body, "n": 0}}])
    assert files.run().failed == 1
    assert [(row["text"], row["error_code"]) for row in rows(files)] == [("\x01hi", None), (None, "invalid_request")]


def test_token_ids_are_a_prompt(files):
    write(files, [{"prompt": [104, 105]}])
    files.run()
    assert rows(files)[0]["text"] == "hi"


def test_jsonl_and_parquet_mix(tmp_path):
    files = BatchFiles(tmp_path, output_name="out.PQ")
    files.run([{"prompt": "日本語 🙂"}, '{"prompt": "a", "custom_id": "\\ud800"}'])
    assert [(row["custom_id"], row["text"]) for row in rows(files)] == [("line-1", "日本語 🙂"), ("\\ud800", "a")]


def test_an_interrupted_run_leaves_a_journal_and_goes_on(files):
    write(files, prompts(9))
    with pytest.raises(KeyboardInterrupt) as stop:
        files.run(llm=FakeLLM(interrupt_after=3), window=4)
    assert f"3 of 9 results are in {files.target}.jsonl;" in stop.value.__notes__[0]
    assert not files.target.exists()
    llm = FakeLLM()
    assert files.run(llm=llm).resumed == 3
    assert len(llm.sampling) == 6
    assert [row["custom_id"] for row in rows(files)] == [f"id{i}" for i in range(9)]
    assert not files.target.with_name("out.parquet.jsonl").exists()


def test_a_run_that_ended_while_it_wrote_parquet_writes_it_again(files, monkeypatch):
    write(files, prompts(3))

    def full(path, lines):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("twinmesh.engine.batch.parquet.write_results", full)
    with pytest.raises(BatchStopped, match="3 of 3 results are in"):
        files.run()
    monkeypatch.undo()
    assert "out.parquet.tmp" not in names(files)
    with Batch(files.source, files.target, model=files.model, defaults=DEFAULTS) as batch:
        assert batch.remaining == 0
        batch.finish()
    assert len(rows(files)) == 3


def test_a_finished_file_is_finished_and_its_errors_can_be_retried(files):
    write(files, [{"prompt": "bad"}, {"prompt": "good"}])
    files.run(llm=FakeLLM(fail="bad"))
    first = rows(files)
    llm = FakeLLM()
    result = files.run(llm=llm)
    assert (result.resumed, result.failed, len(llm.sampling)) == (2, 1, 0)
    assert rows(files) == first
    result = files.run(llm=llm, retry_errors=True)
    assert (result.resumed, result.failed, len(llm.sampling)) == (1, 0, 1)
    assert [row["text"] for row in rows(files)] == ["bad", "good"]
    assert rows(files)[1] == first[1]


def test_another_run_leaves_a_finished_file_alone(files):
    write(files, prompts(2))
    files.run()
    before = names(files)
    with pytest.raises(ValueError, match="another run"):
        files.run(engine={"dtype": "bfloat16"})
    assert names(files) == before
    assert files.run().resumed == 2
    assert files.run(engine={"dtype": "bfloat16"}, restart=True).resumed == 0


def test_a_custom_id_used_twice_is_refused(files):
    write(files, [{"prompt": "a", "custom_id": "x"}, {"prompt": "b", "custom_id": "x"}])
    with pytest.raises(ValueError, match="custom_id='x' of line 2 is already that of line 1"):
        files.run()


def test_what_is_no_parquet_is_refused_in_a_sentence(files):
    files.source.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"in\.parquet cannot be read as Parquet \(.*\): write it anew\."):
        files.run()


def damage(path, text):
    content = bytearray(path.read_bytes())
    place = content.index(text)
    content[place : place + len(text)] = b"\xff" * len(text)
    path.write_bytes(content)


@pytest.mark.parametrize("options", [{"compression": "none"}, {"compression": "none", "write_page_checksum": True}])
def test_an_input_that_is_damaged_in_the_middle_is_refused_before_anything_is_done(files, options):
    lines = [{"prompt": f"prompt number {i}"} for i in range(1000)]
    write(files, lines, row_group_size=300, use_dictionary=False, **options)
    damage(files.source, b"number 700")
    with pytest.raises(ValueError, match=r"in\.parquet cannot be read as Parquet \(.*\): write it anew\."):
        files.run()
    assert names(files) == ["in.parquet", "tiny.gguf"]


def test_an_input_that_becomes_unreadable_meanwhile_is_to_blame_and_not_the_output(files, monkeypatch):
    write(files, prompts(600))

    def fail(path):
        yield from ({"prompt": str(i)} for i in range(3))
        raise ValueError(f"{path} cannot be read as Parquet (a bad page): write it anew.")

    with Batch(files.source, files.target, model=files.model) as batch:
        monkeypatch.setattr("twinmesh.engine.batch.parquet.read_rows", fail)
        with pytest.raises(BatchStopped, match=r"in\.parquet cannot be read .* 0 of 600 results are in"):
            batch.run(FakeLLM())


def test_what_pandas_makes_of_missing_numbers_and_of_its_index_is_undone(files):
    nan = float("nan")
    write(
        files,
        [
            {"prompt": "a", "max_tokens": 16.0, "temperature": 1.0, "seed": 3.0, "__index_level_0__": 4},
            {"prompt": "b", "max_tokens": nan, "temperature": nan, "seed": nan, "__index_level_0__": 7},
            {"prompt": "c", "max_tokens": 16.5, "temperature": 0.5, "seed": nan, "__index_level_0__": 9},
        ],
    )
    llm = FakeLLM()
    assert files.run(llm=llm).failed == 1
    asked = {params.max_tokens: params for params in llm.sampling}
    assert asked.keys() == {16, 8}  # 8 is the run's default
    assert type(asked[16].max_tokens) is type(asked[16].seed) is int
    assert (asked[16].temperature, asked[16].seed, asked[8].temperature) == (1.0, 3, 0.0)
    assert "max_tokens=16.5 is not usable" in rows(files)[2]["error_message"]


def test_rows_stream_through_row_groups(files):
    write(files, [{"prompt": str(i)} for i in range(1000)], row_group_size=100)
    assert files.run().finished == 1000
    assert [row["text"] for row in rows(files)] == [str(i) for i in range(1000)]


def test_a_link_is_parquet_by_its_own_name(files):
    write(files, prompts(3))
    (files.folder / "blob").touch()
    files.target.symlink_to("blob")
    files.run(restart=True)
    assert files.target.is_symlink()
    assert [row["custom_id"] for row in rows(files)] == ["id0", "id1", "id2"]
    assert names(files) == ["blob", "blob.run", "in.parquet", "out.parquet", "tiny.gguf"]


def test_a_start_that_was_killed_before_it_looked_does_not_hide_a_finished_file(files):
    write(files, prompts(2))
    files.run()
    journal = files.target.with_name("out.parquet.jsonl")
    journal.touch()
    with pytest.raises(ValueError, match="another run"):
        files.run(engine={"dtype": "bfloat16"})
    llm = FakeLLM()
    assert files.run(llm=llm).resumed == 2
    assert llm.sampling == []
    assert not journal.exists()


@pytest.mark.parametrize("name", ["out.parquet.jsonl", "out.parquet.run", "out.parquet.jsonl.tmp"])
def test_an_input_in_the_place_of_a_file_beside_the_output_is_not_overwritten(tmp_path, name):
    files = BatchFiles(tmp_path, name, "out.parquet")
    with pytest.raises(ValueError, match=rf"would overwrite {name}, which is the input file"):
        files.run(prompts(2), restart=True)
    assert len(files.source.read_text().splitlines()) == 2
