"""`twinmesh bench report`: the page of a run that was measured or simulated before, or of two side by side."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from twinmesh.engine.benchmark.page.figures import Named
from twinmesh.engine.benchmark.page.page import page_of
from twinmesh.engine.metrics.benchmark_file import Benchmark, read_benchmark
from twinmesh.engine.whole_file import write_whole
from twinmesh.scripts import arguments
from twinmesh.scripts.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and return the exit code."""
    args = _parser().parse_args(argv)
    files = args.compare or [args.run]
    if files == [None]:
        raise ValueError("nobody says of which run: give the JSON of one, or --compare with two.")
    if Path(args.html).exists():
        raise ValueError(f"{args.html} exists: give another name, or move it away.")
    names = [Path(file).stem for file in files]
    if len(set(names)) < len(names):
        names = list(files)
    write_page(args.html, dict(zip(names, map(read_benchmark, files), strict=True)))
    return 0


def write_page(path: str, compared: Mapping[str, Benchmark]) -> None:
    """Write the page of these benchmarks, each under its name."""
    write_whole(path, page_of([Named(name, one) for name, one in compared.items()]).encode())


def _parser() -> Parser:
    parser = Parser(prog="twinmesh bench report", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("run", metavar="RUN.json", nargs="?", type=arguments.read_path, help="of 'bench serve --json'")
    parser.add_argument(
        "--compare", metavar=("A.json", "B.json"), nargs=2, type=arguments.read_path, help="two runs in one page"
    )
    parser.add_argument(
        "--html", metavar="PAGE", type=arguments.written_path, required=True, help="the page to be written"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
