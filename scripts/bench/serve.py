"""`twinmesh bench serve`: a load or a preset on the engine, in this process, or on the simulator; report and page.

It is thin: loads are `engine/simulation/loads`, presets and what runs them `engine/benchmark`, files `engine/metrics`,
and `serve_targets.py` beside this file makes what they run on.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.benchmark.presets import PRESETS, Preset
from twinmesh.engine.benchmark.summary import table
from twinmesh.engine.metrics.benchmark_file import About, Benchmark, Point, write_benchmark
from twinmesh.engine.metrics.report_text import as_text
from twinmesh.scripts import arguments
from twinmesh.scripts.bench import report, serve_targets
from twinmesh.scripts.bench.serve_targets import Asks, Runs
from twinmesh.scripts.loads import HELP, read_load
from twinmesh.scripts.parser import Parser

if TYPE_CHECKING:
    from twinmesh.engine.simulation.workload import Workload

_DESCRIPTION = """\
Run a preset, shaped like a benchmark that the field knows, or a load of your own, on the engine in this process. With
--device or --profile it runs on the simulator instead, which needs neither device nor weights; with --simulate on both,
one after the other: the same requests and the same report. Every figure of a preset is unofficial. 'twinmesh bench
report' shows several runs in one page, and 'twinmesh bench mlperf' runs MLPerf's own load generator.

presets:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a report for each point, write what is asked for, and return the exit code: 1: a score is too low."""
    args = _parser().parse_args(argv)
    _check(args)
    preset = _preset(args)
    workload = None if args.trace is None else read_load(args.trace, args.model)
    with ExitStack() as stack:
        found = {runs.name: _run(runs, preset, workload, args) for runs in serve_targets.made(args, stack)}
    if preset is not None:
        print(f"\nShaped like {preset.shaped_like}; unofficial.\n{table(found, preset.figures)}", end="")
    _write(args, found)
    return _too_low(found, args.least_score)


def _check(args: argparse.Namespace) -> None:
    """Refuse what would be found out only after the run.

    Raises:
        ValueError: says what is wrong.
    """
    if args.preset is None and (args.scale != 1 or args.concurrency or args.max_concurrency or args.data):
        raise ValueError("--scale, --concurrency, --max-concurrency and --data are of presets: --trace has options.")
    serve_targets.check(args)
    args.simulated_json = None
    if args.json is not None and args.simulate:
        args.simulated_json = str(Path(args.json).with_suffix(f".simulated{Path(args.json).suffix}"))
    written = ("json", "simulated_json", "html", "decision_log")
    arguments.check_written(args, written, arguments.given_files(args))
    arguments.check_new(*(getattr(args, name) for name in written))
    if args.html is not None:
        report.check_plotly()


def _preset(args: argparse.Namespace) -> Preset | None:
    """Return the preset with what was asked of it; None: it is a load of one's own."""
    from dataclasses import replace

    if args.preset is None:
        return None
    preset: Preset = PRESETS[args.preset]
    if args.max_concurrency is not None:
        preset = preset.up_to(args.max_concurrency)
    if args.concurrency is not None:
        preset = replace(preset, concurrencies=args.concurrency)
    if args.data is not None:
        preset = replace(preset, shape=preset.shape.with_data(args.data))
    return preset


def _run(runs: Runs, preset: Preset | None, workload: "Workload | None", args: argparse.Namespace) -> Benchmark:
    from twinmesh.engine.benchmark.runner import run_load, run_preset

    asks: Asks | None = runs.asks if args.accuracy or (preset is not None and preset.asks_accuracy) else None
    if asks is not None:
        asks.check()
    ask = None if asks is None else asks.ask
    when = None if runs.is_simulated else datetime.now(UTC).isoformat(timespec="seconds")
    if preset is None:
        assert workload is not None
        return run_load(runs.target, workload, About(when=when), _print, ask)
    about = About(preset=preset.name, shaped_like=preset.shaped_like, scale=args.scale, when=when)
    return run_preset(runs.target, preset, about, _print, scale=args.scale, ask=ask, seed=args.seed)


def _print(point: Point) -> None:
    print(f"\n{point.name}\n{as_text(point.measured.report)}", end="", flush=True)
    if point.accuracy is not None:
        print(f"Accuracy, {point.accuracy.name}: {point.accuracy.right} of {point.accuracy.asked} right")


def _write(args: argparse.Namespace, found: dict[str, Benchmark]) -> None:
    for path, benchmark in zip((args.json, args.simulated_json), found.values(), strict=False):
        if path is not None:
            write_benchmark(path, benchmark)
    if args.html is not None:
        report.write_page(args.html, found)


def _too_low(found: dict[str, Benchmark], least: float | None) -> int:
    """Say which points answered too few questions right, and return the exit code."""
    if least is None:
        return 0
    scores = [(point.name, point.accuracy.score) for one in found.values() for point in one.points if point.accuracy]
    low = [
        f"{name}: a score of {score:.2f} is below --least-score {least:g}." for name, score in scores if score < least
    ]
    print(*low, sep="\n", end="\n" * bool(low), file=sys.stderr)
    return int(bool(low))


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
    _add_preset_arguments(parser)
    parser.add_argument(
        "--seed",
        metavar="N",
        type=arguments.whole_number(0),
        default=0,
        help="of a preset's lengths, and of the noise of simulated steps (default: %(default)s)",
    )
    parser.add_argument("--accuracy", action="store_true", help="ask questions with known answers after each point")
    parser.add_argument(
        "--least-score",
        metavar="X",
        type=arguments.fraction,
        help="end with code 1 if a smaller share is answered right",
    )
    parser.add_argument("--power", action="store_true", help="read what the GPUs draw, by NVML")
    parser.add_argument("--slo", metavar="SLO", type=arguments.slo, help="targets: ttft=1000ms,tpot=50ms,percentile=99")
    parser.add_argument("--device", metavar="NAME", help="simulate on h100, h200 or b200")
    parser.add_argument("--profile", metavar="FILE", type=arguments.read_path, help="simulate by a measured profile")
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="run on the engine and then on the simulator, whose file has .simulated in its name",
    )
    parser.add_argument("--name", metavar="NAME", type=arguments.not_empty, help="of the run, in the page")
    report.add_report_arguments(parser)
    arguments.add_metrics_port(parser)
    arguments.add_engine_arguments(parser)
    return parser


def _add_preset_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--scale",
        metavar="X",
        type=arguments.fraction,
        default=1.0,
        help="multiply a preset's lengths and times by X, at most 1",
    )
    parser.add_argument(
        "--concurrency", metavar="N,...", type=_counts, help="instead of the preset's, ascending, as in 1,2,4"
    )
    parser.add_argument(
        "--max-concurrency",
        metavar="N",
        type=arguments.whole_number(1),
        help="the preset's up to N; C_max of endpoints",
    )
    parser.add_argument(
        "--data", metavar="FILE", type=arguments.read_path,
        help="recorded lengths: a trace for endpoints, sessions for agents (JSONL as cc-traces-weka)",
    )  # fmt: skip


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(arguments.whole_number(1)(part) for part in text.split(","))
    if any(a >= b for a, b in pairwise(counts)):
        raise argparse.ArgumentTypeError(f"{text!r} does not ascend")
    return counts


if __name__ == "__main__":
    sys.exit(main())
