"""The planner against every static split and against meshes that do both, on simulated devices.

    python scripts/bench/planner.py --conversations AzureLLMInferenceTrace_conv_2023.csv \\
        --mooncake mooncake_conversation_trace.jsonl --json planner.json

For each model (`--models`), number of GPUs (`--gpus`), load and true speed: goodput, as requests that met the SLO per
second of arrivals, of

- planner: `pool(mode=fused)=N` with the SLO's percentile, which begins with all meshes doing both;
- splits: every `prefill=i,decode=N-i`; with more than 8 meshes those by eighths;
- both: `both=N` and `both(mode=fused)=N`, each with chunks of `--chunks` tokens (all others have `--chunk`);
- oracle: it knows the load. Search space: for each of the load's phases the best of all splits, all meshes fused, and
  three mixes (a quarter of the meshes for one phase, or for each, and the rest doing both), called for by `set_roles` 0
  or 10 s before the phase begins; or the best of these all along.

The hindsight split is the best static one of the whole load. Loads are shares of what the meshes can do
(`planner_loads.py`): the first requests of both traces in their own times, stretched (steady); a spike of 10 times the
requests; a day whose mix goes smoothly from writing to reading and back, and one on which it jumps. Step times are
`--speeds` times what the profile says, with `--noise` (standard deviation of the logarithm) which nobody sees; devices
alone, the host takes no time.

Recovery is from the end of the spike until 95 % of those that come in the next 10 s meet the SLO; the oracle's is the
shortest of all that it has tried. Aims: steady, at least 0.97 of the hindsight split; day, at least 1.3 of it; recovery
at most twice the oracle's.

Every run is written to `--json` when it is done, and what is there is not run again: `--only` and a run that was
stopped add to it.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twinmesh.scripts.bench import planner_loads as loads
from twinmesh.scripts.bench.planner_loads import Load, Meshes
from twinmesh.scripts.bench.planner_runs import MODELS, SLOS, Cell, Figures, Run
from twinmesh.scripts.bench.simulation import engine_of

LOADS = ("conversations", "mooncake", "spike", "day", "jumps")
PARTS = ("planner", "both", "splits", "oracle")
_SETTINGS = ("noise", "share", "requests", "day", "spike", "chunk", "device")  # that results of one file have in common


class Results:
    """The figures of all runs so far, in a file."""

    def __init__(self, path: str | None, settings: Mapping[str, Any]) -> None:
        """Begin with what the file has.

        Raises:
            ValueError: it is of other settings.
        """
        self._path = Path(path) if path is not None else None
        self._all: dict[str, Any] = {"settings": dict(settings), "cells": {}}
        if self._path is not None and self._path.exists():
            self._all = json.loads(self._path.read_text())
            if self._all["settings"] != settings:
                raise ValueError(f"{path} holds runs with {self._all['settings']}: name another file for {settings}.")

    def of(self, cell: Cell) -> dict[str, Figures]:
        """Return the runs of a cell, by name."""
        first = cell.load.requests
        about = {"requests": len(first), "seconds": first[-1].time, "runs": {}}
        return self._all["cells"].setdefault(cell.name, about)["runs"]  # type: ignore[no-any-return]

    def write(self) -> None:
        """Write all to the file, if there is one."""
        self._all |= {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        if self._path is not None:
            self._path.write_text(json.dumps(self._all, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print a line for each load, and return the exit code."""
    args = _arguments(argv)
    results = Results(args.json, {name: getattr(args, name) for name in _SETTINGS})
    for model in args.models:
        for gpus in args.gpus:
            for load in _loads(model, gpus // MODELS[model], args):
                for speed in args.speeds:
                    cell = Cell(model, gpus // MODELS[model], load, speed, args)
                    known = results.of(cell)
                    _complete(cell, known, args, results.write)
                    print(line(cell, known), flush=True)
    return 0


def _complete(cell: Cell, known: dict[str, Figures], args: argparse.Namespace, write: Callable[[], None]) -> None:
    """Make the runs that are asked for and not known yet."""
    parts = args.only

    def make(runs: Iterable[Run]) -> None:
        for run in runs:
            if run.name not in known and (args.names is None or run.name in args.names):
                known[run.name] = cell.run(run)
                write()

    for part in PARTS:
        if part in parts and part != "oracle":
            make(getattr(cell, part)())
    if "oracle" in parts:
        make(cell.mixes())
        missing = [name for name in cell.constant() if name not in known]
        if missing:
            raise ValueError(f"the oracle chooses from {', '.join(missing)} too: run splits and both as well.")
        make(cell.oracle(known))


def line(cell: Cell, known: Mapping[str, Figures]) -> str:
    """Say how the planner compares, as far as is known."""
    text, planner = f"{cell.name}:", known.get("planner")
    if planner is not None:
        text += f" planner {planner['goodput']:.2f}/s ({planner['met']:.0%}, {planner.get('flips', 0)} flips)"
    groups = {
        "split": [run.name for run in cell.splits()],
        "colocated": [run.name for run in cell.both()],
        "oracle": [name for name in known if name.startswith("oracle")] + list(cell.constant()),
    }
    for group, all_names in groups.items():
        names = [name for name in all_names if name in known]
        if not names or (group == "oracle" and len(names) < len(all_names)):
            continue
        best = max(names, key=lambda name: known[name]["goodput"])
        text += f"; {group} {known[best]['goodput']:.2f} ({best}{_of(names, all_names)})"
        if planner is not None and known[best]["goodput"]:
            text += f", ratio {planner['goodput'] / known[best]['goodput']:.3f}"
        if "recovery" in known[best]:
            text += f", recovery {_shortest(known[name]['recovery'] for name in names)}"
    if planner is not None and "recovery" in planner:
        text += f"; planner's recovery {_shortest([planner['recovery']])}"
    return text


def _of(names: Sequence[str], wanted: Sequence[str]) -> str:
    """Say how many of the runs there are where it is not all."""
    return "" if len(names) == len(wanted) else f", of {len(names)} runs out of {len(wanted)}"


def _shortest(found: Iterable[float | None]) -> str:
    seconds = [one for one in found if one is not None]
    return f"{min(seconds):.1f} s" if seconds else "never"


def _loads(model: str, meshes: int, args: argparse.Namespace) -> Iterator[Load]:
    alike = Meshes(engine_of(f"both={meshes}xtp{MODELS[model]}", args.device, model), SLOS[model])
    make: dict[str, Callable[[], Load]] = {
        "day": lambda: loads.day(alike, args.share, args.day),
        "jumps": lambda: loads.jumps(alike, args.share, args.day),
        "spike": lambda: loads.spike(alike, args.share / 2, args.spike),
        "conversations": lambda: loads.steady(args.conversations, "conversations", alike, args.share, args.requests),
        "mooncake": lambda: loads.steady(args.mooncake, "mooncake", alike, args.share, args.requests),
    }
    for name in args.loads:
        if name in ("conversations", "mooncake") and getattr(args, name) is None:
            print(f"{name}: no trace is given, and it is left out", flush=True)
        else:
            yield make[name]()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--conversations", metavar="FILE", help="a trace of conversations (none)")
    parser.add_argument("--mooncake", metavar="FILE", help="a Mooncake trace (none)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64], help="default: 8 64")
    parser.add_argument("--loads", nargs="+", choices=LOADS, metavar="LOAD", default=list(LOADS),
                        help=f"{', '.join(LOADS)} (all)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS),
                        help=f"{', '.join(PARTS)} (all)")  # fmt: skip
    parser.add_argument(
        "--names", nargs="+", metavar="RUN", help="of these, runs by name: planner 4P4D 'fused 512' (all)"
    )
    parser.add_argument("--speeds", nargs="+", type=float, default=[0.8, 1.0, 1.25], help="default: 0.8 1 1.25")
    parser.add_argument("--noise", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--share", type=float, default=0.6, help="of what meshes can do (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=3000, help="of a steady load (default: %(default)s)")
    parser.add_argument("--day", metavar="S", type=float, default=500.0, help="seconds of a day (%(default)s)")
    parser.add_argument("--spike", metavar="S", type=float, default=200.0, help="seconds with a spike (%(default)s)")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens, of pools and splits (default: %(default)s)")
    parser.add_argument("--chunks", nargs="+", type=int, default=[512, 2048], help="of colocation (default: 512 2048)")
    parser.add_argument("--device", default="h100", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file, and run nothing that it has")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
