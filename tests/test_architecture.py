"""Rules of the layout that a reader may rely on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import twinmesh

ROOT = Path(twinmesh.__file__).parent
CONTROL_PLANE = [
    "scheduler.admission",
    "config",
    "scheduler.decision_log",
    "scheduler.handoffs",
    "paging.block_hash",
    "paging.mesh_pages",
    "scheduler.mesh_state",
    "metrics.metrics",
    "api.outputs",
    "paging.allocator",
    "protocol.actions",
    "scheduler.request",
    "scheduler.batching",
    "scheduler.lifecycle",
    "scheduler.policy",
    "api.sampling_params",
    "protocol.events",
    "protocol.executor",
    "protocol.results",
    "protocol.sampling_plan",
    "protocol.timeline",
    "protocol.wire",
    "scheduler.scheduler",
    "paging.block_table",
    "core.engine_core",
    "core.running_request",
    "core.submission",
    "simulation.replay",
    "metrics.counters",
]
LAYERS = ["kernels_pallas", "models", "engine", "scripts"]


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_the_control_plane_imports_no_jax_not_even_indirectly(tmp_path):
    names = ", ".join(f"twinmesh.engine.{name}" for name in CONTROL_PLANE)
    code = f"import sys, {names}; print([m for m in sys.modules if m in ('jax', 'flax')])"
    done = run(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_dependencies_point_one_way(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for file in (ROOT / layer).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            assert module.split(".")[0] not in above, f"{file} imports {module}"


def test_one_cpu_device_in_use_and_two_meshes_names_the_line_to_put_first(tmp_path):
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 1); jax.devices()\n"
        "from twinmesh.engine.config import Topology\n"
        "from twinmesh.engine.sharding.mesh import build_meshes\n"
        "try: build_meshes(Topology.parse('prefill=1,decode=1'))\n"
        "except ValueError as error: print(error)"
    )
    done = run(code, tmp_path)
    assert 'import jax; jax.config.update("jax_num_cpu_devices", 2)' in done.stdout, done.stderr


def test_devices_are_made_ready_where_jax_is_not_in_use_yet(tmp_path):
    code = (
        "from twinmesh.engine.config import Topology\n"
        "from twinmesh.engine.sharding.mesh import build_meshes\n"
        "print(len(build_meshes(Topology.parse('prefill=2,decode=1'))))"
    )
    done = run(code, tmp_path)
    assert done.stdout.strip() == "3", done.stderr
