"""Every check and measurement that needs a GPU, in one command of under 8 minutes on an H100; nothing to download.

    python scripts/gpu_suite.py --json gpu.json [--only checks,decode] [--scale 0.01]

Sections run in processes of their own, one after the other, the most important first, so that one that fails or hangs
costs only itself. Each has a limit, and all have a deadline; what a section had found when it was stopped stays in the
report, which is written anew with every finding. Its keys: the head (command, date, driver, device, versions), then one
for each section, with `seconds` it took and, where it did not end well, `failed` with the reason:

`checks` (kernels, append and hand-off against plain XLA in float32; pytest's tests marked `gpu`), `ceilings` (copy
bandwidth, matmul rate), `decode` and `prefill` (kernels alone beside FlashInfer, FlashAttention 3, torch and cuDNN,
where they are installed), `steps` (whole steps of Qwen3-8B's shapes with random weights, and a decode step's time by
what it goes to, from a profile), `steps_without_graphs` (the same with XLA's command buffers off), `gemms` (the decode
step's products), `transformers` (the peer for whole steps), `steps_llama`; then `graphs`, what command buffers save,
and `aims`, what was asked beside what was found.

Times are of chains of calls on the device (`gpu_bench.py`); rates are compared with ceilings of the same process.
`--scale` shrinks every size, to try the suite itself; on a CPU it then runs in plain XLA and means nothing.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from twinmesh.scripts.gpu_aims import aims, graphs

type Facts = dict[str, Any]

_MARK = "facts: "
DEADLINE = 465  # seconds of the whole suite
LEAST = 10  # seconds that a section is begun for


@dataclass(frozen=True)
class Section:
    """A generator of facts, `module` of this package and `function` of the scale; its limit; XLA's flags for it."""

    module: str
    function: str
    limit: int  # seconds
    flags: str = ""


SECTIONS = {
    "checks": Section("gpu_checks", "checks", 150),
    "ceilings": Section("gpu_attention", "ceilings", 30),
    "decode": Section("gpu_attention", "decode", 130),
    "prefill": Section("gpu_attention", "prefill", 70),
    "steps": Section("gpu_steps", "qwen3", 90),
    "steps_without_graphs": Section("gpu_steps", "qwen3", 60, "--xla_gpu_enable_command_buffer="),
    "gemms": Section("gpu_gemm", "gemms", 50),
    "transformers": Section("gpu_transformers", "transformers", 45),
    "steps_llama": Section("gpu_steps", "llama", 60),
}
_DEVICE = Section("gpu_bench", "device", 60)
_BUILD = Section("gpu_attention", "build_peers", 180)
_HIDDEN = {"device": _DEVICE, "build_peers": _BUILD}


def main(argv: list[str] | None = None) -> int:
    """Run the sections and write the report. Exit code 1 if one did not end well, 2 if there is no GPU to run on."""
    args = _arguments(argv)
    scale = 1.0 if args.scale is None else args.scale
    if args.section:
        return _section(args.section, scale)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        return _suite(args, scale, started, cache)


def _suite(args: argparse.Namespace, scale: float, started: float, cache: str) -> int:
    device = _run("device", scale, _DEVICE.limit, cache)
    if device.get("platform") != "gpu" and args.scale is None:
        reason = device.get("failed", f"JAX's first device is {device.get('device', 'unknown')!r}")
        print(
            f"No GPU was found ({reason}): run this where JAX sees one, or try the suite itself on the CPU with "
            "--scale 0.01.",
            file=sys.stderr,
        )
        return 2
    report = _head() | {"scale": scale, **device}
    names = args.only or list(SECTIONS)
    _sections(report, names, scale, started + args.deadline, args.json, cache)
    report["graphs"], report["aims"] = graphs(report), aims(report)
    report["total_seconds"] = round(time.monotonic() - started, 1)
    _save(report, args.json)
    print(json.dumps({"aims": report["aims"], "total_seconds": report["total_seconds"]}, indent=1))
    return int(any("failed" in report[name] for name in names))


def _sections(report: Facts, names: list[str], scale: float, end: float, path: str | None, cache: str) -> None:
    """Run these sections, each within its limit and all before `end`; FlashInfer compiles beside the checks."""
    built: Facts = {}
    build = partial(_run, "build_peers", scale, min(_BUILD.limit, end - time.monotonic()), cache)
    builder = threading.Thread(target=lambda: built.update(build()), daemon=True)
    needs_peers = not {"decode", "prefill"}.isdisjoint(names)
    if needs_peers:
        builder.start()
    for name in names:
        if name != "checks" and needs_peers and "build_peers" not in report:
            builder.join()  # nothing is timed while it compiles
            report["build_peers"] = built

        def save(found: Facts, name: str = name) -> None:
            report[name] = found
            _save(report, path)

        start = time.monotonic()
        limit = min(SECTIONS[name].limit, end - start)
        if limit > LEAST:
            found = _run(name, scale, limit, cache, save)
        else:
            found = {"failed": "Not begun: the suite's deadline was near."}
        save(found | {"seconds": round(time.monotonic() - start, 1)})
        print(name, json.dumps(report[name], indent=1), flush=True)


def _run(name: str, scale: float, limit: float, cache: str, found: Callable[[Facts], None] = lambda _: None) -> Facts:
    """The facts of one section in a process of its own, told to `found` as they come, and why it failed, if it did.

    `cache` is the folder of JAX's compilation cache.
    """
    section = (SECTIONS | _HIDDEN)[name]
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch measures beside JAX
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", cache)  # the next section compiles some of the same
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {section.flags}".strip()
    command = [sys.executable, str(Path(__file__)), "--section", name, "--scale", str(scale)]
    facts: Facts = {}
    stopped = threading.Event()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        timer = threading.Timer(limit, _stop, (process, stopped))
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith(_MARK):
                    merge(facts, json.loads(line.removeprefix(_MARK)))
                    found(facts)
            code = process.wait()
        finally:  # also when Ctrl-C ends the suite
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if stopped.is_set():
            facts["failed"] = f"Stopped after {limit:.0f} s: what would have come later is missing."
        elif code and "failed" not in facts:
            facts["failed"] = f"Exit code {code}: {_last_line(errors)}"
    return facts


def _stop(process: "subprocess.Popen[str]", stopped: threading.Event) -> None:
    """End a section, with whatever it started."""
    stopped.set()
    os.killpg(process.pid, signal.SIGKILL)


def _last_line(errors: TextIO) -> str:
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip() and not line.startswith(" ")]
    return lines[-1][:300] if lines else "it said nothing"


def _section(name: str, scale: float) -> int:
    """In the section's own process: print each piece of what it finds."""
    section = (SECTIONS | _HIDDEN)[name]
    function = getattr(importlib.import_module(f"twinmesh.scripts.{section.module}"), section.function)
    for piece in function(scale):
        print(_MARK + json.dumps(piece), flush=True)
    return 0


def merge(facts: Facts, piece: Facts) -> None:
    """Add a piece to what was found; tables of the same name become one."""
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(facts.get(key), dict):
            merge(facts[key], value)
        else:
            facts[key] = value


def _head() -> Facts:
    """Command, date and driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    command = " ".join(["python", "scripts/gpu_suite.py", *sys.argv[1:]])
    return {"command": command, "date": time.strftime("%Y-%m-%d %H:%M"), "driver": driver}


def _save(report: Facts, path: str | None) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="where the report goes; written with every finding")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--scale", type=float, help="shrink every size, to try the suite; needed where there is no GPU")
    parser.add_argument(
        "--deadline", type=float, default=DEADLINE, help="seconds for everything (default: %(default)s)"
    )
    parser.add_argument("--section", choices=[*SECTIONS, *_HIDDEN], help=argparse.SUPPRESS)  # what processes are told
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
