"""Batch runs that go on where an earlier start ended, and runs that must not."""

import errno
import json

import pytest
from helpers.batch_files import DEFAULTS, BatchFiles, prompts
from helpers.fake_llm import FakeLLM, Meddler
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.session import Batch, run
from twinmesh.engine.errors import BatchStopped


@pytest.fixture
def files(tmp_path):
    return BatchFiles(tmp_path)


@pytest.fixture
def interrupted(files):
    """Three of nine results are there."""
    with pytest.raises(KeyboardInterrupt):
        files.run(prompts(9), FakeLLM(interrupt_after=3), window=4)
    return files


def computed(llm):
    return len(llm.sampling)


def test_a_run_goes_on_and_computes_nothing_twice(interrupted):
    before, llm = interrupted.target.read_bytes(), FakeLLM()
    result = interrupted.run(llm=llm)
    assert computed(llm) == 6
    assert interrupted.target.read_bytes().startswith(before)
    assert sorted(interrupted.ids()) == sorted(f"id{i}" for i in range(9))
    assert (result.finished, result.resumed, result.succeeded) == (9, 3, 9)


def test_each_line_draws_the_same_in_every_start(interrupted):
    llm = FakeLLM()
    interrupted.run(llm=llm, restart=True, window=4)
    again = FakeLLM()
    first = {params.seed for params in llm.sampling}
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(llm=FakeLLM(interrupt_after=3), restart=True, window=4)
    interrupted.run(llm=again, window=4)
    assert len(first) == 9
    assert {params.seed for params in again.sampling} < first


def test_a_torn_line_is_run_again(interrupted):
    whole = interrupted.target.read_bytes()
    interrupted.target.write_bytes(whole[:-20])
    llm = FakeLLM()
    result = interrupted.run(llm=llm)
    assert (computed(llm), result.mended, result.resumed) == (7, 1, 2)
    assert sorted(interrupted.ids()) == sorted(f"id{i}" for i in range(9))


def test_a_finished_run_has_nothing_left_to_do(files):
    files.run(prompts(3))
    before = files.target.read_bytes()
    with Batch(files.source, files.target, model=files.model, defaults=DEFAULTS) as batch:
        assert batch.remaining == 0
        assert batch.finish().finished == 3
    assert files.target.read_bytes() == before


def test_errors_are_kept_and_counted_unless_they_are_to_be_retried(files):
    lines = [{"prompt": "bad"}, {"prompt": "good"}, "not json"]
    files.run(lines, FakeLLM(fail="bad"))
    llm = FakeLLM()
    result = files.run(llm=llm)
    assert (computed(llm), result.failed, result.resumed) == (0, 2, 3)
    result = files.run(llm=llm, retry_errors=True)
    assert (computed(llm), result.succeeded, result.failed, result.retried) == (1, 2, 1, 2)
    assert sorted(files.ids()) == ["line-1", "line-2", "line-3"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(defaults=SamplingParams(temperature=0.5, max_tokens=8)), r"temperature=0\.0 instead of 0\.5"),
        (dict(defaults=SamplingParams(temperature=0.0, max_tokens=9, stop="x")), "max_tokens=8 instead of 9"),
        (dict(engine={"dtype": "bfloat16"}), "dtype=None instead of 'bfloat16'"),
    ],
)
def test_a_run_with_other_sampling_or_arithmetic_is_refused(interrupted, change, says):
    before = interrupted.target.read_bytes()
    with pytest.raises(ValueError, match=says) as refused:
        interrupted.run(**change)
    assert "--restart" in str(refused.value)
    assert str(refused.value).count(".\n") == 0
    assert interrupted.target.read_bytes() == before
    assert interrupted.run(**change, restart=True).resumed == 0


def test_another_input_or_model_is_refused(interrupted):
    text = interrupted.source.read_text()
    interrupted.source.write_text(text.replace('"8"', '"eight"'))
    with pytest.raises(ValueError, match=r"\(another input\)"):
        interrupted.run()
    interrupted.source.write_text(text)
    interrupted.model.write_bytes(b"a modeL")
    with pytest.raises(ValueError, match=r"\(another model\)"):
        interrupted.run()


def test_files_that_moved_or_were_touched_are_the_same_run(interrupted, tmp_path):
    moved = BatchFiles(tmp_path / "elsewhere")
    moved.folder.mkdir()
    for path in list(tmp_path.iterdir()):
        if path.is_file():
            (moved.folder / path.name).write_bytes(path.read_bytes())
    assert moved.run().resumed == 3


@pytest.mark.parametrize("content", ["precious\n", json.dumps({"custom_id": "a"}) + "\n"])
def test_a_file_that_no_run_made_is_never_overwritten_unless_told_to(files, content):
    files.target.write_text(content)
    with pytest.raises(ValueError, match=r"out\.jsonl\.run is missing.*--restart"):
        files.run(prompts(2))
    assert files.target.read_text() == content
    assert files.run(restart=True).finished == 2


def test_an_empty_output_is_as_good_as_none(files):
    files.target.touch()
    assert files.run(prompts(2)).finished == 2


def test_a_damaged_memory_of_the_run_is_refused(interrupted):
    (interrupted.folder / "out.jsonl.run").write_text("{")
    with pytest.raises(ValueError, match="missing or unreadable"):
        interrupted.run()


def test_an_output_in_use_is_refused(files):
    files.write(prompts(2))
    with (
        Batch(files.source, files.target, model=files.model),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        files.run()
    assert files.run().finished == 2


def test_a_link_to_the_output_is_the_output(interrupted):
    real = interrupted.folder / "real.jsonl"
    interrupted.target.rename(real)
    interrupted.target.symlink_to(real)
    (interrupted.folder / "out.jsonl.run").rename(interrupted.folder / "real.jsonl.run")
    assert interrupted.run(retry_errors=True).resumed == 3
    assert interrupted.target.is_symlink()


@pytest.mark.parametrize("output", ["tiny.gguf", "in.jsonl", "in"])
def test_what_the_run_reads_is_not_overwritten(tmp_path, output):
    files = BatchFiles(tmp_path, "in.run" if output == "in" else "in.jsonl", output)
    files.write(prompts(2))
    before = files.source.read_bytes(), files.model.read_bytes()
    with pytest.raises(ValueError, match=r"is the (input|model) file: give another name"):
        files.run(restart=True)
    assert (files.source.read_bytes(), files.model.read_bytes()) == before


def test_an_output_in_the_models_directory_would_make_it_another_model(files):
    files.write(prompts(2))
    with pytest.raises(ValueError, match="is in the model's directory"):
        run(FakeLLM(), files.source, files.target, model=files.folder)


def test_an_output_that_is_moved_meanwhile_stops_the_run_which_goes_on_once_it_is_back(files):
    elsewhere = files.folder / "elsewhere"
    with pytest.raises(BatchStopped, match=r"out\.jsonl was moved, removed or replaced"):
        files.run(prompts(3), Meddler(lambda: files.target.rename(elsewhere)))
    elsewhere.rename(files.target)
    assert files.run().resumed == 3


def test_a_batch_that_was_run_or_closed_is_not_run_again(files):
    files.write(prompts(3))
    with Batch(files.source, files.target, model=files.model) as batch:
        with pytest.raises(KeyboardInterrupt):
            batch.run(FakeLLM(interrupt_after=1), window=2)
        with pytest.raises(ValueError, match="make a new one"):
            batch.run(FakeLLM())
    with pytest.raises(ValueError, match="make a new one"):
        batch.run(FakeLLM())
    assert len(files.ids()) == 1


def test_files_that_cannot_be_used_are_no_reason_to_try_again(files, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("twinmesh.engine.batch.identity.model_digest", refuse)
    with pytest.raises(ValueError, match=r"tiny\.gguf cannot be used: Permission denied\."):
        files.run(prompts(2))
    assert not files.target.exists()


def test_a_directory_in_the_place_of_the_memory_of_the_run_is_refused(files):
    (files.folder / "out.jsonl.run").mkdir()
    with pytest.raises(ValueError, match=r"out\.jsonl\.run cannot be used: Is a directory\."):
        files.run(prompts(2))
    assert not files.target.exists()


@pytest.mark.parametrize("circle", ["out.jsonl", "in.jsonl", "tiny.gguf"])
def test_links_that_go_in_a_circle_are_refused(files, circle):
    _, _ = files.write(prompts(2)), files.model
    (files.folder / circle).unlink(missing_ok=True)
    (files.folder / circle).symlink_to(circle)
    with pytest.raises(ValueError, match=rf"{circle}.* cannot be (read|used): Too many levels|no model at .*{circle}"):
        Batch(files.source, files.target, model=files.folder / "tiny.gguf")


def test_a_model_with_too_long_a_name_is_refused(files):
    files.write(prompts(2))
    with pytest.raises(ValueError, match="cannot be used: File name too long"):
        Batch(files.source, files.target, model="x" * 300)


@pytest.mark.parametrize("length", [250, 300])
def test_an_output_with_too_long_a_name_is_refused(tmp_path, length):
    with pytest.raises(ValueError, match="cannot be used: File name too long"):
        BatchFiles(tmp_path, output_name="x" * length).run(prompts(2))
