"""The command `twinmesh`: help, exit codes, and one line instead of a traceback."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import twinmesh
from twinmesh.engine.errors import BatchStopped, EngineError
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.startup import build
from twinmesh.engine.topology import Topology
from twinmesh.scripts import arguments
from twinmesh.scripts.bench.command import BENCHMARKS
from twinmesh.scripts.cli import COMMANDS, main

SCRIPTS = Path(twinmesh.__file__).parent / "scripts"
STARTING = ("generate", "batch", "eval", "profile")
LINE = '{"prompt": "a"}\n'


def python(*args, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: twinmesh " + command in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_only_a_command_that_starts_an_engine_says_that_its_topology_may_be_auto(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert ("auto chooses from model" in " ".join(capsys.readouterr().out.split())) == (command in STARTING)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", name, "--help"])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_help_and_refusals_need_neither_jax_nor_the_simulator(tmp_path):
    program = (
        "import sys; from twinmesh.scripts.cli import main\n"
        "assert main(['generate', '--model', 'x', '--prompt', '']) == 2\n"
        "assert main(['batch', '--model', 'x', '--input', 'missing', '--output', 'out']) == 2\n"
        "assert not {'jax', 'twinmesh.engine.simulation.simulator'} & set(sys.modules)"
    )
    done = python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["batch", "generate"])
def test_a_script_run_as_a_file_is_the_same_command(name, tmp_path, capsys):
    done = python(SCRIPTS / f"{name}.py", "--help", cwd=tmp_path)
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert done.stdout.split() == capsys.readouterr().out.split()
    assert done.stderr == ""


def test_bad_input_to_a_script_is_one_line_without_a_traceback(tmp_path):
    done = python(SCRIPTS / "batch.py", "--model", "m", "--input", "no", "--output", "o", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "twinmesh: The input no cannot be read: No such file or directory.\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["generate", "--prompt", "x"], "--model"),
        (["generate", "--model", "m", "--topology", "both=zero"], "both=zero"),
        (["generate", "--model", "m", "--topology", "prefill=1"], "no decode mesh"),
        (["generate", "--model", "m", "--dtype", "int3"], "int3"),
        (["batch", "--model", "m", "--input", "i", "--output", "o", "--policy", "sfp"], "the nearest is 'spf'."),
        (["generate", "--model", "m", "--max-tokens", "many"], "many"),
        (["generate", "--model", "m", "--decode-steps", "few"], "few"),
        (["generate", "--model", "m", "--max-model-len", "0"], "'0' is not a whole number, 1 or more"),
        (["generate", "--model", "m", "--stop"], "--stop"),
        (["generate", "--model", "m", "--memory-fraction", "1.5"], "'1.5' is not a number above 0 and at most 1"),
        (["batch", "--model", "m", "--memory-fraction", "x"], "'x' is not a number above 0 and at most 1"),
        (["generate", "--model", "m", "--prefill-buckets", "16,x"], "'x' is not a whole number, 1 or more"),
        (["generate", "--model", "m", "--topologie", "both=1"], "no argument --topologie: the nearest is --topology."),
        (["batch", "--model", "m", "--input", "i", "--output", "o", "--restat"], "the nearest is --restart."),
        (["generate", "--model", "m", "--xyz=1"], "there is no argument --xyz. "),
        (
            ["batch", "--model", "m", "--input", "i", "--output", "o", "--show", "-1"],
            "'-1' is not a whole",
        ),
        (["batch", "--model", "m", "--output", "o"], "--input"),
        (["batch", "--model", "m", "--input", "i", "--output", ""], "argument --output: it is empty: give a name"),
        (["batch", "--model", "m", "--input", "i", "--output", "o", "--gpu-hour-price", "-1"], "-1"),
        (["bench", "dance"], "dance"),
    ],
)
def test_bad_arguments_are_one_line(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--temperature", "nan"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--top-k", "-2"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
        ("--presence-penalty", "3"),
        ("--frequency-penalty", "-3"),
        ("--max-tokens", "0"),
        ("--min-tokens", "257"),
        ("--stop", ""),
        ("--seed", "-2"),
    ],
)
def test_sampling_values_out_of_range_are_refused_before_the_model_is_loaded(name, value, capsys, monkeypatch):
    monkeypatch.setattr(arguments, "load_llm", lambda args, only=None: pytest.fail("the model was loaded"))
    assert main(["generate", "--model", "m", "--prompt", "x", name, value]) == 2
    err = capsys.readouterr().err
    assert "is not usable: it must be" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["batch", "--input", "i", "--output", "o"]])
def test_engine_arguments_reach_the_engine(command, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    given = {}

    def record(options, only=None):
        given.update(vars(options))
        raise Stop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "start_engine", record)
    (tmp_path / "i").write_text(LINE)
    (tmp_path / "m.gguf").write_text("a model")
    start = [*command, "--model", "m.gguf"]
    assert main(start) == 1
    defaults = {field.name: field.default for field in fields(EngineOptions)}
    assert given == defaults | {"model": "m.gguf", "topology": Topology.parse("both=1"), "progress": True}
    given.clear()
    main([*start, "--topology", "both=2", "--dtype", "bfloat16", "--max-model-len", "64", "--deterministic",
          "--decode-steps", "4", "--no-prefix-caching", "--decision-log", "run.log", "--page-size", "16",
          "--max-num-seqs", "8", "--prefill-buckets", "16,32", "--decode-buckets", "8", "--kv-cache-bytes", "4096",
          "--memory-fraction", "0.25", "--kv-cache-dtype", "int8/fp8",
          "--max-retries", "0", "--age-seconds", "5", "--max-waiting", "9", "--max-waiting-tokens", "999",
          "--policy", "spf", "--allow-nonfinite", "--no-mmap", "--serve-early",
          "--logprobs-mode", "raw_logits", "--max-logprobs=-1", "--workers", "processes", "--worker-timeout", "2",
          "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"])  # fmt: skip
    assert given == {
        "seed": 0, "devices": None, "serve_early": True,
        "model": "m.gguf", "topology": Topology.parse("both=2"), "dtype": "bfloat16", "max_model_len": 64,
        "deterministic": True, "decode_steps": 4, "enable_prefix_caching": False, "decision_log": "run.log",
        "page_size": 16, "max_num_seqs": 8, "prefill_buckets": (16, 32), "decode_buckets": (8,), "kv_cache_bytes": 4096,
        "memory_fraction": 0.25,
        "max_retries": 0, "age_seconds": 5.0, "max_waiting": 9, "max_waiting_tokens": 999,
        "roles": None, "slo": None,
        "policy": "spf", "allow_nonfinite": True, "mmap": False, "progress": True,
        "quantization": "auto", "activations": "int16", "kv_cache_dtype": "int8/fp8",
        "logprobs_mode": "raw_logits", "max_logprobs": -1,
        "hf_overrides": None, "profile_dir": "twinmesh_profile",
        "workers": "processes", "worker_timeout": 2.0, "workers_per_mesh": 1, "ray_address": None, "mesh_hosts": None,
        "tool_call_parser": "hermes", "reasoning_parser": "qwen3",
    }  # fmt: skip


@pytest.mark.parametrize(("log", "role"), [("i", "input"), ("./o", "output"), ("m.gguf", "model")])
def test_a_decision_log_overwrites_nothing_else(log, role, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments, "load_llm", lambda args, only=None: pytest.fail("the model was loaded"))
    (tmp_path / "i").write_text(LINE)
    files = ["--model", "m.gguf", "--input", "i", "--output", "o"]
    assert main(["batch", *files, "--decision-log", log]) == 2
    said = capsys.readouterr().err
    assert said == f"twinmesh: The decision log {log} is the {role} file: give another name.\n"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("The model is no model."), 2, "twinmesh: The model is no model.\n"),
        (BatchStopped("The disk is full."), 3, "twinmesh: The disk is full.\n"),
        (EngineError("the engine is closed: make a new LLM."), 1, "twinmesh: the engine is closed: make a new LLM.\n"),
        (OSError(28, "No space left on device", "out"), 1, "twinmesh: out: No space left on device.\n"),
        (OSError(28, "No space left on device"), 1, "twinmesh: No space left on device.\n"),
        (KeyboardInterrupt(), 130, "twinmesh: Stopped.\n"),
    ],
)
def test_announced_errors_become_a_sentence_and_an_exit_code(error, code, says, capsys, monkeypatch):
    def fail(args, only=None):
        raise error

    monkeypatch.setattr(arguments, "load_llm", fail)
    assert main(["generate", "--model", "m", "--prompt", "x"]) == code
    assert capsys.readouterr().err == says


def test_a_bug_is_called_one_in_a_sentence_without_a_traceback(monkeypatch, capsys):
    def fail(args, only=None):
        raise RuntimeError("surprise")

    monkeypatch.setattr(arguments, "load_llm", fail)
    assert main(["generate", "--model", "x", "--prompt", "y"]) == 1
    said = capsys.readouterr().err
    assert "internal failure, RuntimeError: surprise" in said
    assert "Traceback" not in said


def test_the_package_is_the_command_as_well(tmp_path):
    done = python("-m", "twinmesh", "--version", cwd=tmp_path)
    assert done.stdout == f"twinmesh {twinmesh.__version__}\n", done.stderr
    done = python("-m", "twinmesh", "generate", "--model", "m", "--prompt", "", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
