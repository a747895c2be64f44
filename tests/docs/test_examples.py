"""The scripts of docs/examples run as they are, on the CPU, and print what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import twinmesh
from twinmesh.models.checkpoints.catalog import CATALOG, cache_directory

ROOT = Path(twinmesh.__file__).parent
EXAMPLES = ROOT / "docs" / "examples"
PRINTS = {
    "offline_generation": ["The capital of France is Paris", "first token after"],
    "streaming": ["What is a glacier?", "What is a volcano?"],
    "batch_file": [
        "first run: 2 succeeded, 1 failed, 0 resumed",
        "second run: 2 succeeded, 1 failed, 3 resumed",
        "invalid_request",
    ],
    "unpredictable_load": ["set_roles: reached", "{0: 'both', 1: 'decode'}", "answers: 12 lines of the job: 8"],
    "log_probabilities": ["' Paris' -"],
    "fine_tuning": ["- lower: True", "after:"],
    "calling_tools": ["weather of Oslo in C", "answer: 7"],
    "swapping_weights": ["as trained: ' Paris", "2 hand-offs moved", "0 compilations"],
}


def test_every_example_is_run():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(PRINTS)


LONG = ("fine_tuning",)  # gradients of the whole model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in PRINTS]
)
@pytest.mark.skipif(
    not CATALOG["smollm2"].cached(cache_directory()).exists(), reason="needs the model: twinmesh fetch smollm2"
)
def test_an_example_runs_and_prints_what_it_promises(name, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)  # this suite's own devices; a user has none
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for text in PRINTS[name]:
        assert text in done.stdout
