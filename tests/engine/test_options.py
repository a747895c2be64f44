"""Options are said once: what `inspect`, type checkers, `help` and the reference see comes from `EngineOptions`."""

import inspect
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from inspect import Parameter
from pathlib import Path

import pytest
import twinmesh
from twinmesh import LLM, AsyncLLM
from twinmesh.engine.options import EngineOptions, as_table, documentation

ENGINES = [LLM, AsyncLLM]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_signature_names_every_option_with_type_and_default(engine):
    parameters = list(inspect.signature(engine).parameters.values())
    assert [p.name for p in parameters] == [field.name for field in fields(EngineOptions)]
    kinds = [p.kind for p in parameters]
    assert kinds == [Parameter.POSITIONAL_OR_KEYWORD] + [Parameter.KEYWORD_ONLY] * (len(parameters) - 1)
    plain = inspect.signature(engine).parameters
    assert plain["page_size"].annotation is int
    assert plain["max_model_len"].annotation == int | None
    assert plain["devices"].annotation == "Sequence[jax.Device] | None"
    for parameter, field in zip(parameters[1:], fields(EngineOptions)[1:], strict=True):
        assert parameter.default == field.default
        assert parameter.annotation is not parameter.empty


def test_a_type_checker_sees_what_inspect_sees(tmp_path):
    root = Path(twinmesh.__file__).parent
    program = tmp_path / "program.py"
    program.write_text("from twinmesh import LLM, AsyncLLM\nreveal_type(LLM)\nreveal_type(AsyncLLM)\n")
    # As the whole package is checked, so that what mypy has kept of that is used.
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(program)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    revealed = re.findall(r'Revealed type is "def \((.*)\) -> ([\w.]+)"', done.stdout)
    assert [name for _, name in revealed] == [f"{engine.__module__}.{engine.__name__}" for engine in ENGINES], done
    for text, _ in revealed:
        seen = [re.fullmatch(r"(\w+): (.*?)( =)?", part).groups() for part in _parameters(text)]
        expected = list(inspect.signature(LLM).parameters.values())
        assert [name for name, _, _ in seen] == [p.name for p in expected]
        assert [default is None for _, _, default in seen] == [p.default is p.empty for p in expected]
        for (name, kind, _), parameter in zip(seen, expected, strict=True):
            if not isinstance(parameter.annotation, str):  # what only JAX can spell, mypy spells out
                shown = inspect.formatannotation(parameter.annotation).replace("tuple", "builtins.tuple")
                plain = kind.replace("builtins.", "").replace("tuple", "builtins.tuple")
                assert plain == shown, name
            assert kind != "Any", name


def _parameters(text):
    """The parameters of a signature as mypy prints it; commas inside brackets separate nothing."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip() != "*"]


@pytest.mark.parametrize("engine", ENGINES)
def test_help_shows_every_option(engine):
    for name, option in documentation().items():
        assert f"    {name}: {option.doc.split()[0]}" in engine.__doc__


def test_the_reference_has_a_row_for_every_option():
    rows = as_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [field.name for field in fields(EngineOptions)]
    assert "| `page_size` | `int` | `64` | tokens per KV page |" in rows


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "says"), [("topologie", "the nearest is topology."), ("zzz", "help({}) lists them.")])
def test_an_unknown_option_is_refused_with_the_nearest_name(engine, name, says):
    with pytest.raises(TypeError) as refused:
        engine("m", **{name: 1})
    called = engine.__name__
    assert str(refused.value) == f"{called} has no option {name}: " + says.format(called)


def test_options_are_checked_when_made_and_frozen():
    with pytest.raises(ValueError, match=r"seed=-1 is not usable"):
        EngineOptions("m", seed=-1)
    with pytest.raises(ValueError, match=r"both=zero"):
        EngineOptions("m", topology="both=zero")
    with pytest.raises(ValueError, match=r"policy='fcsf' is unknown: .*; the nearest is 'fcfs'\."):
        EngineOptions("m", policy="fcsf")
    with pytest.raises(FrozenInstanceError):
        EngineOptions("m").seed = 1


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("model", [None, 5, b"m", [], True, object()], "a name or a path"),
        ("topology", [None, 5, b"both=1", [], {"both": 1}, ("both=1",)], "a text such as 'both=1', or a Topology"),
        ("decision_log", [5, b"x", True, ["x"], object()], "a path, or None for no log"),
        ("devices", [5, "cpu", {}, object(), {5}], "a list of devices, or None for JAX's"),
        ("enable_prefix_caching", ["no", "False", 0, 1, None], "True or False"),
        ("deterministic", ["yes", 1, None, [], 0.0], "True or False"),
        ("allow_nonfinite", ["yes", 1, None, [], 0.0], "True or False"),
        ("progress", ["yes", 1, None, [], 0.0], "True or False"),
    ],
)
def test_values_of_another_type_are_refused_by_name(name, values, wanted):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}=") as refused:
            LLM(**{"model": "m", name: value})
        assert str(refused.value) == f"{name}={value!r} is not usable: it must be {wanted}."


def test_options_need_no_jax(tmp_path):
    code = "import sys, twinmesh.engine.options as o; o.as_table(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
