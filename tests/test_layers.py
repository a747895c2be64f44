"""Who may import whom: `.importlinter` says it, and every rule there finds a wrong import that is planted."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import twinmesh

ROOT = Path(twinmesh.__file__).parent
# Rooms of the engine on neither side of the protocol: they start both, or are there for callers.
AROUND = {"batch", "benchmark", "evaluation", "api", "startup", "options", "chat"}
FOLDERS = ("engine", "kernels_pallas", "models", "scripts")
PLANTED = {
    "package": ("models/layers.py", "from ..engine.config import EngineConfig"),
    "engine": ("engine/paging/allocator.py", "from ..scheduler.request import Request"),
    "models": ("models/layers.py", "from .text.tokenizer import Tokenizer"),
    "device-plane": ("engine/worker/steps.py", "from ..scheduler.request import Request"),
    "control-plane": ("engine/scheduler/scheduler.py", "import jax"),
    "batch": ("engine/batch/session.py", "from ..scheduler.scheduler import Scheduler"),
    "report-page": ("engine/benchmark/page/page.py", "from ...core.loop import Loop"),
    "checkpoints": ("models/checkpoints/orbax.py", "from .open import open_checkpoint"),
}


def lint(root, *arguments):
    """`lint-imports` on the package that lies in `root`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run(
        [*command, "--no-cache", "--no-logo", *arguments, str(ROOT / ".importlinter")],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def package(tmp_path):
    """A copy of the package that a test may spoil."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / "twinmesh" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("__init__.py", "__main__.py", "eval.py"):
        shutil.copy(ROOT / file, tmp_path / "twinmesh")
    return tmp_path


def contracts():
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    return config, {name.split(":")[2] for name in config.sections() if name.count(":") == 2}


def test_imports_keep_to_the_layers(package):
    done = lint(package)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", PLANTED)
def test_a_wrong_import_is_found(package, rule):
    name, line = PLANTED[rule]
    file = package / "twinmesh" / name
    docstring, rest = file.read_text().split('"""\n', 1)
    file.write_text(f'{docstring}"""\n{line}\n{rest}')
    done = lint(package, "--contract", rule)
    assert done.returncode == 1, done.stdout + done.stderr
    importer = "twinmesh." + name.removesuffix(".py").replace("/", ".")
    assert f"{importer} -> " in " ".join(done.stdout.split())


def test_an_import_for_types_alone_counts(package):
    file = package / "twinmesh" / "engine" / "scheduler" / "scheduler.py"
    file.write_text(file.read_text() + "\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import jax\n")
    assert lint(package, "--contract", "control-plane").returncode == 1


def test_a_room_that_is_on_no_floor_is_found(package):
    (package / "twinmesh" / "engine" / "annex").mkdir()
    (package / "twinmesh" / "engine" / "annex" / "__init__.py").write_text("")
    done = lint(package, "--contract", "engine")
    assert done.returncode == 1
    assert "annex" in done.stdout


def test_every_rule_is_tried_and_none_has_exceptions():
    config, rules = contracts()
    assert rules == set(PLANTED)
    assert not any("ignore_imports" in section for section in config.values())


def test_every_room_of_the_engine_decides_or_does_or_is_around_both():
    config, _ = contracts()
    rooms = {*re.findall(r"\w+", config["importlinter:contract:engine"]["layers"])}
    decides, does = (
        {name.split(".")[2] for name in config[f"importlinter:contract:{plane}"]["source_modules"].split()
         if name.count(".") == 2}
        for plane in ("control-plane", "device-plane")
    )  # fmt: skip
    assert decides | does | AROUND == rooms
    assert len(decides) + len(does) + len(AROUND) == len(rooms)
