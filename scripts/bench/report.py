"""`twinmesh bench report`: the page of a run that was measured or simulated before, or of several side by side."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace
from twinmesh.engine.benchmark.page.page import page_of
from twinmesh.engine.benchmark.page.runs import Named
from twinmesh.engine.host.extras import need
from twinmesh.engine.host.whole_file import write_whole
from twinmesh.engine.metrics.benchmark_file import Benchmark, read_benchmark
from twinmesh.scripts import arguments
from twinmesh.scripts.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and return the exit code."""
    args = _parser().parse_args(argv)
    files = [*filter(None, (args.run,)), *args.compare]
    if not files:
        raise ValueError("there is no run to show: name the file of one, or of several after --compare.")
    page = args.html or str(Path(files[0]).with_suffix(".html"))
    arguments.check_new(page)
    check_plotly()
    runs = [_priced(read_benchmark(file), args.gpu_hour_price) for file in files]
    write_page(page, dict(zip(_names(files), runs, strict=True)))
    print(f"Wrote {page}.")
    return 0


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every command that measures can write, and at what price."""
    parser.add_argument(
        "--gpu-hour-price", metavar="X", type=arguments.positive, help="$ an hour of a GPU (default: as published)"
    )
    parser.add_argument("--json", metavar="OUT", type=arguments.written_path, help="write all records to this file")
    parser.add_argument("--html", metavar="PAGE", type=arguments.written_path, help="write one page with figures")


def check_plotly() -> None:
    """Refuse to make a page without what draws it, before anything is run.

    Raises:
        ValueError: names the extra.
    """
    need("plotly.offline", "report", "An HTML page")


def write_page(path: str, compared: Mapping[str, Benchmark]) -> None:
    """Write the page of these benchmarks, each under its name."""
    write_whole(path, page_of([Named(name, one) for name, one in compared.items()]).encode())


def _names(files: Sequence[str]) -> list[str]:
    """Return a name for each file, as short as tells them apart."""
    for names in ([Path(file).stem for file in files], list(files)):
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run is compared with itself: give files of several runs.")


def _priced(benchmark: Benchmark, dollars: float | None) -> Benchmark:
    """Return a benchmark with another price of a GPU-hour; None: its own."""
    if dollars is None:
        return benchmark
    points = []
    for point in benchmark.points:
        report = replace(point.measured.report, dollars_per_gpu_hour=dollars)
        points.append(point._replace(measured=point.measured._replace(report=report)))
    return benchmark._replace(points=tuple(points))


def _parser() -> Parser:
    parser = Parser(prog="twinmesh bench report", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument(
        "run", metavar="RUN.json", nargs="?", type=arguments.read_path,
        help="of 'bench serve --json' or 'simulate --json'",
    )  # fmt: skip
    parser.add_argument(
        "--compare", metavar="RUN.json", nargs="+", default=[], type=arguments.read_path,
        help="other runs, or a simulation, beside it: four in all",
    )  # fmt: skip
    parser.add_argument(
        "--html",
        metavar="PAGE",
        type=arguments.written_path,
        help="the page to be written (default: that of the first run, with .html)",
    )
    parser.add_argument(
        "--gpu-hour-price", metavar="X", type=arguments.positive, help="$ an hour of a GPU, instead of what the run has"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
