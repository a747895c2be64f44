"""`twinmesh bench report`: the page of a run that was measured or simulated before, or of two side by side."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace
from twinmesh.engine.benchmark.page.page import page_of
from twinmesh.engine.benchmark.page.runs import Named
from twinmesh.engine.extras import need
from twinmesh.engine.metrics.benchmark_file import Benchmark, read_benchmark
from twinmesh.engine.whole_file import write_whole
from twinmesh.scripts import arguments
from twinmesh.scripts.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and return the exit code."""
    args = _parser().parse_args(argv)
    page = args.html or str(Path(args.run).with_suffix(".html"))
    if Path(page).exists():
        raise ValueError(f"{page} exists: give another name with --html, or move it away.")
    need("plotly.offline", "report", "An HTML page")
    files = list(filter(None, (args.run, args.compare)))
    runs = [_priced(read_benchmark(file), args.gpu_hour_price) for file in files]
    write_page(page, dict(zip(_names(files), runs, strict=True)))
    print(f"Wrote {page}.")
    return 0


def write_page(path: str, compared: Mapping[str, Benchmark]) -> None:
    """Write the page of these benchmarks, each under its name."""
    write_whole(path, page_of([Named(name, one) for name, one in compared.items()]).encode())


def _names(files: Sequence[str]) -> list[str]:
    """Return a name for each file, as short as tells them apart."""
    for names in ([Path(file).stem for file in files], list(files)):
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{files[0]} is compared with itself: give another run after --compare.")


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
        "run", metavar="RUN.json", type=arguments.read_path, help="of 'bench serve --json' or 'simulate --json'"
    )
    parser.add_argument(
        "--compare", metavar="OTHER.json", type=arguments.read_path, help="another run, or its simulation, beside it"
    )
    parser.add_argument(
        "--html", metavar="PAGE", type=arguments.written_path, help="the page to be written (default: RUN.html)"
    )
    parser.add_argument(
        "--gpu-hour-price", metavar="X", type=arguments.positive, help="$ an hour of a GPU, instead of what the run has"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
