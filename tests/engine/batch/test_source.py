"""A batch run's input: names that come twice, and files that change after they were surveyed."""

import hashlib
import os
from pathlib import Path

import pytest
from helpers.batch_files import DEFAULTS, BatchFiles, prompts
from helpers.fake_llm import FakeLLM, Meddler
from twinmesh.engine.batch.session import Batch
from twinmesh.engine.batch.source import Source
from twinmesh.engine.errors import BatchStopped


@pytest.fixture
def files(tmp_path):
    return BatchFiles(tmp_path)


@pytest.mark.parametrize("first", ["a", "line-3"])
def test_a_custom_id_used_twice_is_refused_before_anything_is_done(files, first):
    again = {"prompt": "c", **({"custom_id": "a"} if first == "a" else {})}
    lines = [{"prompt": "a", "custom_id": first}, {"prompt": "b"}, again]
    with pytest.raises(ValueError, match=rf"custom_id='{first}' of line 3 is already that of line 1 in"):
        files.run(lines)
    assert not files.target.exists()


def test_names_are_compared_as_json_reads_them(files):
    with pytest.raises(ValueError, match="custom_id='a'"):
        files.run(['{"prompt": "x", "custom_id": "a"}', '{"prompt": "x", "custom\\u005fid": "\\u0061"}'])


def test_equal_hashes_of_different_names_are_no_harm(files, monkeypatch):
    monkeypatch.setattr("twinmesh.engine.batch.source.hash", lambda text: 7, raising=False)
    assert files.run(prompts(3)).succeeded == 3


def test_an_input_that_grows_meanwhile_stops_the_run_which_goes_on_once_it_is_as_it_was(files):
    files.write(prompts(3))
    text = files.source.read_text()
    with pytest.raises(BatchStopped, match=r"in\.jsonl changed while it was read: put it back .* 0 of 3 results"):
        files.run(llm=Meddler(lambda: files.write(prompts(4))))
    files.source.write_text(text)
    assert files.run().succeeded == 3
    assert sorted(files.ids()) == ["id0", "id1", "id2"]


@pytest.mark.parametrize("edited", ["model loads", "lines are read"])
def test_no_line_is_run_that_was_edited_in_place_since_the_survey(files, edited):
    files.write(prompts(2000))  # more than is read ahead

    def edit():
        text = files.source.read_text()
        files.source.write_text(text.replace('"1999"', '"abcd"'))

    with Batch(files.source, files.target, model=files.model, defaults=DEFAULTS) as batch:
        if edited == "model loads":
            edit()
        with pytest.raises(BatchStopped, match=r"in\.jsonl changed while it was read: put it back as it was, or start"):
            batch.run(Meddler(edit if edited == "lines are read" else lambda: None))
    assert not files.target.exists() or "abcd" not in files.target.read_text()


@pytest.mark.parametrize("how", ["touched", "replaced by a copy", "removed"])
def test_an_input_of_the_same_content_is_the_same_input(files, how):
    files.write(prompts(2000))

    def meddle():
        if how == "removed":
            files.source.unlink()
            return
        copy = files.source.with_name("copy")
        copy.write_bytes(files.source.read_bytes())
        copy.replace(files.source) if how == "replaced by a copy" else os.utime(files.source, (1, 1))

    assert files.run(llm=Meddler(meddle)).succeeded == 2000


def test_json_lines_are_hashed_while_they_are_read(files, monkeypatch):
    files.source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n {"prompt": "b"}')
    source, opened, path_open = Source.of(files.source), [], Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *mode: opened.append(path) or path_open(path, *mode))
        survey = source.survey()
    assert opened == [files.source]
    assert survey.digest == hashlib.blake2b(files.source.read_bytes()).hexdigest()[:32]


def test_an_input_that_is_still_being_written_is_refused(files, monkeypatch):
    files.write(prompts(2))

    def read(line, number):
        files.write(prompts(3))
        return f"id{number}"

    monkeypatch.setattr("twinmesh.engine.batch.source.read_custom_id", read)
    with pytest.raises(ValueError, match=r"in\.jsonl changed while it was read: start when it is complete"):
        files.run()


def test_an_input_that_can_no_longer_be_read_is_what_the_message_names(files, monkeypatch):
    files.write(prompts(3))
    with Batch(files.source, files.target, model=files.model) as batch:
        files.source.unlink()
        with pytest.raises(BatchStopped, match=r"in\.jsonl can no longer be read \(No such file.* 0 of 3 results"):
            batch.run(FakeLLM())
