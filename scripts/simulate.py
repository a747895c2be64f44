"""`twinmesh simulate`: what a load would get from an engine that need not be there. No device, no weights."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from twinmesh.engine.options import EngineOptions
from twinmesh.scripts import arguments
from twinmesh.scripts.loads import HELP, add_load_arguments, read_load

if TYPE_CHECKING:
    from twinmesh.engine.simulation.costs.profile import Profile
    from twinmesh.engine.simulation.workload import Workload

SUMMARY = "simulate a load on an engine that need not be there, and report latencies, goodput and cost"
DESCRIPTION = f"""\
Run a load through Twinmesh's own scheduler in virtual time, on devices that need not be there, and print a load report.

Costs of steps come from a profile (--profile) or from the published peaks of a device, which nobody has measured. The
memory plan is start-up's own: what does not fit is refused with its arithmetic. Weights are as in the engine that a
profile was measured with; without one those stay quantised that a GPU would keep so (--quantization).

{HELP}"""

# The options of an engine that a simulation heeds.
OPTIONS = (
    "topology", "roles", "policy", "max_model_len", "page_size", "max_num_seqs", "prefill_buckets", "decode_buckets",
    "decode_steps", "kv_cache_bytes", "memory_fraction", "enable_prefix_caching", "deterministic", "max_retries",
    "age_seconds", "max_waiting", "max_waiting_tokens", "quantization", "decision_log",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_load_arguments(parser)
    parser.add_argument(
        "--slo",
        metavar="SLO",
        type=arguments.slo,
        help="targets of answers: ttft=1000ms,tpot=50ms,percentile=99",
    )
    parser.add_argument("--speed", metavar="X", type=arguments.positive, help="let requests come X times as fast")
    parser.add_argument("--rate", metavar="X", type=arguments.positive, help="let X requests come a second in the mean")
    parser.add_argument(
        "--requests", metavar="N", type=arguments.whole_number(1), help="take the first N requests of the load alone"
    )
    parser.add_argument(
        "--noise", metavar="X", type=arguments.positive,
        help="let true step times differ from their costs: standard deviation of their logarithm, such as 0.1 "
        "(default: as the profile has it; none without one)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", metavar="N", type=arguments.whole_number(0), default=0, help="of the noise (default: %(default)s)"
    )
    parser.add_argument(
        "--json",
        metavar="OUT",
        type=arguments.written_path,
        help="write the report with all records and samples to this file",
    )
    arguments.add_simulated_options(parser, OPTIONS)


def run(args: argparse.Namespace) -> int:
    """Simulate, print the report and return the exit code."""
    # What simulates is imported by this command alone.
    from twinmesh.engine.metrics.gaps import Gaps
    from twinmesh.engine.metrics.report_file import write_report
    from twinmesh.engine.metrics.report_text import as_text
    from twinmesh.engine.scheduler.decision_log import DecisionLog, RunFacts
    from twinmesh.engine.scheduler.policy import policy_named
    from twinmesh.engine.simulation.assemble import assemble, source_of
    from twinmesh.engine.simulation.costs.profile import read_profile
    from twinmesh.engine.simulation.simulated_report import measured_of
    from twinmesh.engine.simulation.simulator import simulate
    from twinmesh.models.checkpoints.known_models import named_model

    arguments.check_written(args, ("json", "decision_log"), arguments.given_files(args))
    profile = None if args.profile is None else read_profile(args.profile)
    source, model = source_of(args.device, profile, str(args.profile)), named_model(args.model)
    options, policy = _options(args, profile), policy_named(args.policy)
    engine = assemble(model.name, model.config, options, source, policy, str(args.profile), model.formats)
    workload, gaps = _workload(args), Gaps()
    noise = args.noise or (0.0 if profile is None else profile.spread)
    start = time.perf_counter()
    log = (
        None
        if args.decision_log is None
        else DecisionLog(args.decision_log, RunFacts(model.config, model.name, source.device))
    )
    try:
        done = simulate(
            workload, engine, seed=args.seed, noise=noise, log=log, gaps=gaps, samples=args.json is not None
        )
    finally:
        if log is not None:
            log.close()
    seconds = time.perf_counter() - start
    found = measured_of(done, engine, source, workload=workload.name, model=model.name, seed=args.seed, gaps=gaps)
    print(as_text(found.report), end="")
    print(
        f"Simulated in {seconds:.1f} s: {len(done.records) / seconds:,.0f} requests/s, {done.events:,} events and "
        f"{done.decisions:,} decisions.",
        file=sys.stderr,
    )
    if args.json is not None:
        write_report(args.json, *found)
    return 0


def _options(args: argparse.Namespace, profile: "Profile | None") -> EngineOptions:
    """Return the engine's options: where they name no buckets, those of the profile count."""
    given = {name: getattr(args, name) for name in OPTIONS}
    if profile is not None:
        for name in ("prefill_buckets", "decode_buckets"):
            given[name] = getattr(profile, name) if given[name] is None else given[name]
    return EngineOptions(args.model, slo=args.slo, **given)


def _workload(args: argparse.Namespace) -> "Workload":
    from twinmesh.engine.simulation.loads.scaling import faster, first

    workload = read_load(args.trace, args.model)
    if args.requests is not None:
        workload = first(workload, args.requests)
    if args.speed is not None:
        workload = faster(workload, args.speed)
    if args.rate is not None:
        times = [request.at for request in workload.requests if request.at is not None]
        if len(times) < 2 or times[-1] <= times[0]:
            raise ValueError(f"--rate needs a load whose requests come at different times: {workload.name} has none.")
        workload = faster(workload, args.rate * (times[-1] - times[0]) / (len(times) - 1))
    return workload


if __name__ == "__main__":
    from twinmesh.scripts.cli import main

    sys.exit(main(["simulate", *sys.argv[1:]]))
