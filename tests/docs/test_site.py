"""The site of the documentation: built strictly, without network, with every public name in the reference."""

import subprocess
import sys
from pathlib import Path

import pytest
import twinmesh
from twinmesh.engine.options import documentation

ROOT = Path(twinmesh.__file__).parent
# A connection would raise; what needs one must not be part of a build.
BUILD = """
import socket, sys
def refuse(*_): raise OSError("the build asked for the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--config-file", sys.argv[1], "--site-dir", sys.argv[2]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. The reference looks for the package under its own name, as scripts/docs.sh makes it."""
    if not (ROOT / ".venv" / "mypy" / "twinmesh").exists():
        pytest.fail("the folder .venv/mypy/twinmesh is missing: run scripts/test.sh or scripts/docs.sh once")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", BUILD, str(ROOT / ".mkdocs.yml"), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_public_name_is_in_the_reference(site):
    pages = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    names = [f"twinmesh.{name}" for name in twinmesh.__all__]
    names += ["twinmesh.engine.batch.run", "twinmesh.engine.batch.Batch"]
    assert [name for name in names if f'id="{name}"' not in pages] == []


def test_every_option_of_the_engine_is_described(site):
    page = (site / "reference" / "options.html").read_text()
    for option in documentation():
        assert f"<code>{option}</code>" in page
