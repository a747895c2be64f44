"""`twinmesh generate`, against an engine that repeats the prompt."""

import io
import os
import sys

import pytest
from helpers.fake_llm import FakeLLM
from helpers.tiny_gguf import write_tiny_gguf
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.startup import build
from twinmesh.scripts import arguments
from twinmesh.scripts.cli import main


@pytest.fixture
def llm(monkeypatch):
    llm = FakeLLM()
    monkeypatch.setattr(arguments, "load_llm", lambda args, only=None: llm)
    return llm


def generate(*args):
    return main(["generate", "--model", "fake", *args])


def test_the_answer_goes_to_stdout_and_the_figures_to_stderr(llm, capsys):
    assert generate("--prompt", "hello") == 0
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert err == "[5 tokens, first after 100 ms, then 100 tokens/s]\n"
    assert llm.is_closed


def test_the_answer_is_written_piece_by_piece(llm, monkeypatch):
    class Recorder(io.StringIO):
        pieces: list[str] = []  # noqa: RUF012

        def flush(self):
            self.pieces.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Recorder())
    generate("--prompt", "abc")
    assert Recorder.pieces[:3] == ["a", "ab", "abc"]


def test_the_prompt_comes_from_stdin_where_none_is_given(llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert generate() == 0
    assert capsys.readouterr().out == "two\nlines\n"


def test_chat_puts_the_prompt_through_the_template(llm, capsys):
    assert generate("--prompt", "hi", "--chat") == 0
    assert capsys.readouterr().out == "\x01hi\n"


def test_a_chat_may_have_another_template_and_variables(llm, tmp_path, capsys):
    file = tmp_path / "other.jinja"
    file.write_text("{{ messages }}é", encoding="utf-8")
    given = ["--chat-template", str(file), "--chat-template-kwargs", '{"enable_thinking": false}']
    assert generate("--prompt", "hi", "--chat", *given) == 0
    assert llm.chat_options == [
        {"chat_template": "{{ messages }}é", "chat_template_kwargs": {"enable_thinking": False}}
    ]
    assert generate("--prompt", "hi", *given) == 2
    assert "are for conversations: add --chat." in capsys.readouterr().err
    assert generate("--prompt", "hi", "--chat", "--chat-template", str(tmp_path / "no.jinja")) == 2
    assert "no.jinja cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[1]", "3", "enable_thinking=false"])
def test_variables_of_a_template_that_are_no_json_object_are_refused(llm, capsys, text):
    with pytest.raises(SystemExit) as ended:
        generate("--prompt", "hi", "--chat", "--chat-template-kwargs", text)
    assert ended.value.code == 2
    assert "is not a JSON object" in capsys.readouterr().err


def test_sampling_arguments_reach_the_engine(llm):
    values = dict(
        max_tokens=9, min_tokens=3, temperature=0.5, top_p=0.9, top_k=40, min_p=0.05, seed=7,
        repetition_penalty=1.1, presence_penalty=-0.5, frequency_penalty=0.25,
    )  # fmt: skip
    given = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    generate("--prompt", "x", *given, "--stop", "\n\n", "--stop", "END", "--ignore-eos")
    assert llm.sampling == [SamplingParams(**values, stop=["\n\n", "END"], ignore_eos=True)]


def test_without_sampling_arguments_the_most_likely_token_is_taken(llm):
    generate("--prompt", "x")
    assert llm.sampling == [SamplingParams(temperature=0, max_tokens=256)]


@pytest.mark.parametrize("stdin", ["", "\n"])
def test_an_empty_prompt_is_refused(llm, capsys, monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    assert generate() == 2
    assert capsys.readouterr().err == "twinmesh: The prompt is empty: give a text with --prompt, or on stdin.\n"


@pytest.mark.parametrize("chat", [[], ["--chat"]])
@pytest.mark.parametrize(("limit", "said"), [([], 512), (["--max-model-len", "32"], 32)])
def test_a_prompt_that_is_too_long_is_refused_before_the_weights_are_loaded(
    capsys, monkeypatch, tmp_path, chat, limit, said
):
    monkeypatch.setattr(build, "load_weights", lambda *args, **kwargs: pytest.fail("the weights were loaded"))
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    prompt = "hello " * 200
    assert main(["generate", "--model", str(model), "--prompt", prompt, *chat, *limit]) == 2
    err = capsys.readouterr().err
    assert f"max_model_len={said} must hold it" in err or f"{said} tokens is the most there is room for" in err
    assert ": shorten it" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("log", [[], ["--decision-log", "log"]])
def test_a_model_whose_name_is_too_long_is_refused(capsys, log):
    assert main(["generate", "--model", "x" * 300, "--prompt", "hi", *log]) == 2
    assert capsys.readouterr().err == f"twinmesh: The model {'x' * 300} cannot be used: File name too long.\n"


def test_a_decision_log_whose_name_is_too_long_is_refused(llm, capsys):
    assert generate("--prompt", "hi", "--decision-log", "x" * 300) == 2
    assert capsys.readouterr().err == f"twinmesh: The decision log {'x' * 300} cannot be used: File name too long.\n"


def test_stdin_that_is_not_text_is_refused(llm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert generate() == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_an_argument_that_is_not_text_is_refused(llm, capsys):
    assert generate("--prompt", "a\udcff") == 2
    assert capsys.readouterr().err == "twinmesh: The prompt is not UTF-8 text: convert it to UTF-8.\n"
    assert llm.sampling == []


def test_a_request_that_fails_is_one_line_and_exit_code_1(llm, capsys):
    llm.fail = "x"
    assert generate("--prompt", "x") == 1
    assert capsys.readouterr().err == "twinmesh: the mesh was lost.\n"


def test_ctrl_c_stops_with_130_and_keeps_what_was_written(llm, capsys):
    llm.interrupt_after = 2
    assert generate("--prompt", "hello") == 130
    out, err = capsys.readouterr()
    assert out == "he"
    assert err == "twinmesh: Stopped.\n"
    assert llm.is_closed


def test_a_reader_that_went_away_is_no_error(llm, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert generate("--prompt", "hello") == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
