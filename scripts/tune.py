"""Measures tiles for the Hopper kernels on this machine's GPU and writes them into kernels_pallas/tiles.json.

    python scripts/tune.py [--heads 32,8,128 --heads 64,8,64] [--page-sizes 64] [--lengths 2048,8192,32768]

Each row of the table is [kernel, architecture, head_dim, query heads of a key/value head, page size, length class,
[...]], the last being the fields of `DecodeTiles` or `PrefillTiles`. The best tiles of a combination become its row
where they take less than 98 % of the time of those in use, be they a row's or the default; else the table stays as it
is. It is written after each combination. Run it on a quiet GPU; it takes a minute or so for each combination.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import twinmesh
from jax import Array
from twinmesh.kernels_pallas import decode, prefill, tiles
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.mosaic import HEAD_DIMS, PAGE_SIZES, WARPGROUP_ROWS
from twinmesh.kernels_pallas.tiles import HOPPER, LENGTH_CLASSES, DecodeTiles, PrefillTiles
from twinmesh.scripts.gpu.timing import Heads, cached, reason, time_decode, time_prefill

TABLE = Path(twinmesh.__file__).parent / "kernels_pallas" / "tiles.json"
MARGIN = 0.98  # of the time of the tiles in use, below which others are worth a row
REQUESTS = 32  # of a decode step

type Key = tuple[str | int, ...]
type Table = dict[Key, list[int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every combination and return the exit code: 2 if there is no GPU to measure."""
    args = _arguments(argv)
    device = jax.devices()[0]
    if device.platform != "gpu" or not str(getattr(device, "compute_capability", "")).startswith("9.0"):
        kind = device.device_kind
        print(f"JAX's first device is {kind!r}, not a Hopper GPU: run this where one is.", file=sys.stderr)
        return 2
    run(args.heads, args.page_sizes, args.lengths, device.core_count, args.table)
    return 0


def run(
    heads: Sequence[tuple[int, int, int]],
    page_sizes: Sequence[int],
    lengths: Sequence[int],
    cores: int,
    path: Path,
) -> None:
    """Measure the combinations and keep the table at `path` up to date; if one fails, print why and go on."""
    table = read_table(path)
    for (query, kv, dim), size, length in itertools.product(heads, page_sizes, lengths):
        combination = Heads(query, kv, dim, size)
        for kernel, tune in (("decode", tune_decode), ("prefill", tune_prefill)):
            key = (kernel, HOPPER, dim, query // kv, size, tiles.length_class(length))
            try:
                best = tune(combination, length, cores, table.get(key))
            except (ValueError, RuntimeError) as error:  # such as memory that does not suffice for the cache
                print(f"{kernel} {combination} {length}: {reason(error)}", flush=True)
                continue
            if best is not None:
                table[key] = best
                path.write_text(table_text(table))


def read_table(path: Path) -> Table:
    """Return the rows of a table of tiles, by key."""
    return {tuple(row[:-1]): row[-1] for row in json.loads(path.read_text())}


def table_text(table: Table) -> str:
    """Return a table as JSON, with a line for each row, in order."""
    lines = [json.dumps([*key, fields]) for key, fields in sorted(table.items())]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def tune_decode(heads: Heads, length: int, cores: int, row: list[int] | None) -> list[int] | None:
    """Find the best tiles to decode REQUESTS requests of that length.

    Return their fields, or None if they are not worth a row. They are compared with the tiles in use: those of the
    table's `row`, or without one the package's default.
    """
    cache = cached(heads, [length] * REQUESTS, most_bytes=2e10)

    def measure(choice: DecodeTiles) -> float:
        return time_decode(heads, cache, functools.partial(_decode, tiles=choice, cores=cores))

    choices = [DecodeTiles(split, stages) for split in (256, 512, 1024, 2048) for stages in (2, 3, 4, 6)]
    default = tiles.decode_tiles(heads.dim, heads.query // heads.kv, heads.page_size, length)
    in_use = DecodeTiles(*row) if row else default
    best = best_of(f"decode {heads} {length}", choices, in_use, measure)
    return None if best is None else [best.split, best.stages]


def tune_prefill(heads: Heads, length: int, cores: int, row: list[int] | None) -> list[int] | None:
    """Find the best tiles to prefill one prompt of that length; result and `row` as in `tune_decode`."""
    cache = cached(heads, [length], most_bytes=2e10)

    def measure(choice: PrefillTiles) -> float:
        return time_prefill(heads, cache, [length], functools.partial(_prefill, tiles=choice, cores=cores))

    sizes = [tile for tile in (64, 128, 192, 256) if tile % heads.page_size == 0 or heads.page_size % tile == 0]
    choices = [PrefillTiles(tile, stages) for tile in sizes for stages in (2, 3, 4)]
    default = tiles.prefill_tiles(heads.dim, heads.query // heads.kv, heads.page_size, length)
    in_use = PrefillTiles(*row) if row else default
    best = best_of(f"prefill {heads} {length}", choices, in_use, measure)
    return None if best is None else [best.tile, best.stages]


def _decode(q: Array, *cache: Array, scale: float, tiles: DecodeTiles, cores: int) -> Array:
    """Call the decode kernel with the arguments of `gpu.timing.Attention`."""
    out: Array = decode.paged_decode_attention(q, PagedKV(*cache), AttentionOptions(scale), tiles=tiles, cores=cores)
    return out


def _prefill(q: Array, *arrays: Array, scale: float, tiles: PrefillTiles, cores: int) -> Array:
    """Call the prefill kernel as `_decode` does; the chunks' starts come last in `arrays`."""
    *cache, q_start = arrays
    kv, options = PagedKV(*cache), AttentionOptions(scale)
    out: Array = prefill.paged_prefill_attention(q, kv, q_start, options, tiles=tiles, cores=cores)
    return out


def best_of[T](name: str, choices: Sequence[T], in_use: T, measure: Callable[[T], float]) -> T | None:
    """Return the choice that takes the least time, if that is clearly less than the tiles in use take; else None.

    A choice that does not fit the shared memory or the registers, as Mosaic or XLA says, is skipped.
    """
    times: dict[T, float] = {}
    for choice in dict.fromkeys([in_use, *choices]):
        try:
            times[choice] = measure(choice)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            print(f"{name} {choice}: {(str(error).splitlines() or [''])[0]}", flush=True)
            continue
        print(f"{name} {choice}: {1e6 * times[choice]:.1f} us", flush=True)
    if not times:
        return None
    best = min(times, key=lambda choice: times[choice])
    return best if in_use not in times or times[best] < MARGIN * times[in_use] else None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=_heads, action="append", metavar="Hq,Hk,D", help="32,8,128; may be repeated")
    parser.add_argument("--page-sizes", type=_among("page size", PAGE_SIZES), default=[64], metavar="N,...")
    parser.add_argument("--lengths", type=_lengths, default=[2048, 8192, 32768], metavar="N,...")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="default: the package's own")
    args = parser.parse_args(argv)
    args.heads = args.heads or [(32, 8, 128), (64, 8, 64)]
    if not args.table.is_file():
        parser.error(f"--table {args.table}: there is no such file; one that holds [] will do.")
    return args


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them.") from None


def _heads(text: str) -> tuple[int, int, int]:
    numbers = _numbers(text)
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be three numbers: query heads, key/value heads, head_dim, such as 32,8,128."
        )
    query, kv, dim = numbers
    if dim not in HEAD_DIMS:
        raise argparse.ArgumentTypeError(f"{text!r} has head_dim {dim}: it must be one of {HEAD_DIMS}.")
    if kv < 1 or query < 1 or query % kv or query // kv > WARPGROUP_ROWS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: query heads must be a multiple of the key/value heads, up to {WARPGROUP_ROWS} times as many."
        )
    return query, kv, dim


def _among(name: str, allowed: tuple[int, ...]) -> Callable[[str], list[int]]:
    def parse(text: str) -> list[int]:
        numbers = _numbers(text)
        if wrong := [number for number in numbers if number not in allowed]:
            raise argparse.ArgumentTypeError(f"{name} {wrong[0]}: it must be one of {allowed}.")
        return numbers

    return parse


def _lengths(text: str) -> list[int]:
    numbers = _numbers(text)
    if wrong := [number for number in numbers if not 1 <= number <= LENGTH_CLASSES[-1]]:
        raise argparse.ArgumentTypeError(f"length {wrong[0]}: it must be 1 to {LENGTH_CLASSES[-1]} tokens.")
    classes: dict[int, int] = {}
    for number in numbers:
        first = classes.setdefault(tiles.length_class(number), number)
        if first != number or numbers.count(number) > 1:
            raise argparse.ArgumentTypeError(
                f"lengths {first} and {number} are of one class, up to {tiles.length_class(number)} tokens, which has "
                "one row: give one length for each class."
            )
    return numbers


if __name__ == "__main__":
    raise SystemExit(main())
