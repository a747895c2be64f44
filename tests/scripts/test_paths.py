"""Paths as people write them: "~" is the user's home wherever a path is taken, and "-" is never a file by accident."""

import json
import os

import pytest
from helpers.batch_files import BatchFiles, prompts
from helpers.core_engine import make_engine, model_with_windows
from helpers.fake_llm import FakeLLM
from helpers.tiny_gguf import write_tiny_gguf
from twinmesh import LLM
from twinmesh.engine.batch.paths import Output
from twinmesh.engine.batch.source import Source
from twinmesh.engine.options import documentation
from twinmesh.engine.simulation.logs.replay import replay
from twinmesh.models.checkpoints.catalog import cache_directory, resolve_model
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.scripts import arguments
from twinmesh.scripts.bench import machine
from twinmesh.scripts.cli import main


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's home; the current directory is another one, and stays empty."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_directory().parent))  # kernels are not to be compiled anew
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "home"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_batch_run_reads_and_writes_at_home(home, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "load_llm", lambda args, only=None: FakeLLM())
    BatchFiles(home).write(prompts(2))
    (home / "m.gguf").write_bytes(b"a model")
    files = ["--model=~/m.gguf", "--input=~/in.jsonl", "--output=~/out.jsonl", "--summary=~/summary.json"]
    assert main(["batch", *files]) == 0
    assert f"Wrote 2 results to {home}/out.jsonl." in capsys.readouterr().err
    assert json.loads((home / "summary.json").read_text())["succeeded"] == 2
    assert (home / "out.jsonl.run").exists()


def test_files_at_home_are_not_overwritten_either(home, capsys):
    BatchFiles(home).write(prompts(2))
    files = ["--model=~/m.gguf", "--input=~/in.jsonl"]
    assert main(["batch", *files, "--output=~/out.jsonl", "--summary=~/in.jsonl"]) == 2
    assert "is the input file" in capsys.readouterr().err
    assert main(["generate", "--model=~/m.gguf", "--prompt", "a", "--decision-log=~/m.gguf"]) == 2
    assert "is the model file" in capsys.readouterr().err


def test_batch_files_are_taken_at_home_from_python(home):
    files = BatchFiles(home)
    files.write(prompts(1))
    assert Source.of("~/in.jsonl").path == files.source
    assert Output("~/out.jsonl").path == files.target


def test_a_model_is_found_at_home(home):
    path = write_tiny_gguf(home / "tiny.gguf")
    assert resolve_model("~/tiny.gguf") == path
    assert open_checkpoint("~/tiny.gguf").name == open_checkpoint(path).name
    with pytest.raises(ValueError, match=rf"{home}/missing\.gguf"):
        LLM("~/missing.gguf")


def test_a_decision_log_is_written_and_replayed_at_home(home, capsys):
    with make_engine(model_with_windows(None), decision_log="~/run.log"):
        pass
    assert (home / "run.log").exists()
    assert replay("~/run.log").events >= 0
    assert main(["replay", "~/run.log"]) == 0


def test_a_model_is_converted_to_a_directory_at_home(home, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "twinmesh.models.checkpoints.orbax_writer.write", lambda _, out, *rest, **options: seen.append(out)
    )
    write_tiny_gguf(home / "tiny.gguf")
    assert main(["convert", "~/tiny.gguf", "~/out"]) == 0
    assert seen == [home / "out"]


def test_benchmarks_write_at_home(home, monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "main", lambda argv: seen.append(argv) or 0)
    assert main(["bench", "machine", "--json=~/a.json", "--json", "~/b.json", "--cores", "1", "--x=a~"]) == 0
    assert seen == [[f"--json={home}/a.json", "--json", f"{home}/b.json", "--cores", "1", "--x=a~"]]


def test_every_option_that_names_a_file_is_known_here():
    assert [
        name for name, option in documentation().items() if "FILE" in option.metavar or "PATH" in option.metavar
    ] == [
        "model",
        "decision_log",
    ]


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a~", "./~/x"])
def test_other_tildes_are_part_of_a_name(home, name):
    with pytest.raises(ValueError, match=rf"{os.path.normpath(name)}"):
        Source.of(name)


@pytest.mark.parametrize(
    "command",
    [
        ["batch", "--model", "m", "--input", "i", "--output", "o", "--summary", "-"],
        ["batch", "--model", "m", "--input", "i", "--output", "o", "--decision-log", "-"],
        ["generate", "--model", "m", "--prompt", "a", "--decision-log=-"],
        ["convert", "m", "-"],
    ],
)
def test_stdout_is_no_file_to_write(home, command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "'-' is no file: give a name, /dev/stdout, or ./- for a file of that name" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--restart"], ["--retry-errors"], ["--show", "1"]])
def test_an_output_to_stdout_is_refused_because_a_run_goes_on_from_its_output(home, options, capsys):
    BatchFiles(home).write(prompts(1))
    assert main(["batch", "--model", "m", "--input", "~/in.jsonl", "--output", "-", *options]) == 2
    said = capsys.readouterr().err
    assert said == (
        "twinmesh: The output '-' would be stdout, which does not keep what a run goes on from: give a file, or './-' "
        "for one of that name.\n"
    )


def test_a_file_called_dash_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = BatchFiles(tmp_path, output_name="-")
    files.run(prompts(1))
    assert len(files.read()) == 1
    Output("./-").check()
