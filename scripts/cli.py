"""The command `twinmesh`: its subcommands, and the one place where an error becomes a sentence and an exit code.

Exit codes: 0 done, 1 failed, 2 the input or an argument cannot be used, 3 a batch run stopped early and can go on, 130
stopped by Ctrl-C, 143 by SIGTERM, 141 the reader of the output went away. SIGTERM ends a command as Ctrl-C does. No
error shows a traceback, unless Python runs in development mode (`-X dev`).
"""

import argparse
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TextIO

import twinmesh
from twinmesh.engine.errors import BatchStopped, EngineError
from twinmesh.scripts import batch, convert, explain, fetch, generate, plan, profile, replay, simulate, trace, whatif
from twinmesh.scripts import eval as evaluate
from twinmesh.scripts.bench import command as bench
from twinmesh.scripts.fetch import FetchError
from twinmesh.scripts.parser import Parser

COMMANDS = {
    "generate": generate,
    "batch": batch,
    "eval": evaluate,
    "fetch": fetch,
    "convert": convert,
    "profile": profile,
    "simulate": simulate,
    "plan": plan,
    "replay": replay,
    "whatif": whatif,
    "explain": explain,
    "trace": trace,
    "bench": bench,
}
EPILOG = """\
examples:
  twinmesh fetch smollm2
  twinmesh generate --model smollm2 --chat --prompt "What is the capital of France?"
  twinmesh eval --model smollm2 --tasks arc_easy --limit 100
  twinmesh batch --model smollm2 --input in.jsonl --output out.jsonl --topology prefill=1,decode=1
  twinmesh generate --model smollm2 --prompt "Once upon a time" --decision-log run.log
  twinmesh replay run.log
  twinmesh explain run.log
  twinmesh whatif run.log --topology prefill=1,decode=1
  twinmesh plan --model llama-3.1-8b --device h100 --devices 4 --slo ttft=500ms,tpot=30ms --trace LOAD
  twinmesh convert gemma3-270m gemma3-270m-bf16 --dtype bfloat16
  twinmesh trace run.log -o run.pftrace
  twinmesh bench serve --model smollm2 --preset inferencex --scale 0.01 --json run.json --html run.html

'twinmesh COMMAND --help' explains each command.
"""


class _Terminated(KeyboardInterrupt):
    """The exception that SIGTERM raises in the main thread."""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser, with every command and its arguments."""
    parser = Parser(
        prog="twinmesh",
        description="Run large language models with prefill and decode on device meshes of their own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"twinmesh {twinmesh.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. `argv` is without the program's name."""
    _fill_standard_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):  # what stdout cannot spell, as half of a surrogate pair, becomes "?"
        sys.stdout.reconfigure(errors="replace")
    try:
        args = build_parser().parse_args(argv)
        with _sigterm_raises(), _warnings_in_a_line():
            code: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        code = 143 if isinstance(stop, _Terminated) else 130
        return _fail(code, " ".join(["Stopped.", *getattr(stop, "__notes__", [])]))
    except BrokenPipeError:
        # Python flushes stdout at exit, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ValueError as error:
        return _fail(2, str(error))
    except OSError as error:
        return _fail(1, f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror or error}.")
    except (FetchError, EngineError) as error:
        return _fail(1, str(error))
    except BatchStopped as error:
        return _fail(3, str(error))
    except Exception as error:  # a command ends in a sentence; Python's development mode shows where it came from
        if sys.flags.dev_mode:
            raise
        why = missing_devices() if isinstance(error, RuntimeError | AssertionError) else None
        return _fail(1, _sentence(error)) if why is None else _fail(2, why)


def missing_devices() -> str | None:
    """Say in a sentence why JAX has no devices, whatever part of a command met it first; None: it has, or is not used.

    JAX raises RuntimeError where it cannot use the platform that it was asked to, or AssertionError without a word.
    """
    if "jax" not in sys.modules:
        return None
    from twinmesh.engine.sharding.mesh import find_devices

    try:
        find_devices()
    except ValueError as error:
        return str(error)
    return None


def _fill_standard_descriptors() -> None:
    """Open the null device as stdin, stdout or stderr if one of these is closed.

    Otherwise the next file that is opened, such as one of results, would get that descriptor's number, and whatever
    libraries log would go into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Make SIGTERM raise in the main thread, as Ctrl-C does, unless the parent process has it ignored."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Show what Twinmesh warns of in one line, as errors are, without the line of source that Python adds."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and file is None:
            print(f"twinmesh: {message}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"internal failure, {type(error).__name__}: {text} (`python -X dev -m twinmesh` shows where)."


def _fail(code: int, sentence: str) -> int:
    print(f"twinmesh: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
