"""`--metrics-port` of `twinmesh batch` and `twinmesh bench serve`: what cannot be is one line, before a model loads."""

import socket
import sys

import pytest
from twinmesh.scripts.cli import main

BATCH = ("batch", "--model", "none.gguf", "--input", "in.jsonl", "--output", "out.jsonl")
SERVE = ("bench", "serve", "--model", "none.gguf", "--preset", "inferencex")


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield str(other.getsockname()[1])


def refused(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    return err


@pytest.mark.parametrize("command", [BATCH, SERVE])
def test_a_port_in_use_is_refused(command, taken, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert f"Port {taken} cannot be used for metrics" in refused([*command, "--metrics-port", taken], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [BATCH, SERVE])
def test_without_the_package_the_extra_is_named(command, taken, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "prometheus_client"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.chdir(tmp_path)
    assert "pip install 'twinmesh[prometheus]'" in refused([*command, "--metrics-port", taken], capsys)


def test_what_is_no_port_or_shows_no_engine_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "is no port: they are 1 to 65535" in refused([*BATCH, "--metrics-port", "65536"], capsys)
    said = "--metrics-port would do nothing on the simulator alone"
    assert said in refused([*SERVE, "--device", "h100", "--metrics-port", "9000"], capsys)
