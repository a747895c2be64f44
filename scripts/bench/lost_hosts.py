"""Hosts that are lost while a large engine serves: what it costs its requests, and until when. Simulated.

    python scripts/bench/lost_hosts.py --json lost_hosts.json

`--hosts` hosts of `--tp` devices, a mesh each that does both, serve a Poisson load at `--load` of what they can do: so
many times what one of them, kept full, ends a second (simulated too). Prompts and answers have lengths drawn evenly
from half of the mean to one and a half times it. `--lost` of the hosts are lost evenly within `--within` seconds from
`--before` on: each is silent, is declared lost after `--silent` seconds, and is back, empty, `--restart` seconds after
its loss. The load goes on for `--after` seconds after the last one is back, and all requests then end.

Steps cost what the published peaks of `--device` say: a roofline, not a measurement. The host takes no time, since one
dispatching thread could not serve 256 meshes. So this is what losses cost where devices are the limit.

Reported: requests lost, which are those that do not run to their end; tokens repeated or missing, against the lengths
asked for; requests that started over; percentiles of TTFT by the time of arrival, before the first loss, from then
until the last host is back, and after; goodput, which is requests a second that keep to the SLO. Recovery of a
percentile is the time from the first loss until no later window of `WINDOW` seconds, of arrivals, has one above
`MARGIN` times the highest of those before the loss; what comes in the first `--warm` seconds is left out.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from twinmesh.engine.metrics.request_records import FINISHED, RequestRecords
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.simulation.incidents import MeshGone
from twinmesh.engine.simulation.simulator import simulate
from twinmesh.engine.simulation.workload import Workload, WorkRequest
from twinmesh.scripts.bench.simulation import engine_of

WINDOW = 5.0  # seconds
MARGIN = 1.1
PERCENTILES = (50.0, 99.0, 100.0)
_FULL = 1000  # requests, of which the middle half tells what a host can do


class Times(NamedTuple):
    """The parts of a run, in seconds from its start."""

    warm: float
    first_loss: float
    last_back: float
    end: float  # of arrivals


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print the figures, and return the exit code."""
    args = _arguments(argv)
    try:
        figures = measure(args)
    except ValueError as error:
        print(f"lost_hosts: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=1))
    if args.json is not None:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "figures": figures}, indent=1))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate the run that the arguments describe.

    Raises:
        ValueError: numbers that cannot be.
    """
    lost = losses(args.hosts, args.lost, args.before, args.within, args.restart, args.silent)
    last_back = lost[-1].at + args.restart
    times = Times(args.warm, args.before, last_back, last_back + args.after)
    random = np.random.default_rng(args.seed)
    each = capacity(args, random)
    asked = requests(args.load * args.hosts * each, times.end, args.prompt, args.output, random)
    engine = engine_of(f"both(mode=fused)={args.hosts}{_tp(args)}", args.device, args.model)
    begin = time.perf_counter()
    done = simulate(Workload("lost hosts", asked), engine, incidents=lost)
    seconds = time.perf_counter() - begin
    figures = {"capacity_of_host": each, "hosts_lost": len(lost), "last_loss_after_first": lost[-1].at - lost[0].at}
    figures |= {"requests": len(asked), "displaced": done.displaced}
    slo = SLO(ttft_ms=args.ttft_ms, tpot_ms=args.tpot_ms)
    return figures | judged(done.records, asked, times, slo) | {"seconds_of_simulation": seconds}


def losses(hosts: int, share: float, begin: float, within: float, down: float, silent: float) -> list[MeshGone]:
    """Return which hosts are lost when: a share of them, evenly chosen, evenly within so many seconds from `begin`.

    Raises:
        ValueError: that is none or all of them, or times that cannot be.
    """
    count = round(share * hosts)
    if not 0 < count < hosts:
        raise ValueError(f"a share of {share:g} of {hosts} hosts is {count}: at least one has to be lost, and not all.")
    return [MeshGone(begin + within * n / count, hosts * n // count, down, silent) for n in range(count)]


def requests(rate: float, seconds: float, prompt: int, output: int, random: np.random.Generator) -> list[WorkRequest]:
    """Draw a Poisson load: `rate` requests a second, with lengths evenly from half of the mean to 1.5 times it."""
    count = int(random.poisson(rate * seconds))
    at = np.sort(random.uniform(0.0, seconds, count)).tolist()
    lengths = [random.integers(max(1, mean // 2), 3 * mean // 2 + 1, count).tolist() for mean in (prompt, output)]
    return [WorkRequest(*each) for each in zip(*lengths, at, strict=True)]


def capacity(args: argparse.Namespace, random: np.random.Generator) -> float:
    """Return how many requests a second one host ends that is kept full."""
    drawn = requests(_FULL, 1.0, args.prompt, args.output, random)
    full = [WorkRequest(request.prompt_len, request.output_len, 0.0) for request in drawn]
    engine = engine_of(f"both(mode=fused)=1{_tp(args)}", args.device, args.model)
    ends = np.sort(simulate(Workload("full", full), engine).records.column("finish"))
    first, last = len(ends) // 4, 3 * len(ends) // 4
    return float((last - first) / (ends[last] - ends[first]))


def judged(records: RequestRecords, asked: Sequence[WorkRequest], times: Times, slo: SLO) -> dict[str, Any]:
    """Say what was lost, repeated and late, by the parts of the run."""
    column = records.column
    arrival, output = column("arrival"), column("output_len")
    wanted = np.array([request.output_len for request in asked])[column("number")]
    ended = column("reason") < FINISHED
    ttft = column("first_token") - arrival
    gaps = (column("last_token") - column("first_token")) / np.maximum(1, output - 1)
    met = ended & (1e3 * ttft <= (slo.ttft_ms or np.inf)) & (1e3 * gaps <= (slo.tpot_ms or np.inf))
    parts: dict[str, dict[str, float]] = {}
    bounds = {"before": times[0:2], "during": times[1:3], "after": times[2:4]}
    for name, (begin, end) in bounds.items():
        here = (arrival >= begin) & (arrival < end)
        late = np.percentile(ttft[here], (50, 99, 99.9, 100)).tolist()
        parts[name] = dict(zip(("ttft_p50", "ttft_p99", "ttft_p99.9", "ttft_max"), late, strict=True)) | {
            "arrivals_per_second": float(here.sum() / (end - begin)),
            "goodput": float(met[here].sum() / (end - begin)),
            "met": float(met[here].mean()),
        }
    return {
        "lost": len(asked) - int(ended.sum()),
        "tokens_repeated": int(np.maximum(0, output - wanted).sum()),
        "tokens_missing": int(np.maximum(0, wanted - output)[ended].sum()),
        "parts": parts,
        "recovery": {f"ttft_p{q:g}": recovery(arrival, ttft, times, q) for q in PERCENTILES},
    }


def recovery(arrival: np.ndarray, ttft: np.ndarray, times: Times, percentile: float) -> float | None:
    """Return the seconds from the first loss until the TTFT is what it was (see above): 0 where it never was higher,
    None where it is higher to the end.

    Raises:
        ValueError: there is no whole window before the first loss.
    """
    before = _windows(arrival, ttft, times.warm, times.first_loss, percentile)
    if not before:
        raise ValueError(f"before={times.first_loss:g} has to be {WINDOW:g} s above warm={times.warm:g}, or more.")
    since = _windows(arrival, ttft, times.first_loss, times.end, percentile)
    high = [number for number, value in enumerate(since) if value > MARGIN * max(before)]
    if not high:
        return 0.0
    return None if high[-1] == len(since) - 1 else WINDOW * (high[-1] + 1)


def _windows(arrival: np.ndarray, ttft: np.ndarray, begin: float, end: float, percentile: float) -> list[float]:
    found = []
    for number in range(int((end - begin) / WINDOW)):
        left = begin + number * WINDOW
        here = ttft[(arrival >= left) & (arrival < left + WINDOW)]
        found.append(float(np.percentile(here, percentile)) if len(here) else 0.0)
    return found


def _tp(args: argparse.Namespace) -> str:
    return f"xtp{args.tp}" if args.tp > 1 else ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--hosts", type=int, default=256, help="default: %(default)s")
    add("--tp", type=int, default=1, help="devices of a host's mesh (default: %(default)s)")
    add("--device", default="h100", help="default: %(default)s")
    add("--model", default="llama-3.1-8b", help="whose sizes count (default: %(default)s)")
    add("--load", type=float, default=0.7, help="share of what the hosts can do (default: %(default)s)")
    add("--prompt", type=int, default=12288, help="mean tokens of a prompt (default: %(default)s)")
    add("--output", type=int, default=768, help="mean tokens of an answer (default: %(default)s)")
    add("--lost", type=float, default=0.05, help="share of the hosts (default: %(default)s)")
    add("--within", type=float, default=60.0, help="seconds in which they are lost (default: %(default)s)")
    add("--silent", type=float, default=5.0, help="seconds until a loss is noticed (default: %(default)s)")
    add("--restart", type=float, default=60.0, help="seconds from a loss until the host is back (default: %(default)s)")
    add("--warm", type=float, default=20.0, help="first seconds, left out (default: %(default)s)")
    add("--before", type=float, default=35.0, help="seconds until the first loss (default: %(default)s)")
    add("--after", type=float, default=25.0, help="seconds of load after the last is back (default: %(default)s)")
    add("--ttft-ms", type=float, default=1000.0, help="SLO (default: %(default)s)")
    add("--tpot-ms", type=float, default=50.0, help="SLO (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the load (default: %(default)s)")
    add("--json", metavar="FILE", help="also write the figures to this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
