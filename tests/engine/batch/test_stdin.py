"""Batch runs from stdin, which can be read only once."""

import json
import os
import threading
import time

import pytest
from helpers.batch_files import BatchFiles, prompts
from helpers.fake_llm import FakeLLM
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.session import Batch


@pytest.fixture
def files(tmp_path):
    return BatchFiles(tmp_path)


def test_a_closed_stdin_is_refused(files, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match="stdin is closed"):
        run_stdin(files)


@pytest.fixture
def stdin(monkeypatch, tmp_path):
    def give(lines):
        path = tmp_path / "stdin"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        monkeypatch.setattr("sys.stdin", path.open())

    return give


def run_stdin(files, **options):
    with Batch("-", files.target, model=files.model, **options) as batch:
        assert batch.total is None
        assert batch.remaining is None
        return batch.run(FakeLLM())


def test_stdin_is_read_line_by_line(files, stdin):
    stdin(prompts(4))
    assert run_stdin(files).finished == 4
    assert sorted(files.ids()) == ["id0", "id1", "id2", "id3"]


def test_results_are_written_while_stdin_is_silent(files, monkeypatch):
    """The writer says no more until what it said is answered; a line may come in pieces."""
    read, write = os.pipe()
    monkeypatch.setattr("sys.stdin", os.fdopen(read))
    answered = []

    def talk():
        with os.fdopen(write, "wb", buffering=0) as pipe:
            first, second = b'{"prompt": "a"}\n{"prompt": "b"}\n{"pro', b'mpt": "c"}\n\n{"prompt": "d"}'
            for said, results in ((first, 2), (second, 3)):
                pipe.write(said)
                deadline = time.monotonic() + 20
                while (not files.target.exists() or len(files.read()) < results) and time.monotonic() < deadline:
                    pass
                answered.append(len(files.read()))

    writer = threading.Thread(target=talk)
    writer.start()
    result = run_stdin(files)
    writer.join()
    assert answered == [2, 3]
    assert result.succeeded == 4
    assert sorted(files.ids()) == ["line-1", "line-2", "line-3", "line-5"]


def test_an_empty_stdin_is_refused(files, stdin):
    stdin([])
    with pytest.raises(ValueError, match="The input '-' is empty"):
        run_stdin(files)
    assert not files.target.exists()


def test_a_name_that_comes_twice_on_stdin_is_an_error_line_under_another_name(files, stdin):
    stdin([{"prompt": "a", "custom_id": "x"}, {"prompt": "b", "custom_id": "x"}])
    assert run_stdin(files).failed == 1
    errors = {line["custom_id"]: line["error"] and line["error"]["code"] for line in files.read()}
    assert errors == {"x": None, "line-2": "duplicate_custom_id"}


def test_a_run_from_stdin_does_not_go_on_but_starts_over(files, stdin):
    stdin(prompts(2))
    run_stdin(files)
    stdin(prompts(3))
    with pytest.raises(ValueError, match=r"stdin cannot be read from its beginning again.*--restart"):
        run_stdin(files)
    assert run_stdin(files, restart=True).finished == 3
    with pytest.raises(ValueError, match="another input"):
        files.run(prompts(3), defaults=SamplingParams())
