"""`twinmesh bench mlperf`: MLPerf's own LoadGen issues, stamps and judges a run on the engine, in this process.

One scenario a process, since LoadGen reads its configuration once. Its files lie in a folder of their own, what they
say is in our report, and the simulator replays what was issued: `twinmesh bench serve --trace RUN.json --device h100`.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from twinmesh.engine.benchmark.loadgen_settings import (
    MODELS,
    SCENARIOS,
    Limits,
    expect,
    limits_of,
    load_settings,
    shorten,
)
from twinmesh.engine.metrics.benchmark_file import About, Benchmark, Point, write_benchmark
from twinmesh.engine.metrics.report_text import as_text
from twinmesh.scripts import arguments
from twinmesh.scripts.bench import report
from twinmesh.scripts.parser import Parser

_DESCRIPTION = """\
Run the real LoadGen of MLPerf (the extra 'loadgen') against the engine in this process. Arrivals, limits, duration and
the verdict are LoadGen's; prompts are made up, of the lengths in --data, and the model is the one you give: figures are
unofficial. LoadGen issues its whole data set again and again until the duration is over, 13,368 samples or 6,396 of
gpt-oss-120b; --no-prefix-caching has samples that come again computed again. --scale shortens duration, queries and
samples, and the run is then no valid one.
"""
_DATA = "input=512,output=128"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the report, write what is asked for, and return the exit code: 0 whatever LoadGen's verdict."""
    args = _parser().parse_args(argv)
    folder = Path(args.logs or f"loadgen-{args.terms}-{args.scenario}")
    arguments.check_written(args, ("json", "html", "decision_log"))
    arguments.check_new(folder, args.json, args.html)
    if args.html is not None:
        report.check_plotly()
    benchmark = _run(args, folder)
    if args.json is not None:
        write_benchmark(args.json, benchmark)
    if args.html is not None:
        report.write_page(args.html, {args.terms: benchmark})
    return 0


def _run(args: argparse.Namespace, folder: Path) -> Benchmark:
    from twinmesh.engine.simulation.loads.load_spec import read_lengths

    settings, full = load_settings(args.terms, args.scenario)
    lengths = read_lengths(args.data)
    shorten(settings, args.scale)
    expect(settings, args.rate)
    print(_terms(args, full, limits_of(settings)), flush=True)

    from twinmesh.engine.api.client import EngineClient
    from twinmesh.engine.benchmark.engine_target import EngineTarget
    from twinmesh.engine.benchmark.loadgen import run_loadgen, samples_of
    from twinmesh.engine.benchmark.loadgen_log import notes_of

    when = datetime.now(UTC).isoformat(timespec="seconds")
    slo = full.slo if args.scenario == "Server" else None
    with arguments.metrics_port(args) as show, arguments.load_llm(args, slo=slo) as llm:
        show(llm)
        samples = samples_of(lengths, limits_of(settings).samples, llm.config.max_model_len, args.seed)
        folder.mkdir(parents=True)
        target = EngineTarget(llm, args.model, policy=args.policy, dollars_per_gpu_hour=args.gpu_hour_price)
        with target.watched() as watch:
            done = run_loadgen(EngineClient(llm.engine, 0), settings, args.scenario, samples, folder, watch.accepted)
        name = f"LoadGen's {args.terms}, {args.scenario}"
        notes = (*_holds_back(args.scale), *notes_of(done.log))
        measured = watch.measured(name, done.driven, notes)
    rate = args.rate if args.scenario == "Server" else None
    point = Point(args.scenario, measured, rate=rate)
    print(f"\n{as_text(measured.report)}LoadGen's logs are in {folder}.")
    about = About(preset="mlperf", shaped_like=f"MLPerf Inference, {args.terms}", scale=args.scale, when=when)
    return Benchmark(about, (point,))


def _terms(args: argparse.Namespace, full: Limits, scaled: Limits) -> str:
    """Say what LoadGen holds the run to."""
    late = f"TTFT {full.ttft_ms:g} ms and TPOT {full.tpot_ms:g} ms at P{100 * full.percentile:g}, "
    return (
        f"LoadGen's {args.terms}, {args.scenario}: {late if args.scenario == 'Server' else ''}at least "
        f"{scaled.seconds:g} s and {scaled.queries:,} queries, {scaled.samples:,} samples."
        + "".join(f"\nNote: {note}" for note in _holds_back(args.scale))
    )


def _holds_back(scale: float) -> tuple[str, ...]:
    if scale == 1:
        return ("unofficial: MLPerf's data set and accuracy run are not part of it",)
    return (f"not a valid run, whatever LoadGen says: duration, queries and samples are shortened to {scale:g} of it",)


def _parser() -> Parser:
    parser = Parser(
        prog="twinmesh bench mlperf",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--as", dest="terms", choices=MODELS, required=True, help="the benchmark whose limits count")
    parser.add_argument("--scenario", choices=SCENARIOS, required=True, help="Poisson arrivals, or all at once")
    parser.add_argument(
        "--rate",
        metavar="X",
        type=arguments.positive,
        default=1.0,
        help="Server: queries/s; Offline: samples/s that are expected, which says how many are issued (default: 1)",
    )
    parser.add_argument(
        "--data",
        metavar="LENGTHS",
        type=arguments.not_empty,
        default=_DATA,
        help="tokens of the samples: input=100-900,output=128, or lengths=TRACE (default: %(default)s)",
    )
    parser.add_argument(
        "--scale", metavar="X", type=arguments.fraction, default=1.0, help="shorten the run to X of it, at most 1"
    )
    parser.add_argument(
        "--seed", metavar="N", type=arguments.whole_number(0), default=0, help="of lengths (default: 0)"
    )
    parser.add_argument(
        "--logs",
        metavar="DIR",
        type=arguments.written_path,
        help="a new folder for LoadGen's files (default: loadgen-BENCHMARK-SCENARIO)",
    )
    report.add_report_arguments(parser)
    arguments.add_metrics_port(parser)
    arguments.add_engine_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
