"""What the scheduler spends on a decision, by kind of event, number of meshes and of waiting requests.

    git worktree add /tmp/before COMMIT
    python scripts/bench/scheduler.py --before /tmp/before --json scheduler.json

A decision is one event taken in, and actions asked for until there are none. There are no devices and no JAX: steps
and transfers take virtual time. Prompts have 2,000 tokens and begin with one block that all share; one in five is one
of a few that come again and again. Answers have 300 tokens. A mesh has 32 slots and 4,096 pages of 64, or as many as
`:PAGES` after the topology says. Every slot, or page, is in use and so many requests wait as `--waiting` says; where a
request ends, another arrives. One decision in fifty is an abort, by turns of a request that waits and of one that runs.
In a pool, which begins with half of its meshes prefilling and half decoding, one in `_FLIP_EVERY` is a flip besides:
one mesh more is to prefill, or one fewer. With `--mixed` requests have priorities and belong to conversations, one in
five has a deadline that most often comes while it waits, and ticks bring these; checkouts that know no such things take
the same requests without.

Kinds are those of events, and "end" for a step's result that ends requests; "+route" is added where the decision chose
a mesh for a prompt or for decoding. Reported are median and p99 in microseconds of the thread's own time, and `share`,
the median of the time spent as a share of what is allowed: 300 for an arrival and for each choice of a mesh, 50 for a
transfer, an abort, a flip, a tick, each end and each prompt that a flip sends back to wait, 20 for a step's result and
1.2 for each of its rows. The checkouts take turns, each round in a process of its own, and the best round counts.
Earlier ones do not know every topology: what they cannot measure stays empty.
"""

import argparse
import gc
import heapq
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parents[2]
TOPOLOGIES = ("both=4", "both=64", "both=256", "prefill=32,decode=32", "both=64:512")
_PROMPT, _OUTPUT, _PAGE, _PAGES, _SLOTS = 2000, 300, 64, 4096, 32
_FAMILIES = 64  # prompts that come again and again
_ABORT_EVERY, _FLIP_EVERY = 50, 201
_SESSIONS = 1000  # conversations that go on
_DRAIN = 30.0  # seconds in which a flip is to be done
# Seconds of a step, and more for each prompt token and each row; of a transfer. They only say in what order things end.
_STEP, _TOKEN, _ROW, _TRANSFER = 5e-3, 5e-5, 2e-5, 2e-3
_FILL = 6.0  # seconds in which meshes fill, or come as far as their pages and the prefill meshes let them
_HOMES = ("config", "topology", "protocol.events", "scheduler.scheduler", "protocol", "request", "scheduler")


def _name(name: str) -> Any:
    """Find a class of the checkout that this process runs, which may be an earlier one with other modules."""
    for home in _HOMES:
        try:
            module = import_module(f"twinmesh.engine.{home}")
        except ModuleNotFoundError:
            continue
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"this checkout has no {name} where it was looked for")


@dataclass(frozen=True)
class Decision:
    """One event and what was decided."""

    kind: str
    seconds: float
    rows: int  # of the step's result
    ends: int  # requests that end, or that a flip sends back to wait
    routes: int  # meshes chosen

    @property
    def name(self) -> str:
        """Return the kind under which the decision is reported."""
        kind = "end" if self.kind == "step" and self.ends else self.kind
        return kind + "+route" if self.routes else kind

    @property
    def allowed(self) -> float:
        """Return the seconds that it may take, at the median."""
        event = {"arrival": 0 if self.routes else 300, "step": 20 + 1.2 * self.rows}.get(self.kind, 50)
        ends = {"step": self.ends, "flip": self.ends, "tick": max(0, self.ends - 1)}.get(self.kind, 0)
        return 1e-6 * (event + 300 * self.routes + 50 * ends)


def _fields(name: str) -> dict[str, Any]:
    """Return the annotations of a class of the checkout, by field."""
    found: dict[str, Any] = _name(name).__annotations__
    return found


def _config(topology: str) -> Any:
    """Make the configuration of an engine; in a pool half of the meshes begin by prefilling, the others decode."""
    options: dict[str, Any] = {"topology": _name("Topology").parse(topology), "max_model_len": 4096, "page_size": _PAGE}
    if topology.startswith("pool="):
        meshes = len(options["topology"].meshes)
        options["roles"] = tuple(_name("Role")("prefill" if mesh < meshes // 2 else "decode") for mesh in range(meshes))
    return _name("EngineConfig")(**options)


def _refusal(topology: str) -> str | None:
    """Say why this checkout cannot read a topology; None: it can."""
    try:
        _name("Topology").parse(topology.partition(":")[0])
    except ValueError as error:
        return str(error)
    return None


def _transfer_ready(number: int, t: float) -> Any:
    return _name("TransferReady")(t, number)


class Engine:
    """A scheduler, devices in virtual time, and callers who keep it busy."""

    def __init__(self, topology: str, waiting: int, *, is_mixed: bool = False, seed: int = 0) -> None:
        """Fill the meshes, and let `waiting` requests wait, which are served alike or, if `is_mixed`, are not."""
        text, _, pages = topology.partition(":")
        config = _config(text)
        self._is_mixed, self._is_pool = is_mixed and "service" in _fields("RequestFacts"), text.startswith("pool=")
        self._calls = count()
        pool = _name("PoolSize")((int(pages or _PAGES),), (1,), 8 * config.max_pages)
        self._scheduler = _name("Scheduler")(config, [pool] * len(config.topology.meshes))
        self._free = [0.0] * len(config.topology.meshes)  # when each device has done all that was dispatched
        self._events: list[tuple[float, int, Callable[[float], Any]]] = []
        self._random, self._order, self._numbers, self._now = Random(seed), count(), count(), 0.0
        self._has_texts = "str" in str(_fields("RequestFacts")["id"])
        self._rows: Sequence[Any] = ()  # of the step that ended last
        self._arrived: list[Any] = []  # ids, of which some have ended
        self._fill(waiting)

    # ---- callers

    def _fill(self, waiting: int) -> None:
        """Let requests arrive until all meshes are busy, and those that wait besides; outputs end one by one."""
        for _ in range(len(self._free) * _SLOTS + _SLOTS):
            self._scheduler.on(self._arrival(self._now, self._random.randint(1, _OUTPUT)))
        self._perform(self._scheduler.actions())
        while self._now < _FILL:
            for _ in range(min(len(self._free), len(self._events))):
                self._scheduler.on(self._next_event()[1])
            self._perform(self._scheduler.actions())
        for _ in range(waiting - self.count_waiting()):
            self._scheduler.on(self._arrival(self._now))
        while actions := self._scheduler.actions():
            self._perform(actions)

    def count_waiting(self) -> int:
        """Count the requests that have no place on a mesh."""
        return sum(request.state.value == "waiting" for request in self._scheduler.requests.values())

    def count_running(self) -> int:
        """Count the requests that have one."""
        return len(self._scheduler.requests) - self.count_waiting()

    def _arrival(self, t: float, output: int = _OUTPUT) -> Any:
        number = next(self._numbers)
        family = self._random.randrange(_FAMILIES) if self._random.random() < 0.2 else _FAMILIES + number
        own = [b"%8d%8d" % (family, block) for block in range(1, _PROMPT // _PAGE)]
        id_ = str(number) if self._has_texts else number
        self._arrived.append(id_)
        service = {"service": self._service()} if self._is_mixed else {}
        return _name("Arrived")(t, _name("RequestFacts")(id_, _PROMPT, output, (b"the same for all", *own), **service))

    def _service(self) -> Any:
        """Make up how a request is to be served."""
        deadline = self._random.uniform(0.5, 30.0) if self._random.random() < 0.2 else None
        return _name("Service")(
            priority=self._random.randint(-1, 1),
            deadline=deadline,
            session=f"s{self._random.randrange(_SESSIONS)}",
        )

    def _flip(self, t: float) -> Any:
        """Let one mesh more prefill than half of them, or only half again."""
        call = next(self._calls)
        prefills = len(self._free) // 2 + (call + 1) % 2
        counts = {"prefill": prefills, "decode": len(self._free) - prefills}
        return _name("SetRoles")(t, call, t + _DRAIN, counts, {})

    def _abort(self, t: float) -> Any:
        """Abort one of the last step's requests, or one that arrived lately and most likely waits."""
        rows = [row for row in self._rows if self._scheduler.owner(row)]
        if rows and self._random.random() < 0.5:
            return _name("AbortRequested")(t, self._random.choice(rows).request_id)
        del self._arrived[:-1000]
        alive = [id_ for id_ in self._arrived if id_ in self._scheduler.requests]
        return _name("AbortRequested")(t, self._random.choice(alive))

    # ---- devices

    def _perform(self, actions: Sequence[Any]) -> None:
        for action in actions:
            match type(action).__name__:
                case "Prefill" | "Decode" | "Fused":
                    self._dispatch(action)
                case "StartTransfer":
                    t = max(self._now, self._free[action.source]) + _TRANSFER
                    self._push(t, partial(_transfer_ready, action.transfer))
                case "Finish":
                    self._push(self._now, self._arrival)

    def _dispatch(self, step: Any) -> None:
        chunks, rows = getattr(step, "chunks", ()), getattr(step, "rows", ())
        seconds = _STEP + _TOKEN * sum(chunk.length for chunk in chunks) + _ROW * len(rows)
        self._free[step.mesh] = max(self._now, self._free[step.mesh]) + seconds
        self._push(self._free[step.mesh], partial(self._done, step))

    def _push(self, t: float, make: Callable[[float], Any]) -> None:
        heapq.heappush(self._events, (t, next(self._order), make))

    def _done(self, step: Any, t: float) -> Any:
        self._rows = [*(chunk for chunk in getattr(step, "chunks", ()) if chunk.is_last), *getattr(step, "rows", ())]
        outcomes = [self._outcome(row) for row in self._rows if self._scheduler.owner(row)]
        return _name("StepDone")(t, step.mesh, step.step, tuple(outcomes))

    @staticmethod
    def _outcome(row: Any) -> Any:
        """A token, which fills a page or not."""
        length = row.kv_len + 1
        block = None if length % _PAGE else b"%8d%8d" % (int(row.request_id), length)
        return _name("Outcome")(row.request_id, False, block)

    # ---- decisions

    def _next_event(self) -> tuple[str, Any]:
        due = self._scheduler.next_due() if hasattr(self._scheduler, "next_due") else None
        if due is not None and due <= self._events[0][0]:
            self._now = max(self._now, due)
            return "tick", _name("Tick")(self._now)
        self._now, _, make = heapq.heappop(self._events)
        event = make(self._now)
        kinds = {"Arrived": "arrival", "StepDone": "step", "TransferReady": "transfer"}
        return kinds[type(event).__name__], event

    def decisions(self, events: int) -> Iterator[Decision]:
        """Take in so many events, and yield each with what it cost."""
        for number in range(1, 1 + events):
            if self._is_pool and number % _FLIP_EVERY == 0:
                yield self._decide("flip", self._flip(self._now))
            elif number % _ABORT_EVERY == 0:
                yield self._decide("abort", self._abort(self._now))
            else:
                yield self._decide(*self._next_event())

    def _decide(self, kind: str, event: Any) -> Decision:
        scheduler, out = self._scheduler, []
        waiting = self.count_waiting() if kind == "flip" else 0
        start = time.thread_time()
        scheduler.on(event)
        while actions := scheduler.actions():
            out += actions
        seconds = time.thread_time() - start
        self._perform(out)
        names = [type(action).__name__ for action in out]
        # A new page table: where a prompt is placed, and where a hand-off has credit.
        routes = sum(action.first == 0 for action in out if type(action).__name__ == "AssignPages")
        ends = max(0, self.count_waiting() - waiting) if kind == "flip" else names.count("Finish")
        return Decision(kind, seconds, len(getattr(event, "outcomes", ())), ends, routes)


def measure(topology: str, waiting: int, events: int, *, is_mixed: bool = False) -> list[dict[str, Any]]:
    """Measure one engine; one row for each kind of decision, and one for all."""
    engine = Engine(topology, waiting, is_mixed=is_mixed)
    gc.collect()
    gc.freeze()  # what is there is not looked at again, as in a process that runs for long
    by_kind: dict[str, list[Decision]] = defaultdict(list)
    for decision in engine.decisions(events):
        by_kind["any"].append(decision)
        by_kind[decision.name].append(decision)
    return [{"topology": topology, "waiting": waiting} | _figures(kind, by_kind[kind]) for kind in sorted(by_kind)]


def _figures(kind: str, decisions: Sequence[Decision]) -> dict[str, Any]:
    micros = sorted(1e6 * decision.seconds for decision in decisions)
    return {
        "kind": kind,
        "count": len(micros),
        "rows": statistics.median(decision.rows for decision in decisions),
        "median": statistics.median(micros),
        "p99": micros[int(0.99 * (len(micros) - 1))],
        "share": statistics.median(decision.seconds / decision.allowed for decision in decisions),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checkouts in turn and print a line for each kind of decision; returns the exit code."""
    args = _arguments(argv)
    sizes = [(text, waiting) for text in args.topologies for waiting in args.waiting]
    if args.one:
        known = [size for size in sizes if _refusal(size[0]) is None]
        print(json.dumps([row for size in known for row in measure(*size, args.events, is_mixed=args.mixed)]))
        return 0
    for refusal in filter(None, map(_refusal, args.topologies)):
        print(f"scheduler: {refusal}", file=sys.stderr)
        return 2
    checkouts = {"after": HERE}
    if args.before:
        checkouts["before"] = Path(args.before).resolve()
        if not (checkouts["before"] / "engine").is_dir():
            print(f"scheduler: --before {args.before} is no checkout of Twinmesh: it has no engine/.", file=sys.stderr)
            return 2
    rows = [row for size in sizes for row in _compare(checkouts, *size, args)]
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows}, indent=1))
    return 0


def _compare(checkouts: dict[str, Path], text: str, waiting: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all checkouts in turn; print and return the best figures of each kind of decision."""
    from twinmesh.scripts.bench.checkouts import report_of  # earlier checkouts, which run this file too, lack it

    options = ["--topologies", text, "--waiting", str(waiting), "--events", str(args.events), "--one"]
    options += ["--mixed"] if args.mixed else []
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in checkouts}
    for index in range(args.rounds):
        for name in sorted(checkouts, reverse=index % 2 == 0):
            found[name].append(report_of(checkouts[name], __file__, options))
    best = {name: _best(rounds) for name, rounds in found.items()}
    rows = []
    for kind, after in best["after"].items():
        before = best.get("before", {}).get(kind)
        rows.append({"after": after, "before": before})
        print(f"{text:22} {waiting:6} {kind:15}", _line(after), _line(before) if before else "", flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    return "{count:6} rows {rows:4.0f}  median {median:8.1f}  p99 {p99:8.1f}  share {share:6.2f} ".format(**row)


def _best(rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Take the least of each figure of several rounds, by kind."""
    best: dict[str, dict[str, Any]] = {}
    for row in (row for rows in rounds for row in rows):
        least = best.setdefault(row["kind"], dict(row))
        least |= {figure: min(least[figure], row[figure]) for figure in ("median", "p99", "share")}
    return best


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="FOLDER", help="a checkout of the earlier commit (none)")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, help=f"default: {' '.join(TOPOLOGIES)}")
    parser.add_argument("--waiting", type=int, nargs="+", default=[1000, 10_000], help="requests (1000 10000)")
    parser.add_argument("--events", type=int, default=20_000, help="decisions of each (default: 20000)")
    parser.add_argument("--mixed", action="store_true", help="priorities, deadlines and conversations (none)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout (default: 3)")
    parser.add_argument("--one", action="store_true", help="print the figures of the checkout on the path, once")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
