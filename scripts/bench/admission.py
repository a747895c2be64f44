"""What the scheduler spends while many requests wait for one prefix, beside an earlier checkout.

    git worktree add /tmp/before COMMIT
    python scripts/bench/admission.py --before /tmp/before --json admission.json

One request computes a long prompt; then as many as `--requests` says arrive, whose prompts begin with all of that one
and end in a page of their own. Devices answer at once; there are none, and no JAX. A turn is one step's result taken in
and all that the scheduler then decides. Reported are the turns that place no request on a mesh, those that place some,
per request placed, and an arrival, all of them until every request has its first token.

The checkouts take turns, each round in a process of its own. The best round counts; all are in the JSON.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
TOPOLOGIES = ("both=1", "prefill=1,decode=1")
_CHUNK = 512
# Where efd1214 has the names that moved since, tried after where they are now.
_HOMES = {
    "EngineConfig": ("config",),
    "PoolSize": ("config",),
    "Topology": ("topology", "config"),
    "Scheduler": ("scheduler.scheduler", "scheduler"),
    "RequestFacts": ("protocol.events", "request"),
    "Arrived": ("protocol.events", "protocol"),
    "StepDone": ("protocol.events", "protocol"),
    "TransferReady": ("protocol.events", "protocol"),
    "Outcome": ("protocol.events", "protocol"),
}


def _name(name: str) -> Any:
    """A class of the checkout that this process runs."""
    for home in _HOMES[name]:
        try:
            module = import_module(f"twinmesh.engine.{home}")
        except ModuleNotFoundError:
            continue
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"this checkout has no {name} where it was looked for")


class Run:
    """A scheduler, and a device that answers at once."""

    def __init__(self, topology: str, requests: int, prefix: int) -> None:
        config = _name("EngineConfig")(
            topology=_name("Topology").parse(topology), max_model_len=prefix + 1024, max_num_seqs=requests + 1,
            prefill_buckets=(_CHUNK,), decode_buckets=(requests + 1,),
        )  # fmt: skip
        # Pages for all: what is measured is the waiting for a prefix, not for memory.
        pages = config.pages_for(prefix) + 8 * (requests + 1)
        pool = _name("PoolSize")((pages,), (1,), 8 * config.max_pages)
        self.scheduler = _name("Scheduler")(config, [pool] * len(config.topology.meshes))
        self.steps: list[Any] = []
        self.transfers: list[int] = []
        self.size, self.now = config.page_size, 0.0
        self.placing: list[tuple[int, float]] = []  # of each turn, requests placed and seconds
        self.arrivals: list[float] = []

    def arrive(self, number: int, prefix: int) -> None:
        """A request arrives; its blocks are bytes of its own, as from another caller's thread."""
        shared = [b"%16d" % block for block in range(prefix // self.size)]
        own = [b"%8d%8d" % (number, block) for block in range(1)]
        facts = _name("RequestFacts")(self._id(number), prefix + self.size + 8, 2, tuple(shared + own))
        event = _name("Arrived")(self.now, facts)
        start = time.thread_time()
        self.scheduler.on(event)
        self.arrivals.append(time.thread_time() - start)

    def _id(self, number: int) -> Any:
        return number if "int" in str(_name("RequestFacts").__annotations__["id"]) else str(number)

    def turn(self) -> bool:
        """Take in the oldest result and decide; False: nothing is under way."""
        events = self._results()
        waiting = self._waiting()
        start = time.thread_time()
        for event in events:
            self.scheduler.on(event)
        actions = self.scheduler.actions()
        seconds = time.thread_time() - start
        self.placing.append((waiting - self._waiting(), seconds))
        for action in actions:
            kind = type(action).__name__
            if kind in ("Prefill", "Decode", "Fused"):
                self.steps.append(action)
            elif kind == "StartTransfer":
                self.transfers.append(action.transfer)
        return bool(self.steps or self.transfers)

    def _waiting(self) -> int:
        return sum(request.state.value == "waiting" for request in self.scheduler.requests.values())

    def _results(self) -> list[Any]:
        self.now += 1e-3
        events = [_name("TransferReady")(self.now, number) for number in self.transfers]
        self.transfers.clear()
        if self.steps:
            step = self.steps.pop(0)
            rows = [chunk for chunk in getattr(step, "chunks", ()) if chunk.is_last] + list(getattr(step, "rows", ()))
            outcomes = tuple(_name("Outcome")(self._of(row), False, None) for row in rows if self.scheduler.owner(row))
            events.append(_name("StepDone")(self.now, step.mesh, step.step, outcomes))
        return events

    @staticmethod
    def _of(row: Any) -> Any:
        return row.request_id


def measure(topology: str, requests: int, prefix: int) -> dict[str, float | str | int]:
    """One run to its end."""
    run = Run(topology, requests, prefix)
    run.arrive(0, prefix)
    run.turn()
    run.arrivals.clear()
    run.placing.clear()
    for number in range(1, requests + 1):
        run.arrive(number, prefix)
    gc.collect()
    gc.freeze()  # what is there is not looked at again, as in a process that runs for long
    while run.turn():
        pass
    idle = [seconds for placed, seconds in run.placing if placed <= 0]
    placing = [(placed, seconds) for placed, seconds in run.placing if placed > 0]
    assert sum(placed for placed, _ in placing) == requests
    return {
        "topology": topology,
        "requests": requests,
        "prefix": prefix,
        "turns": len(run.placing),
        "idle_turn_ms_max": 1e3 * max(idle),
        "idle_turn_ms_median": 1e3 * statistics.median(idle),
        "us_per_request_placed": 1e6 * sum(seconds for _, seconds in placing) / requests,
        "us_per_arrival": 1e6 * statistics.fmean(run.arrivals),
    }


FIGURES = ("idle_turn_ms_max", "idle_turn_ms_median", "us_per_request_placed", "us_per_arrival")


def main(argv: Sequence[str] | None = None) -> int:
    """Run both checkouts in turn and print a line for each figure; returns the exit code."""
    args = _arguments(argv)
    if args.one:
        print(json.dumps([measure(topology, args.requests, args.prefix) for topology in TOPOLOGIES]))
        return 0
    checkouts = {"before": Path(args.before).resolve(), "after": HERE}
    if not (checkouts["before"] / "engine").is_dir():
        print(f"admission: --before {args.before} is no checkout of Twinmesh: it has no engine/.", file=sys.stderr)
        return 2
    rounds: list[dict[str, Any]] = []
    for index in range(args.rounds):
        order = sorted(checkouts, reverse=index % 2 == 0)
        rounds.append({name: _run(checkouts[name], args) for name in order})
    rows = [_row(rounds, index, figure) for index in range(len(TOPOLOGIES)) for figure in FIGURES]
    for row in rows:
        print(f"{row['topology']:20} {row['figure']:24} {row['before']:10.3f} {row['after']:10.3f} {row['ratio']:8.4f}")
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows, "rounds": rounds}, indent=1))
    return 0


def _row(rounds: Sequence[dict[str, Any]], index: int, figure: str) -> dict[str, Any]:
    before, after = (min(one[name][index][figure] for one in rounds) for name in ("before", "after"))
    return {
        "topology": TOPOLOGIES[index], "figure": figure, "before": before, "after": after, "ratio": after / before,
    }  # fmt: skip


def _run(checkout: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what this script reports of one checkout."""
    from twinmesh.scripts.bench.checkouts import report_of  # earlier checkouts, which run this file too, lack it

    options = ["--requests", str(args.requests), "--prefix", str(args.prefix), "--one"]
    rows: list[dict[str, Any]] = report_of(checkout, __file__, options)
    return rows


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="FOLDER", default=".", help="a checkout of the earlier commit")
    parser.add_argument("--requests", type=int, default=512, help="that wait (default: 512)")
    parser.add_argument("--prefix", type=int, default=16384, help="tokens that their prompts share (default: 16384)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout (default: 3)")
    parser.add_argument("--one", action="store_true", help="print the figures of the checkout on the path, once")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
