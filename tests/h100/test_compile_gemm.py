"""What the GPU compiler says of the experimental product of few rows, without a GPU; `compile.py` in a process."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PLUGIN = Path(sys.prefix) / "h100"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None and not (PLUGIN / "jax_cuda12_plugin").exists(),
    reason="jax's CUDA plugin is not in .venv/h100: scripts/test.sh installs it",
)

PRODUCT = "__import__('twinmesh.scripts.gpu_gemm', fromlist=['gpu_gemm']).skinny_matmul(x, weight, cores=132)"
JOB = "compiled(lambda x, weight: {}, *(shape(*s, dtype=jnp.bfloat16) for s in (({}, {}), ({}, {}))))"


def test_the_product_of_few_rows_spills_no_registers_and_its_products_stay_asynchronous():
    jobs = [JOB.format(PRODUCT, rows, k, k, n) for rows, k, n in ((1, 4096, 4096), (128, 12288, 4096))]
    path = [str(PLUGIN), *(entry for entry in sys.path if entry), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / "compile.py"), *jobs], env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    assert spills == [("0", "0")] * len(jobs)
    assert "C7510" not in done.stdout  # ptxas: wgmma was serialised
