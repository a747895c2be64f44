"""Measures tiles for the Hopper kernels on the GPU at hand and writes them into kernels_pallas/tiles.json.

    python scripts/tune.py [--heads 32,8,128 --heads 64,8,64] [--page-sizes 64] [--lengths 2048,8192,32768]

Each row of the table is [kernel, architecture, head_dim, query heads of a key/value head, page size, length class,
[...]], the last being the fields of `DecodeTiles` or `PrefillTiles`. A row replaces the one of the same key; a default
that is within 2 % of the best is left out. Run it on a quiet GPU; it takes a minute or so for each combination.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import twinmesh
from jax import Array
from twinmesh.kernels_pallas import decode, prefill, tiles
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.tiles import HOPPER, DecodeTiles, PrefillTiles
from twinmesh.scripts.gpu_bench import Heads, cached, time_decode, time_prefill

TABLE = Path(twinmesh.__file__).parent / "kernels_pallas" / "tiles.json"
MARGIN = 0.98  # of the default's time, below which a measured row is worth having


def main() -> int:
    """Measure every combination, then write the table."""
    args = _arguments()
    cores: int = jax.devices()[0].core_count
    rows = {tuple(row[:-1]): row[-1] for row in json.loads(TABLE.read_text())}
    for query, kv, dim in args.heads:
        for page_size, length in itertools.product(args.page_sizes, args.lengths):
            heads = Heads(query, kv, dim, page_size)
            for kernel, tune in (("decode", tune_decode), ("prefill", tune_prefill)):
                key = (kernel, HOPPER, dim, query // kv, page_size, tiles.length_class(length))
                best = tune(heads, length, cores)
                rows.pop(key, None)
                if best is not None:
                    rows[key] = best
    lines = [json.dumps([*key, value]) for key, value in sorted(rows.items())]
    TABLE.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")
    return 0


def tune_decode(heads: Heads, length: int, cores: int) -> list[int] | None:
    """32 requests of that length; the fields of the best tiles, or None where the default is as good."""
    cache = cached(heads, [length] * 32, most_bytes=2e10)

    def measure(choice: DecodeTiles) -> float:
        def attention(q: Array, *arrays: Array, scale: float) -> Array:
            options = AttentionOptions(scale)
            out: Array = decode.paged_decode_attention(q, PagedKV(*arrays), options, tiles=choice, cores=cores)
            return out

        return time_decode(heads, cache, attention)

    choices = [DecodeTiles(split, stages) for split in (256, 512, 1024, 2048) for stages in (2, 3, 4, 6)]
    default = tiles.decode_tiles(heads.dim, heads.query // heads.kv, heads.page_size, length)
    return _best(f"decode {heads} {length}", choices, default, measure, lambda x: [x.split, x.stages])


def tune_prefill(heads: Heads, length: int, cores: int) -> list[int] | None:
    """One prompt of that length; as `tune_decode`."""
    cache = cached(heads, [length], most_bytes=2e10)

    def measure(choice: PrefillTiles) -> float:
        def attention(q: Array, *arrays: Array, scale: float) -> Array:
            kv, options = PagedKV(*arrays[:4]), AttentionOptions(scale)
            out: Array = prefill.paged_prefill_attention(q, kv, arrays[4], options, tiles=choice, cores=cores)
            return out

        return time_prefill(heads, cache, [length], attention)

    sizes = [tile for tile in (64, 128, 192, 256) if tile % heads.page_size == 0 or heads.page_size % tile == 0]
    choices = [PrefillTiles(tile, stages) for tile in sizes for stages in (2, 3, 4)]
    default = tiles.prefill_tiles(heads.dim, heads.query // heads.kv, heads.page_size, length)
    return _best(f"prefill {heads} {length}", choices, default, measure, lambda x: [x.tile, x.stages])


def _best[T](
    name: str, choices: list[T], default: T, measure: Callable[[T], float], fields: Callable[[T], list[int]]
) -> list[int] | None:
    times: dict[T, float] = {}
    for choice in dict.fromkeys([default, *choices]):
        try:
            times[choice] = measure(choice)
        except ValueError as error:  # Mosaic's refusal of what does not fit the shared memory or the registers
            print(f"{name} {choice}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(f"{name} {choice}: {1e6 * times[choice]:.1f} us", flush=True)
    best = min(times, key=lambda choice: times[choice])
    return fields(best) if default not in times or times[best] < MARGIN * times[default] else None


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=numbers, action="append", help="query heads, key/value heads, head_dim")
    parser.add_argument("--page-sizes", type=numbers, default=[64])
    parser.add_argument("--lengths", type=numbers, default=[2048, 8192, 32768])
    args = parser.parse_args()
    args.heads = args.heads or [[32, 8, 128], [64, 8, 64]]
    return args


if __name__ == "__main__":
    raise SystemExit(main())
