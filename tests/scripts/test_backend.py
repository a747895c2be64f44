"""A machine without the backend that was asked for: one sentence, and exit code 2, because nothing was done."""

import os
import subprocess
import sys

import jax
import pytest
from helpers.batch_files import BatchFiles, prompts
from twinmesh.engine.sharding.mesh import build_meshes, find_devices
from twinmesh.engine.topology import Topology
from twinmesh.scripts import arguments, cli


def command(tmp_path, args, **environment):
    """A command in a process of its own, which has not chosen a backend yet."""
    return subprocess.run(
        [sys.executable, "-m", "twinmesh", *map(str, args)], cwd=tmp_path, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def assert_refused(done, names):
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith(f"twinmesh: JAX cannot use the devices that {names} asks for"), done.stderr
    assert said.endswith("or set JAX_PLATFORMS=cpu to run on the CPU.")
    assert done.returncode == 2
    assert "internal failure" not in done.stderr
    assert done.stdout == ""


def test_a_batch_run_is_refused_and_leaves_no_file(tmp_path, tiny_path):
    files = BatchFiles(tmp_path)
    files.write(prompts(1))
    args = ["batch", "--model", tiny_path, "--input", "in.jsonl", "--output", "out.jsonl"]
    assert_refused(command(tmp_path, args, JAX_PLATFORMS="rocm"), "JAX_PLATFORMS=rocm")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_benchmark_that_asks_jax_itself_is_refused_alike(tmp_path):
    assert_refused(command(tmp_path, ["bench", "dtype"], JAX_PLATFORMS="tpu"), "JAX_PLATFORMS=tpu")


def test_a_conversion_is_refused_and_leaves_no_directory(tmp_path, tiny_path):
    done = command(tmp_path, ["convert", tiny_path, "out"], JAX_PLATFORMS="nonsense")
    assert_refused(done, "JAX_PLATFORMS=nonsense")
    assert list(tmp_path.iterdir()) == []


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Unable to initialize backend 'rocm': x. (set JAX_PLATFORMS='' to automatically choose)"),
         r" \(Unable to initialize backend 'rocm': x\)"),
        (RuntimeError("Unknown backend cuda.\nAvailable backends are ['cpu']"),
         r" \(Unknown backend cuda\. Available backends are \['cpu'\]\)"),
        (AssertionError(), ""),
        (Broken("CUDA_ERROR_NO_DEVICE"), r" \(CUDA_ERROR_NO_DEVICE\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX_PLATFORMS=cuda"),
        ({"JAX_PLATFORM_NAME": "gpu"}, "JAX_PLATFORM_NAME=gpu"),
        ({"JAX_PLATFORMS": "cuda", "JAX_PLATFORM_NAME": "gpu"}, "JAX_PLATFORMS=cuda and JAX_PLATFORM_NAME=gpu"),
    ],
)
def test_whatever_jax_raises_is_a_sentence_that_names_who_asked(error, reason, environment, shown, monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    says = rf"^JAX cannot use the devices that {shown} asks for{reason}: install their plugin, .*\.$"
    with pytest.raises(ValueError, match=says):
        build_meshes(Topology.parse("both=1"))
    with pytest.raises(ValueError, match=says):
        find_devices()


def test_a_machine_on_which_jax_finds_nothing_by_itself_is_told_what_to_set(monkeypatch):
    def fail():
        raise RuntimeError("no luck")

    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(ValueError, match=r"^JAX finds no device to run on \(no luck\): set JAX_PLATFORMS=cpu"):
        find_devices()


def test_a_bug_on_a_machine_that_has_its_backend_is_still_called_one(monkeypatch, capsys):
    def fail(args, only=None):
        raise RuntimeError("surprise")

    monkeypatch.setattr(arguments, "load_llm", fail)
    assert cli.main(["generate", "--model", "x", "--prompt", "y"]) == 1
    assert "internal failure, RuntimeError: surprise" in capsys.readouterr().err
