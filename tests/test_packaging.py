"""The package as others meet it: imported next to their own folders, and as a wheel."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import twinmesh

FOLDERS = ("engine", "kernels_pallas", "models", "scripts")
ROOT = Path(twinmesh.__file__).parent
# What begins with packages of extras that this environment may lack: GuideLLM's, and lm-evaluation-harness's.
OF_EXTRAS = {"twinmesh.engine.benchmark.guidellm_backend", "twinmesh.engine.evaluation.harness"}


def python(program, cwd):
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, check=False)


def test_it_imports_beside_a_users_own_models_and_engine_folders(tmp_path):
    for name in ("models", "engine", "scripts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"OWNER = 'user of {name}'")
    program = (
        "import models, engine, scripts; from twinmesh import SamplingParams, Topology\n"
        "print(models.OWNER, SamplingParams.__module__)"
    )
    done = python(program, tmp_path)
    assert done.stdout.split() == ["user", "of", "models", "twinmesh.engine.api.sampling_params"], done.stderr


def test_importing_it_pulls_in_no_jax(tmp_path):
    done = python("import sys, twinmesh; print('jax' in sys.modules, 'numpy' in sys.modules)", tmp_path)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_every_public_name_is_there():
    assert all(hasattr(twinmesh, name) for name in twinmesh.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves files in the source folder."""
    copy, out = tmp_path_factory.mktemp("source") / "any-name", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "out", "dist", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"twinmesh", f"twinmesh-{version('twinmesh')}.dist-info"}
    assert not [name for name in names if "test" in name]
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.py")}
    sources = {name for name in sources if name.split("/")[0] in FOLDERS}
    assert {f"twinmesh/{name}" for name in sources} <= set(names)


def test_the_wheel_holds_what_modules_read_beside_themselves(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    read = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".css", ".js", ".json", ".jsonl")
    }
    assert {"engine/benchmark/page/page.css", "engine/benchmark/page/page.js", "kernels_pallas/tiles.json"} <= read
    assert {f"twinmesh/{name}" for name in read} <= names


def test_the_wheel_says_that_it_is_typed(wheel):
    assert "twinmesh/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_every_module_of_the_installed_wheel_imports(wheel, tmp_path):
    """Its dependencies are those of this environment, without packages of some extras; the package itself is the
    wheel's."""
    installed = tmp_path / "installed"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(installed),
        str(wheel),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    program = (
        f"import importlib, pkgutil, sys; sys.path.insert(0, {str(installed)!r}); import twinmesh\n"
        "for module in pkgutil.walk_packages(twinmesh.__path__, 'twinmesh.'):\n"
        f"    if module.name not in {OF_EXTRAS!r}:\n"
        "        print(module.name, importlib.import_module(module.name).__file__)\n"
    )
    done = python(program, tmp_path)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert all(Path(file).is_relative_to(installed) for file in found.values())
    sources = [path.relative_to(installed).with_suffix("") for path in (installed / "twinmesh").rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in sources}
    assert found.keys() == names - {"twinmesh", *OF_EXTRAS}


def test_the_wheel_holds_the_quickstart_prompts(wheel):
    text = zipfile.ZipFile(wheel).read("twinmesh/scripts/quickstart_prompts.jsonl").decode()
    names = [json.loads(line)["custom_id"] for line in text.splitlines()]
    assert len(names) == len(set(names)) >= 30


def test_the_wheel_has_the_command(wheel):
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt")]
    assert "twinmesh = twinmesh.scripts.entry:main" in zipfile.ZipFile(wheel).read(name).decode()


def test_the_version_is_the_packages(monkeypatch):
    assert twinmesh.__version__ == version("twinmesh")
    assert twinmesh.__version__ in (ROOT / "pyproject.toml").read_text()

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)  # a checkout that is on the path only
    assert twinmesh.__version__ in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["__version", "version", "llm"])
def test_other_names_are_not_there(name):
    with pytest.raises(AttributeError, match=f"module 'twinmesh' has no attribute '{name}'"):
        getattr(twinmesh, name)
