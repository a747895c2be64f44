"""Runs the programs of this folder, which compile for H100s, in processes of their own, once for all workers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import twinmesh
from helpers.once import once

HERE = Path(__file__).parent
PLUGIN = Path(sys.prefix) / "h100"


def run(program, jobs):
    """job -> the facts that the program printed of it."""
    path = [str(PLUGIN), *(entry for entry in sys.path if entry), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / program), *jobs], cwd=Path(twinmesh.__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    reports = {}
    for part in done.stdout.split("@@ ")[1:]:
        head, said = part.split("\n", 1)
        facts = re.search(r"^## (.*)$", said, re.MULTILINE)
        reports[json.loads(head)["job"]] = json.loads(facts[1])
    return reports


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Compiles the jobs of a program of this folder: job -> facts. Skips where there is no compiler for H100s."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None and not (PLUGIN / "jax_cuda12_plugin").exists():
        pytest.skip("jax's CUDA plugin is not in .venv/h100: scripts/test.sh installs it")
    return lambda program, jobs: once(tmp_path_factory, repr((program, jobs)), lambda: run(program, jobs))
