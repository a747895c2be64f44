"""Ctrl-C while the command's own modules are imported, at which point of it soever."""

import signal
import subprocess
import sys
import textwrap

import pytest

# Runs `python -m twinmesh --version` with a signal to itself when a module is looked for.
PROGRAM = """
    import os, runpy, signal, sys

    class Interrupt:
        def find_spec(self, name, path=None, target=None):
            if name == {module!r}:
                sys.meta_path.remove(self)
                os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, {handler})
    sys.meta_path.insert(0, Interrupt())
    sys.argv = ["twinmesh", "--version"]
    runpy.run_module("twinmesh", run_name="__main__")
"""


def run(module, handler="signal.default_int_handler"):
    program = textwrap.dedent(PROGRAM).format(module=module, handler=handler)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["twinmesh.scripts.cli", "argparse", "twinmesh.engine.options"])
def test_ctrl_c_before_the_command_is_there_is_one_line(module):
    done = run(module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "twinmesh: Stopped.\n")


def test_ctrl_c_that_is_ignored_stays_ignored():
    done = run("twinmesh.scripts.cli", "signal.SIG_IGN")
    assert done.returncode == 0
    assert done.stdout.startswith("twinmesh ")


def test_the_handler_of_whoever_calls_it_from_python_is_the_one_there_was(monkeypatch):
    from twinmesh.scripts import cli, entry

    before = signal.getsignal(signal.SIGINT)
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(signal.getsignal(signal.SIGINT)) or 0)
    assert entry.main() == 0
    assert seen == [before] == [signal.getsignal(signal.SIGINT)]


def test_ctrl_c_that_the_command_lets_through_is_one_line_too(monkeypatch, capsys):
    from twinmesh.scripts import cli, entry

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert entry.main() == 130
    assert capsys.readouterr().err == "twinmesh: Stopped.\n"
