"""Products and the real small model once more, in a process in which numba is not installed."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
PART = [
    "kernels/test_matmul.py::test_it_is_the_product_with_the_dequantised_weights",
    "engine/test_smollm2.py::test_the_capital_of_france",
]


def test_products_and_a_real_model_are_right_without_numba():
    files = [str(TESTS / part) for part in PART]
    options = ["-q", "-k", "not prefill", "-p", "helpers.no_numba", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["--ignore", str(__file__)]
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout.splitlines()[-1]
    assert "skipped" in done.stdout.splitlines()[-1]  # what needs a kernel
