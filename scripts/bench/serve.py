"""`twinmesh bench serve`: a load or a preset on the engine, in this process, or on the simulator; report and page.

It is thin: loads are `engine/simulation/loads`, presets and what runs them `engine/benchmark`, files `engine/metrics`.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.benchmark.presets import PRESETS, Sweep, scaled
from twinmesh.engine.metrics.benchmark_file import About, Benchmark, Point, write_benchmark
from twinmesh.engine.metrics.report_text import as_text
from twinmesh.scripts import arguments
from twinmesh.scripts.loads import HELP, read_load
from twinmesh.scripts.parser import Parser

if TYPE_CHECKING:
    from twinmesh.engine.benchmark.runner import Ask
    from twinmesh.engine.benchmark.target import Target

_DESCRIPTION = """\
Run a preset, shaped like a benchmark that the field knows, or a load of your own, on the engine in this process; with
--device or --profile on the simulator, which gets the same arrivals and gives the same report. Every figure is
unofficial. 'twinmesh bench report' shows two runs in one page.

presets:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a report for each point, write what is asked for, and return the exit code."""
    args = _parser().parse_args(argv)
    arguments.check_written(args, ("json", "html", "decision_log"), arguments.given_files(args))
    for path in filter(None, (args.json, args.html)):
        if Path(path).exists():
            raise ValueError(f"{path} exists: give another name, or move it away.")
    if args.html is not None:
        from twinmesh.engine.extras import need

        need("plotly", "report", "--html")
    with ExitStack() as stack:
        benchmark = _run(args, stack)
    if args.json is not None:
        write_benchmark(args.json, benchmark)
    if args.html is not None:
        from twinmesh.scripts.bench.report import write_page

        write_page(args.html, {args.name or args.preset or args.trace: benchmark})
    return 0


def _run(args: argparse.Namespace, stack: ExitStack) -> Benchmark:
    from twinmesh.engine.benchmark.runner import run_load, run_sweep

    is_simulated = args.device is not None or args.profile is not None
    if is_simulated and args.metrics_port is not None:
        raise ValueError("--metrics-port shows an engine that runs, and a simulation has none: leave it out.")
    target, ask = _simulated(args) if is_simulated else _real(args, stack)
    when = None if is_simulated else datetime.now(UTC).isoformat(timespec="seconds")
    if args.preset is None:
        return run_load(target, read_load(args.trace, args.model), About(when=when), _print)
    sweep: Sweep = scaled(PRESETS[args.preset], args.scale)
    about = About(preset=sweep.name, shaped_like=sweep.shaped_like, scale=args.scale, when=when)
    return run_sweep(target, sweep, about, _print, concurrencies=args.concurrency, ask=ask, seed=args.seed)


def _real(args: argparse.Namespace, stack: ExitStack) -> "tuple[Target, Ask | None]":
    from twinmesh.engine.benchmark import accuracy
    from twinmesh.engine.benchmark.engine_target import EngineTarget

    show = stack.enter_context(arguments.metrics_port(args))
    llm = stack.enter_context(arguments.load_llm(args, slo=args.slo))
    show(llm)
    target = EngineTarget(llm, args.model, policy=args.policy, dollars_per_gpu_hour=args.gpu_hour_price)
    return target, lambda: accuracy.ask(llm, accuracy.read_items())


def _simulated(args: argparse.Namespace) -> "tuple[Target, Ask | None]":
    from twinmesh.engine.benchmark.simulated_target import SimulatedTarget
    from twinmesh.engine.options import EngineOptions
    from twinmesh.engine.scheduler.policy import policy_named
    from twinmesh.engine.simulation.assemble import assemble, source_of
    from twinmesh.engine.simulation.costs.profile import read_profile
    from twinmesh.models.checkpoints.known_models import named_model
    from twinmesh.scripts.simulate import OPTIONS

    profile = None if args.profile is None else read_profile(args.profile)
    source, model = source_of(args.device, profile, str(args.profile)), named_model(args.model)
    options = EngineOptions(args.model, slo=args.slo, **{name: getattr(args, name) for name in OPTIONS})
    engine = assemble(model.name, model.config, options, source, policy_named(args.policy), str(args.profile))
    return SimulatedTarget(engine, source, model.name, seed=args.seed), None


def _print(point: Point) -> None:
    print(f"\n{point.name}\n{as_text(point.measured.report)}", end="", flush=True)
    if point.accuracy is not None:
        print(f"Accuracy, {point.accuracy.name}: {point.accuracy.right} of {point.accuracy.asked} right")


def _parser() -> Parser:
    presets = "\n".join(f"  {one.name:17}{one.shaped_like}" for one in PRESETS.values())
    parser = Parser(
        prog="twinmesh bench serve",
        description=f"{_DESCRIPTION}{presets}\n\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=PRESETS, help="a preset, see above")
    what.add_argument("--trace", metavar="LOAD", type=arguments.not_empty, help="a trace or a generator, see above")
    parser.add_argument(
        "--scale", metavar="X", type=_share, default=1.0, help="multiply a preset's lengths and times by X, at most 1"
    )
    parser.add_argument(
        "--concurrency", metavar="N,...", type=_counts, help="instead of the preset's, ascending, as in 1,2,4"
    )
    parser.add_argument(
        "--seed", metavar="N", type=arguments.whole_number(0), default=0, help="of lengths (default: 0)"
    )
    parser.add_argument(
        "--gpu-hour-price",
        metavar="X",
        type=arguments.positive,
        help="$ an hour of a GPU; by default what is published",
    )
    parser.add_argument("--slo", metavar="SLO", type=arguments.slo, help="targets: ttft=1000ms,tpot=50ms,percentile=99")
    parser.add_argument("--device", metavar="NAME", help="simulate on h100, h200 or b200")
    parser.add_argument("--profile", metavar="FILE", type=arguments.read_path, help="simulate by a measured profile")
    parser.add_argument("--name", metavar="NAME", type=arguments.not_empty, help="of the run, in the page")
    parser.add_argument("--json", metavar="OUT", type=arguments.written_path, help="write all records to this file")
    parser.add_argument("--html", metavar="PAGE", type=arguments.written_path, help="write one page with figures")
    arguments.add_metrics_port(parser)
    arguments.add_engine_arguments(parser)
    return parser


def _share(text: str) -> float:
    number = arguments.positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1")
    return number


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(arguments.whole_number(1)(part) for part in text.split(","))
    if any(a >= b for a, b in pairwise(counts)):
        raise argparse.ArgumentTypeError(f"{text!r} does not ascend")
    return counts


if __name__ == "__main__":
    sys.exit(main())
