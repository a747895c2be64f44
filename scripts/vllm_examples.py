"""Run vLLM's own offline examples for text models with the import and the model changed, and count.

    python scripts/vllm_examples.py --sdist vllm-0.32.0.tar.gz --json examples.json

takes the source distribution of a vLLM (a `.tar.gz` or its unpacked folder; by default pip's client gets the one of
`--version`, of which it needs no more than the files), finds the scripts in `examples/` that run an engine of their own
on text, rewrites them (`vllm_imports.py`), and runs each in a process of its own within a time limit. It prints a table
of what ran and why the others did not. It judges by exit codes: what an example prints is in the JSON.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import twinmesh
from twinmesh.scripts.vllm_imports import makes_text_engine, rewrite, takes_model_argument

VERSION = "0.32.0"
_KEPT = 2000  # characters of an example's output


@dataclass(frozen=True)
class Outcome:
    """How one example went."""

    example: str  # its path below `examples/`
    ran: bool  # it ended by itself, with exit code 0
    seconds: float
    reason: str  # why it did not run; "": it did
    lacking: list[str]  # names that it imports of vLLM and Twinmesh lacks
    output: str  # the end of what it printed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the examples; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        with _unpacked(args.sdist, args.version) as source, tempfile.TemporaryDirectory() as work:
            found = [path for path in find_examples(source / "examples") if args.only in path.as_posix()]
            outcomes = []
            for number, path in enumerate(found, start=1):
                outcomes.append(_run(source / "examples", path, args.model, args.limit, Path(work)))
                print(f"{number} of {len(found)}: {_told(outcomes[-1])}", file=sys.stderr, flush=True)
    except (OSError, ValueError) as error:
        print(f"vllm_examples: {error}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8")
    print(as_table(outcomes))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sdist", type=Path, metavar="PATH", help="vLLM's .tar.gz or its unpacked folder")
    parser.add_argument("--version", default=VERSION, help=f"the version that pip gets without --sdist ({VERSION})")
    parser.add_argument("--model", default="smollm2", help="the model that all examples run with (smollm2)")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="for each example (600)")
    parser.add_argument("--only", default="", metavar="TEXT", help="run the examples whose path has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome to this file")
    return parser


def find_examples(folder: Path) -> list[Path]:
    """Return the scripts below `folder` that run an engine of their own on text, relative to it, in order.

    Raises:
        ValueError: there are none.
    """
    # What fills a cache goes before what reads it.
    scripts = sorted(folder.rglob("*.py"), key=lambda path: (path.parent, not path.name.startswith("prefill"), path))
    found = [path.relative_to(folder) for path in scripts if makes_text_engine(path.read_text(encoding="utf-8"))]
    if not found:
        raise ValueError(f"{folder} has no examples: give the source distribution of a vLLM.")
    return found


def as_table(outcomes: Sequence[Outcome]) -> str:
    """Write the outcomes in Markdown, with how many ran."""
    rows = [f"| `{one.example}` | {'yes' if one.ran else one.reason} |" for one in outcomes]
    ran = sum(one.ran for one in outcomes)
    return "\n".join([f"{ran} of {len(outcomes)} run.", "", "| example | runs |", "|---|---|", *rows])


def _told(outcome: Outcome) -> str:
    return f"{outcome.example} {outcome.seconds} s {'ran' if outcome.ran else outcome.reason}"


@contextmanager
def _unpacked(sdist: Path | None, version: str) -> Iterator[Path]:
    """Yield the folder of a source distribution, which may be packed, or has to be fetched."""
    with tempfile.TemporaryDirectory() as folder:
        if sdist is None:
            yield _fetched(version, Path(folder))
        elif sdist.is_dir():
            yield sdist
        else:
            with tarfile.open(sdist) as packed:
                packed.extractall(folder, filter="data")
            yield next(path for path in Path(folder).iterdir() if path.is_dir())


def _fetched(version: str, folder: Path) -> Path:
    """Let pip's client get a source distribution; its metadata step needs torch, fails, and leaves the files."""
    asked = ["--no-deps", "--no-clean", "--no-build-isolation", "--no-binary", ":all:", f"vllm=={version}"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *asked],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        check=False,
    )
    found = next(folder.glob("pip-*/vllm_*/examples"), None)
    if found is None:
        raise ValueError(f"pip could not get vllm=={version}: give its source distribution with --sdist.")
    return found.parent


def _run(examples: Path, path: Path, model: str, limit: float, work: Path) -> Outcome:
    source = (examples / path).read_text(encoding="utf-8")
    changed, lacking = rewrite(source, model, frozenset(twinmesh.__all__))
    folder = work / path.parent  # examples of one folder leave files for each other
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / path.name
    script.write_text(changed, encoding="utf-8")
    command = [sys.executable, str(script), *(["--model", model] if takes_model_argument(source) else [])]
    start = time.monotonic()
    code, output = _process(command, limit, folder)
    seconds = time.monotonic() - start
    reason = "" if code == 0 else f"not within {limit:g} s" if code is None else _reason(output)
    return Outcome(path.as_posix(), code == 0, round(seconds, 1), reason, lacking, output[-_KEPT:])


def _process(command: Sequence[str], limit: float, folder: Path) -> tuple[int | None, str]:
    """Run a command in a session of its own; return its exit code, None where it took too long, and what it wrote."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output


def _reason(output: str) -> str:
    """Find the last error that a process wrote, in one line for a table."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    last = (errors or lines or ["it wrote nothing"])[-1]
    return last.replace("|", "\\|")[:240]


if __name__ == "__main__":
    sys.exit(main())
