"""`twinmesh batch`, against an engine that repeats the prompt."""

import json

import pytest
from helpers.fake_llm import FakeLLM
from twinmesh.scripts import arguments
from twinmesh.scripts.cli import main


@pytest.fixture
def llm(monkeypatch):
    llm = FakeLLM()
    monkeypatch.setattr(arguments, "load_llm", lambda args: llm)
    return llm


@pytest.fixture
def batch(tmp_path, capsys):
    def run(lines, *args):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code = main(["batch", "--model", "fake", "--input", str(source), "--output", str(target), *args])
        out, err = capsys.readouterr()
        return code, out, err, target

    return run


def test_results_are_written_and_counted(llm, batch):
    code, out, err, target = batch([{"prompt": "a"}, {"prompt": "b"}])
    assert code == 0
    assert out == ""
    assert f"Wrote 2 results to {target}." in err
    assert len(target.read_text().splitlines()) == 2
    assert llm.is_closed


def test_progress_goes_to_stderr(llm, batch):
    _, _, err, _ = batch([{"prompt": "a"}, {"prompt": "b"}])
    assert "2/2" in err
    assert "tokens/s, errors: 0" in err


def test_lines_that_failed_are_counted_and_make_the_exit_code_1(llm, batch):
    code, _, err, _ = batch([{"prompt": "a"}, {"prompt": "b", "n": 0}])
    assert code == 1
    assert "Wrote 2 results" in err
    assert "1 line could not be run: see 'error' in the output." in err


def test_show_prints_the_first_answers_and_a_table(llm, batch):
    lines = [{"messages": [{"role": "user", "content": f"question {i}"}]} for i in range(3)]
    _, out, _, _ = batch(lines, "--show", "2")
    assert "> question 0\n" in out
    assert "> question 1\n" in out
    assert "> question 2\n" not in out
    rows = {
        row.split()[0]: row.split()[1:5] for row in out.splitlines() if row.startswith(("TTFT", "TPOT", "hand-off"))
    }
    assert rows == {
        "TTFT": ["100", "ms", "100", "ms"],
        "TPOT": ["10.0", "ms", "10.0", "ms"],
        "hand-off": ["10.0", "ms", "10.0", "ms"],
    }
    assert "3 requests, 33 tokens in " in out


def test_arguments_are_the_defaults_of_lines_that_do_not_say(llm, batch):
    batch([{"prompt": "a"}, {"prompt": "b", "temperature": 0}], "--temperature", "0.5", "--max-tokens", "3")
    assert sorted((params.temperature, params.max_tokens) for params in llm.sampling) == [(0, 3), (0.5, 3)]


def test_ctrl_c_says_what_is_written_and_stops_with_130(llm, batch):
    llm.interrupt_after = 1
    code, _, err, target = batch([{"prompt": "a"}, {"prompt": "b"}])
    assert code == 130
    assert err.endswith(f"twinmesh: Stopped. 1 of 2 results are in {target}.\n")
    assert len(target.read_text().splitlines()) == 1


@pytest.mark.parametrize("missing", ["input", "output"])
def test_files_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setattr(arguments, "load_llm", lambda args: pytest.fail("the model was loaded"))
    source = tmp_path / "in.jsonl"
    if missing == "output":
        source.write_text('{"prompt": "a"}\n')
    target = tmp_path / "nowhere" / "out.jsonl"
    assert main(["batch", "--model", "fake", "--input", str(source), "--output", str(target)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"twinmesh: The {missing}")
    assert err.count("\n") == 1
