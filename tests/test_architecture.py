"""Rules of the layout that a reader may rely on."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import twinmesh

ROOT = Path(twinmesh.__file__).parent
BY_NAME = {
    "getattr", "setattr", "hasattr", "delattr", "patch", "object", "multiple", "setitem", "delitem", "attrgetter",
    "methodcaller",
}  # fmt: skip
# Private names that strings may hold.
ALLOWED = {
    "_value",  # JAX's: what an array's read on the host goes through, without a public hook
    "_fields",  # of named tuples, which have public names like this
}


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_one_cpu_device_in_use_and_two_meshes_names_the_line_to_put_first(tmp_path):
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 1); jax.devices()\n"
        "from twinmesh.engine.topology import Topology\n"
        "from twinmesh.engine.sharding.mesh import build_meshes\n"
        "try: build_meshes(Topology.parse('prefill=1,decode=1'))\n"
        "except ValueError as error: print(error)"
    )
    done = run(code, tmp_path)
    assert 'import jax; jax.config.update("jax_num_cpu_devices", 2)' in done.stdout, done.stderr


def test_devices_are_made_ready_where_jax_is_not_in_use_yet(tmp_path):
    code = (
        "from twinmesh.engine.topology import Topology\n"
        "from twinmesh.engine.sharding.mesh import build_meshes\n"
        "print(len(build_meshes(Topology.parse('prefill=2,decode=1'))))"
    )
    done = run(code, tmp_path)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize(
    ("chosen", "topologies", "devices"),
    [
        ("", ["both=1", "prefill=1,decode=1", "both=2"], {min(max(os.cpu_count(), 2), 8)}),
        ("", ["both=9", "both=1xtp9"], {9}),
        ("jax.config.update('jax_num_cpu_devices', 3)", ["both=1", "both=3", "prefill=1,decode=1"], {3}),
    ],
)
def test_topologies_of_few_devices_run_in_processes_of_as_many_so_that_they_share_programs(
    chosen, topologies, devices, tmp_path
):
    code = (  # imports take most of the time, and processes that come from one share them
        f"import os, jax; {chosen}\n"
        "from twinmesh.engine.config import Topology\n"
        "from twinmesh.engine.sharding.mesh import build_meshes\n"
        f"for topology in {topologies}:\n"
        "    if not (child := os.fork()):\n"
        "        build_meshes(Topology.parse(topology)); print(len(jax.devices()), flush=True); os._exit(0)\n"
        "    os.waitpid(child, 0)"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    found = list(map(int, done.stdout.split()))
    assert len(found) == len(topologies), done.stderr
    assert {*found} == devices


def private_names(source):
    """Private names that code reaches by a string or an import, which a linter for private access does not see."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in BY_NAME:
                if not (node.args and isinstance(node.args[0], ast.Name) and node.args[0].id in ("self", "cls")):
                    found += [text for argument in node.args for text in texts(argument)]
                    found += [keyword.arg or "" for keyword in node.keywords]
            case ast.Subscript() | ast.Compare() if any(map(is_namespace, ast.walk(node))):
                found += texts(node)
            case ast.ImportFrom(module=module) if (module or "").startswith(("twinmesh", "helpers")):
                found += [alias.name for alias in node.names]
    return [name for name in found if re.fullmatch(r"([\w.]+\.)?_(?!_)\w*", name)]


def texts(node):
    """The strings in a node; of one that is put together, its beginning."""
    inner = {id(part) for n in ast.walk(node) if isinstance(n, ast.JoinedStr) for part in n.values[1:]}
    strings = (n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [n.value for n in strings if id(n) not in inner]


def is_namespace(node):
    """`vars(x)` or `x.__dict__`."""
    return (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars") or (
        isinstance(node, ast.Attribute) and node.attr == "__dict__"
    )


@pytest.mark.parametrize("folder", ["tests", "scripts"])
def test_no_string_reaches_a_private_name(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): private_names(file.read_text()) for file in files}
    assert {file: left for file, names in found.items() if (left := sorted({*names} - ALLOWED))} == {}


@pytest.mark.parametrize(
    "source",
    [
        'getattr(core, "_take")',
        'getattr(core, f"_{name}")',
        'patch("twinmesh.engine.core._take", f)',
        'patch.object(core, "_take")',
        "patch.multiple(core, _take=f)",
        'monkeypatch.setattr(core, "_take", f)',
        'monkeypatch.setattr("twinmesh.engine.core._take", f)',
        'vars(core)["_take"]',
        '"_take" in vars(core)',
        'core.__dict__["_take"]',
        "from twinmesh.engine.core import _take",
    ],
)
def test_a_private_name_reached_by_a_string_is_found(source):
    assert len(private_names(source)) == 1


@pytest.mark.parametrize("source", ['getattr(self, f"_{name}")', 'getattr(core, "__class__")', 'vars(core)["take"]'])
def test_what_is_public_or_ones_own_is_not(source):
    assert private_names(source) == []
