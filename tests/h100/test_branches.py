"""No program of a step has a branch that a GPU would ask the host about: `branches.py` in a process of its own.

XLA's GPU backend copies the predicate of a `conditional`, and of a `while` whose number of turns it does not know, to
the host and waits for it; with it waits the thread that dispatches to every mesh.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import twinmesh

HERE = Path(__file__).parent
PLUGIN = Path(sys.prefix) / "h100"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None and not (PLUGIN / "jax_cuda12_plugin").exists(),
    reason="jax's CUDA plugin is not in .venv/h100: scripts/test.sh installs it",
)

STEPS = [f"{kind}({name!r})" for kind in ("decode", "prefill") for name in ("qwen3-8b", "llama-3.1-8b")]
STAGES = {"adjust": [], "top_k": [32], "top_p": [32], "draw": [], "score": []}  # loops, and how often each turns


@pytest.fixture(scope="module")
def found():
    jobs = [*STEPS, *(f"stage({name!r})" for name in STAGES)]
    root = Path(twinmesh.__file__).parent
    path = [str(PLUGIN), *(entry for entry in sys.path if entry), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / "branches.py"), *jobs], cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    reports = {}
    for part in done.stdout.split("@@ ")[1:]:
        head, said = part.split("\n", 1)
        reports[json.loads(head)["job"]] = json.loads(re.search(r"^## (.*)$", said, re.MULTILINE)[1])
    return reports


@pytest.mark.parametrize("step", STEPS)
def test_a_step_which_is_all_that_a_greedy_batch_runs_has_no_branch_and_no_loop(found, step):
    assert found[step]["conditionals"] == 0
    assert found[step]["trips"] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_sampling_has_no_branch_and_only_loops_of_known_length(found, stage):
    facts = found[f"stage({stage!r})"]
    assert facts["conditionals"] == 0
    assert facts["trips"] == STAGES[stage]
    # The 20 most likely tokens that scores report are found by a sort.
    assert facts["sorts"] == (1 if stage == "score" else 0)
