"""Every check and measurement that needs a GPU, in one command of under 10 minutes on an H100; nothing to download.

    python scripts/gpu_suite.py --json gpu.json [--only checks,decode] [--scale 0.01]

Sections run in processes of their own, one after the other, the most important first, so that one that fails or hangs
costs only itself. Each has a share of the deadline, and what those before it left of theirs; what a section had found
when it was stopped stays in the report, which is written anew with every finding. Its keys: the head (command, date,
driver, device, versions, and `not_yet_measured` where figures mean nothing), then one for each section, with `seconds`
it took and, where it did not end well, `failed` with the reason:

`checks` (kernels, append and hand-off against plain XLA in float32; pytest's tests marked `gpu`), `ceilings` (copy
bandwidth, matmul rate), `decode` and `prefill` (kernels alone beside FlashInfer, FlashAttention 3, torch and cuDNN,
where they are installed), `steps` (whole steps of Qwen3-8B's shapes with random weights, and a decode step's time by
what it goes to, from a profile), `steps_without_graphs` (the same with XLA's command buffers off), `gemms` (the decode
step's products), `transformers` (the peer for whole steps), `steps_llama`, `experts` (the kernel for experts in MXFP4
and bfloat16, checked and timed), `steps_gpt_oss` (GPT-OSS-20B's shapes with random experts in MXFP4); then `graphs`,
what command buffers save, and `aims`, what was asked beside what was found.

Times are of chains of calls on the device (`gpu/timing.py`); rates are compared with ceilings of the same process.
`--scale` shrinks every size, to try the suite itself; on a CPU it then runs in plain XLA and means nothing.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from twinmesh.scripts.gpu.aims import aims, graphs
from twinmesh.scripts.gpu.facts import Facts, line, merge, read, save

_MARK = "facts: "
DEADLINE = 560  # seconds of the whole suite
LEAST = 10  # seconds that a section is begun for


@dataclass(frozen=True)
class Section:
    """A part of the suite: a function in `scripts/gpu/` that takes the scale and yields facts."""

    module: str  # of `scripts/gpu/`
    function: str  # of the module
    share: int  # seconds of the deadline
    flags: str = ""  # of XLA, beside those that are set


SECTIONS = {
    "checks": Section("checks", "checks", 110),
    "ceilings": Section("attention", "ceilings", 15),
    "decode": Section("attention", "decode", 90),
    "prefill": Section("attention", "prefill", 45),
    "steps": Section("steps", "qwen3", 70),
    "steps_without_graphs": Section("steps", "qwen3", 35, "--xla_gpu_enable_command_buffer="),
    "gemms": Section("gemm", "gemms", 25),
    "transformers": Section("transformers_peer", "transformers", 25),
    "steps_llama": Section("steps", "llama", 25),
    "experts": Section("experts", "experts", 40),
    "steps_gpt_oss": Section("steps", "gpt_oss", 55),
}
DEVICE = Section("timing", "device", 25)
BUILD = Section("attention", "build_peers", SECTIONS["checks"].share)  # beside the checks
HIDDEN = {"device": DEVICE, "build_peers": BUILD}


def main(argv: list[str] | None = None) -> int:
    """Run the sections, write the report and return the exit code: 1 if a section failed, 2 if there is no GPU."""
    args = _arguments(argv)
    scale = 1.0 if args.scale is None else args.scale
    if args.section:
        return _section(args.section, scale)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        processes = Processes(scale, cache)
        try:
            return _suite(args, processes, started)
        finally:  # also when Ctrl-C ends the suite
            processes.end()


@dataclass(frozen=True)
class Processes:
    """The processes in which sections run, one for each."""

    scale: float
    cache: str  # folder of JAX's compilation cache
    running: list["subprocess.Popen[str]"] = field(default_factory=list)

    def run(self, name: str, limit: float, found: Callable[[Facts], None] = lambda _: None) -> Facts:
        """Run one section for at most `limit` seconds and return its facts; if it failed, `failed` among them says why.

        `found` is called with all facts so far whenever more have come.
        """
        section = (SECTIONS | HIDDEN)[name]
        command = [sys.executable, str(Path(__file__)), "--section", name, "--scale", str(self.scale)]
        facts: Facts = {}
        stopped = threading.Event()
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, env=_environment(section.flags, self.cache), stdout=subprocess.PIPE, stderr=errors,
                text=True, start_new_session=True,
            ) as process,
            _kept(process, self.running),
            _timer(limit, process, stopped),
        ):  # fmt: skip
            for said in process.stdout or ():
                if said.startswith(_MARK):
                    merge(facts, read(said.removeprefix(_MARK)))
                    found(facts)
            code = process.wait()
            if stopped.is_set():
                facts["failed"] = f"Stopped after {limit:.0f} s: what would have come later is missing."
            elif code and "failed" not in facts:
                facts["failed"] = f"Exit code {code}: {_last_line(errors)}"
        return facts

    def end(self) -> None:
        """End the processes that still run: those that a thread started outlive Ctrl-C."""
        for process in list(self.running):
            _kill(process)


def _environment(flags: str, cache: str) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch measures beside JAX
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", cache)  # the next section compiles some of the same
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    return environment


@contextlib.contextmanager
def _kept(process: "subprocess.Popen[str]", running: list["subprocess.Popen[str]"]) -> Iterator[None]:
    """Keep a process in the list while it runs, and end it on the way out if it still does."""
    running.append(process)
    try:
        yield
    finally:
        if process.poll() is None:
            _kill(process)
        running.remove(process)


@contextlib.contextmanager
def _timer(limit: float, process: "subprocess.Popen[str]", stopped: threading.Event) -> Iterator[None]:
    timer = threading.Timer(limit, stop, (process, stopped))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def stop(process: "subprocess.Popen[str]", stopped: threading.Event) -> None:
    """End a section at its limit.

    One that is over does not count as stopped, even if a process that it started still holds its output open.
    """
    if process.poll() is None:
        stopped.set()
    _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _suite(args: argparse.Namespace, processes: Processes, started: float) -> int:
    device = processes.run("device", DEVICE.share)
    if device.get("platform") != "gpu" and args.scale is None:
        reason = device.get("failed", f"JAX's first device is {device.get('device', 'unknown')!r}")
        print(
            f"No GPU was found ({reason}): run this where JAX sees one, or try the suite itself on the CPU with "
            "--scale 0.01.",
            file=sys.stderr,
        )
        return 2
    report = _head() | {"scale": processes.scale, **device}
    is_trial = device.get("platform") != "gpu" or processes.scale < 1
    if is_trial:
        kind = device.get("device", "no device that answered")
        report["not_yet_measured"] = f"This tries the suite itself, on {kind} at {processes.scale:g}."
    names = args.only or list(SECTIONS)
    run_sections(report, names, processes, started + args.deadline, args.json)
    report["graphs"], report["aims"] = graphs(report), aims({} if is_trial else report)
    report["total_seconds"] = round(time.monotonic() - started, 1)
    if args.json is not None:
        save(report, args.json)
    print(json.dumps({"aims": report["aims"], "total_seconds": report["total_seconds"]}, indent=1))
    return int(any("failed" in report[name] for name in names))


def run_sections(report: Facts, names: Sequence[str], processes: Processes, end: float, path: str | None) -> None:
    """Run these sections, each within its limit and all before `end`; FlashInfer compiles beside the checks."""
    built: Facts = {}
    build = partial(processes.run, "build_peers", min(BUILD.share, end - time.monotonic()))
    builder = threading.Thread(target=lambda: built.update(build()), daemon=True)
    needs_peers = not {"decode", "prefill"}.isdisjoint(names)
    if needs_peers:
        builder.start()
    for place, name in enumerate(names):
        if name != "checks" and needs_peers and "build_peers" not in report:
            builder.join()  # nothing is timed while it compiles; its share began with that of the checks
            report["build_peers"] = built

        def keep(found: Facts, name: str = name) -> None:
            report[name] = found
            if path is not None:
                save(report, path)

        start = time.monotonic()
        limit = limit_of(names[place:], end - start)
        if limit > LEAST:
            found = processes.run(name, limit, keep)
        else:
            found = {"failed": "Not begun: the suite's deadline was near."}
        keep(found | {"seconds": round(time.monotonic() - start, 1)})
        print(name, json.dumps(report[name], indent=1), flush=True)


def limit_of(names: Sequence[str], left: float) -> float:
    """Return how many seconds the first of these sections may take.

    That is its own share, or all that is left except the others' shares if that is more, but never more than is left.
    """
    share, *others = (SECTIONS[name].share for name in names)
    return min(left, max(share, left - sum(others)))


def _last_line(errors: TextIO) -> str:
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip() and not line.startswith(" ")]
    return lines[-1][:300] if lines else "it said nothing"


def _section(name: str, scale: float) -> int:
    """Run a section in this process, print each piece of what it finds and return the exit code."""
    section = (SECTIONS | HIDDEN)[name]
    function = getattr(importlib.import_module(f"twinmesh.scripts.gpu.{section.module}"), section.function)
    for piece in function(scale):
        print(_MARK + line(piece), flush=True)
    return 0


def _head() -> Facts:
    """Return the command, the date and the driver, for the head of the report."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    command = " ".join(["python", "scripts/gpu_suite.py", *sys.argv[1:]])
    return {"command": command, "date": time.strftime("%Y-%m-%d %H:%M"), "driver": driver}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="where the report goes; written with every finding")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--scale", type=float, help="shrink every size, to try the suite; needed where there is no GPU")
    parser.add_argument(
        "--deadline", type=float, default=DEADLINE, help="seconds for everything (default: %(default)s)"
    )
    parser.add_argument("--section", choices=[*SECTIONS, *HIDDEN], help=argparse.SUPPRESS)  # for a section's process
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.only or ()) - set(SECTIONS)):
        parser.error(f"--only: {', '.join(unknown)} is not a section; there are {', '.join(SECTIONS)}.")
    if args.scale is not None and not 0 < args.scale <= 1:
        parser.error(f"--scale {args.scale}: it must be above 0 and at most 1.")
    if args.json is not None and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"--json {args.json}: its directory does not exist; make it first.")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
