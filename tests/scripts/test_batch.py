"""`twinmesh batch`, against an engine that repeats the prompt."""

import errno
import json

import pytest
from helpers.fake_llm import FakeLLM
from twinmesh.engine.host import progress
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
        model = tmp_path / "fake.gguf"
        model.write_bytes(b"a model")
        code = main(["batch", "--model", str(model), "--input", str(source), "--output", str(target), *args])
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


def test_progress_goes_to_a_terminal_on_stderr(llm, batch, monkeypatch):
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    _, out, err, _ = batch([{"prompt": "a"}, {"prompt": "b", "n": 0}])
    assert out == ""
    assert "batch: 2 of 2 lines, " in err
    assert "tokens/s, 1 with an error" in err


def test_without_a_terminal_a_short_run_shows_no_progress(llm, batch):
    _, _, err, _ = batch([{"prompt": "a"}, {"prompt": "b"}])
    assert "lines, " not in err


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
    assert err.endswith(f"twinmesh: Stopped. 1 of 2 results are in {target}; the same command goes on from there.\n")
    assert len(target.read_text().splitlines()) == 1


def test_ctrl_c_while_the_model_is_loaded_says_so_as_well(batch, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(arguments, "load_llm", interrupted)
    code, _, err, target = batch([{"prompt": "a"}, {"prompt": "b"}])
    assert code == 130
    assert err == f"twinmesh: Stopped. 0 of 2 results are in {target}; the same command goes on from there.\n"


def test_what_is_finished_needs_no_model_and_is_counted(llm, batch, monkeypatch):
    batch([{"prompt": "a"}, {"prompt": "b", "n": 0}])
    monkeypatch.setattr(arguments, "load_llm", lambda args: pytest.fail("the model was loaded"))
    code, _, err, target = batch([{"prompt": "a"}, {"prompt": "b", "n": 0}])
    assert code == 1
    assert f"Wrote 0 results to {target}. 2 results were there already. 1 line could not be run" in err


def test_another_run_is_refused_in_a_sentence_and_restart_overwrites(llm, batch):
    batch([{"prompt": "a"}])
    code, _, err, target = batch([{"prompt": "a"}], "--temperature", "0", "--dtype", "bfloat16")
    assert code == 2
    assert "(temperature=1.0 instead of 0.0, dtype='auto' instead of 'bfloat16')" in err
    assert err.count("\n") == 1
    code, _, _, _ = batch([{"prompt": "a"}], "--temperature", "0", "--restart")
    assert code == 0
    assert len(target.read_text().splitlines()) == 1


def test_what_does_not_change_results_may_change(llm, batch):
    batch([{"prompt": "a"}])
    others = ["--topology", "both=2", "--max-model-len", "99", "--decode-steps", "4", "--no-prefix-caching"]
    code, _, _, _ = batch([{"prompt": "a"}], *others)
    assert code == 0


def test_errors_are_retried_when_asked_for(llm, batch):
    llm.fail = "b"
    assert batch([{"prompt": "a"}, {"prompt": "b"}])[0] == 1
    llm.fail = None
    assert batch([{"prompt": "a"}, {"prompt": "b"}])[0] == 1
    code, _, err, target = batch([{"prompt": "a"}, {"prompt": "b"}], "--retry-errors")
    assert code == 0
    assert f"Wrote 1 result to {target}. 1 result was there already." in err


def test_a_summary_is_written(llm, batch, tmp_path):
    path = tmp_path / "summary.json"
    batch([{"prompt": "a"}, {"prompt": "b"}], "--summary", str(path), "--gpu-hour-price", "2", "--topology", "both=2")
    summary = json.loads(path.read_text())
    assert (summary["succeeded"], summary["devices"], summary["device_hour_price"]) == (2, 2, 2.0)
    assert summary["dollars"] == pytest.approx(2 * 2 * summary["seconds"] / 3600)
    batch([{"prompt": "a"}, {"prompt": "b"}], "--summary", str(path), "--gpu-hour-price", "2", "--topology", "both=2")
    assert json.loads(path.read_text()) == summary  # nothing was left to do


def test_a_summary_that_finds_no_room_leaves_none_and_is_written_by_the_next_start(llm, batch, tmp_path, monkeypatch):
    path = tmp_path / "summary.json"

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("twinmesh.scripts.batch.write_whole", full)
    code, _, err, _ = batch([{"prompt": "a"}], "--summary", str(path))
    assert code == 1
    assert err.endswith(f"twinmesh: {path}: No space left on device.\n")
    monkeypatch.undo()
    batch([{"prompt": "a"}], "--summary", str(path))
    assert json.loads(path.read_text())["succeeded"] == 1


def test_a_lone_surrogate_is_shown_as_a_question_mark(llm, batch, monkeypatch, tmp_path):
    with (tmp_path / "shown").open("w", encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        code, _, _, _ = batch([{"prompt": "a\ud800b"}], "--show", "1")
    assert code == 0
    assert "> a?b\n" in (tmp_path / "shown").read_text(encoding="utf-8")


def test_damaged_lines_are_counted(llm, batch):
    *_, target = batch([{"prompt": "a"}, {"prompt": "b"}])
    target.write_bytes(target.read_bytes()[:-20])
    _, _, err, _ = batch([{"prompt": "a"}, {"prompt": "b"}])
    assert (
        f"Wrote 1 result to {target}. 1 result was there already. 1 damaged line was taken out of it first, and" in err
    )


def test_a_price_that_is_none_is_refused_in_words(batch, capsys):
    with pytest.raises(SystemExit):
        batch([{"prompt": "a"}], "--gpu-hour-price", "nan")
    assert "argument --gpu-hour-price: 'nan' is not a price: give dollars, 0 or more" in capsys.readouterr().err


def test_a_conversation_that_ends_in_calls_is_shown(llm, batch):
    calls = {"role": "assistant", "tool_calls": []}
    llm.chat_prompt = lambda messages, tools=None: [97]
    assert batch([{"messages": [{"role": "user", "content": "q"}, calls]}], "--show", "1")[0] == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--summary", "in.jsonl"], "The summary in.jsonl is the input file"),
        (["--summary", "link"], "The summary link is the input file"),
        (["--summary", "./out.jsonl"], "The summary ./out.jsonl is the output file"),
        (["--summary", "out.jsonl.run"], "The summary out.jsonl.run is a file of the run, beside its output: give"),
        (["--decision-log", "out.jsonl.run.tmp"], "The decision log out.jsonl.run.tmp is a file of the run"),
        (["--summary", "out.pq.jsonl", "--output", "out.pq"], "The summary out.pq.jsonl is a file of the run"),
        (["--summary", "s", "--decision-log", "./s"], "The summary s is the decision log file"),
        (["--summary", "no/where"], "The summary's directory no does not exist"),
        (["--decision-log", "no/where"], "The decision log's directory no does not exist"),
        (["--summary", "."], "The summary . is a directory: give a file name."),
        (["--summary", "model/s", "--model", "model"], "The summary model/s is in the model's directory"),
        (["--summary", "cache/twinmesh/models/SmolLM2-135M-Instruct.Q4_1.gguf", "--model", "smollm2"], "model file"),
    ],
)
def test_files_written_beside_the_results_overwrite_nothing(batch, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(arguments, "load_llm", lambda args: pytest.fail("the model was loaded"))
    (tmp_path / "model").mkdir()
    (tmp_path / "in.jsonl").touch()
    (tmp_path / "link").hardlink_to("in.jsonl")
    code, _, err, _ = batch([{"prompt": "a"}], *args)
    assert code == 2
    assert says in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake.gguf", "in.jsonl", "link", "model"]


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


def test_a_deadline_and_what_to_do_when_late_reach_the_run(llm, batch):
    code, _, err, target = batch([{"prompt": "a"}], "--deadline", "90.5", "--on-late", "promote")
    assert (code, llm.deadlines) == (0, [90.5])
    assert "late" not in err.replace(str(target), "")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_deadline_that_is_no_number_above_0_is_refused_in_a_line(llm, batch, seconds, capsys):
    with pytest.raises(SystemExit) as stop:
        batch([{"prompt": "a"}], f"--deadline={seconds}")
    assert stop.value.code == 2
    assert (
        f"argument --deadline: {seconds!r} is not usable: give a number of seconds above 0" in capsys.readouterr().err
    )


def test_on_late_needs_a_deadline(llm, batch):
    code, _, err, target = batch([{"prompt": "a"}], "--on-late", "promote")
    assert code == 2
    assert "on_late='promote' needs a deadline" in err
    assert not target.exists()
