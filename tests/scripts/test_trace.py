"""`twinmesh trace`, from a log to a file."""

import sys

import pytest
from helpers.logged_runs import config_of, engine_of, mixed_load, simulated
from helpers.perfetto_trace import ParsedTrace
from twinmesh.scripts.cli import main


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(simulated(engine_of(config_of("prefill=1,decode=1")), mixed_load(12))[0])
    return path


def test_a_log_becomes_a_trace(log, tmp_path):
    assert main(["trace", str(log), "-o", str(tmp_path / "run.pftrace")]) == 0
    trace = ParsedTrace((tmp_path / "run.pftrace").read_bytes())
    assert len([one for one in trace.slices if one.path[-1] == "requests" and not one.depth]) == 12


def refused(arguments, capsys):
    code = main(arguments)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return code, err


def test_an_output_that_exists_is_left_alone(log, tmp_path, capsys):
    (tmp_path / "there").write_text("mine")
    code, err = refused(["trace", str(log), "-o", str(tmp_path / "there")], capsys)
    assert code == 2
    assert "there exists: give another name" in err
    assert (tmp_path / "there").read_text() == "mine"


def test_without_the_package_the_extra_is_named_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "perfetto", None)
    for name in [name for name in sys.modules if name.startswith("perfetto.")]:
        monkeypatch.delitem(sys.modules, name)
    code, err = refused(["trace", str(tmp_path / "none"), "-o", str(tmp_path / "trace")], capsys)
    assert code == 2
    assert "pip install 'twinmesh[perfetto]'" in err


def test_a_log_that_is_none_or_does_not_replay_is_one_line_and_leaves_no_file(log, tmp_path, capsys):
    output = str(tmp_path / "trace")
    code, err = refused(["trace", str(tmp_path / "none"), "-o", output], capsys)
    assert code == 1
    assert "No such file" in err
    (tmp_path / "text").write_text("hello\n")
    code, err = refused(["trace", str(tmp_path / "text"), "-o", output], capsys)
    assert code == 2
    assert "is no decision log" in err
    changed = log.read_text().replace('"bucket":64', '"bucket":512', 1)
    log.write_text(changed)
    code, err = refused(["trace", str(log), "-o", output], capsys)
    assert code == 1
    assert "diverges at line" in err
    assert not (tmp_path / "trace").exists()
