"""The sampler alone beside that of an earlier checkout, on a model's own logits, in alternating processes.

    git worktree add /tmp/before COMMIT
    python scripts/bench/sampler.py --before /tmp/before --json sampler.json

The logits are those at places of `docs/architecture.md` 32 tokens apart, `--rows` of them; how many of these rows need
more than 64 tokens for nine tenths of their mass is printed, since checkouts up to efd1214 sort the whole vocabulary
for just those. Each process has them on the device and times
every way to sample, from the call to its tokens, in milliseconds: the best and the median of 20. A ratio is this
checkout's median over the earlier one's. The machine should be idle otherwise.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parents[2]
_TEXT = HERE / "docs" / "architecture.md"
_APART = 32
_ROUNDS = 20
WAYS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "T 1": {"temperature": 1.0},
    "T 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "T 1, top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "T 1, top_k 50": {"temperature": 1.0, "top_k": 50},
    "T 1, top_k 50, top_p 0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
}
type Times = dict[str, dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs and print a line for each way to sample; returns the exit code."""
    args = _arguments(argv)
    if args.logits:
        print(json.dumps(time_ways(np.load(args.logits))))
        return 0
    checkouts = {"after": HERE} | ({"before": Path(args.before).resolve()} if args.before else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        logits = logits_of(args.model, args.rows)
        np.save(path, logits)
        pairs = []
        for index in range(args.pairs):
            order = sorted(checkouts, reverse=index % 2 == 0)
            pairs.append({name: _measure(checkouts[name], path) for name in order})
    rows, wide = summarise(pairs), count_wide(logits)
    print(f"{wide} of {args.rows} rows need more than 64 tokens for 0.9 of their mass at temperature 1")
    for row in rows:
        print(
            f"{row['way']:26} {row['best_ms']:8.2f} ms best, {row['median_ms']:8.2f} median",
            f"  {row['ratio']:.3f} of the earlier one" if "ratio" in row else "",
        )
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        figures = {"args": vars(args), "wide": wide, "rows": rows, "pairs": pairs}
        Path(args.json).write_text(json.dumps(about | figures, indent=1))
    return 0


def logits_of(model: str, rows: int) -> np.ndarray:
    """The logits [rows, V] float32 at places of a text, `_APART` tokens apart, by plain attention."""
    import jax
    import jax.numpy as jnp
    from twinmesh.engine.sharding.mesh import build_meshes
    from twinmesh.engine.sharding.weights import load_weights
    from twinmesh.engine.topology import Topology
    from twinmesh.models.checkpoints.catalog import resolve_model
    from twinmesh.models.checkpoints.open import open_checkpoint
    from twinmesh.models.decoder import abstract_params, bind, dense_hidden

    checkpoint = open_checkpoint(resolve_model(model))
    dtype, meshes = jnp.dtype("float32"), build_meshes(Topology.parse("both=1"))
    (params,) = load_weights(checkpoint, dtype, meshes, progress=False)
    ids = np.array(checkpoint.tokenizer().encode(_TEXT.read_text())[: _APART * rows], np.int32)
    graphdef = abstract_params(checkpoint.config, dtype).graphdef

    @jax.jit
    def last(params: Any, ids: jax.Array) -> jax.Array:
        decoder = bind(graphdef, params)
        return decoder.logits(dense_hidden(decoder, ids)[_APART - 1 :: _APART])

    return np.asarray(last(params, ids))


def count_wide(logits: np.ndarray) -> int:
    """Count the rows whose 64 most likely tokens hold less than 0.9 of their mass."""
    masses = np.sort(np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True)), axis=1)
    return int((masses[:, -64:].sum(axis=1) < 0.9 * masses.sum(axis=1)).sum())


def time_ways(logits: np.ndarray) -> Times:
    """Milliseconds of each way to sample with the `twinmesh` that this process imports, old or new."""
    import jax

    try:
        from twinmesh.engine.sampling import cuts  # noqa: F401 (a checkout with stages of sampling has it)
    except ImportError:
        prepare = _before_stages
    else:
        prepare = _in_stages
    on_device = jax.device_put(logits)
    return {name: _time(prepare(on_device, options)) for name, options in WAYS.items()}


def _time(call: Callable[[], Any]) -> dict[str, float]:
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return {"best_ms": min(times), "median_ms": statistics.median(times)}


def _in_stages(logits: Any, options: dict[str, Any]) -> Callable[[], Any]:
    """The stages that such requests need, each a program, as a mesh worker dispatches them."""
    import jax
    from twinmesh.engine.protocol.sampling_plan import SamplingPlan
    from twinmesh.engine.sampling import cuts, sampler
    from twinmesh.engine.sampling.request_rows import Stage, scalars_of, stages_of
    from twinmesh.engine.sampling.request_state import Scalars

    plan, count = SamplingPlan(seed=1, **options), len(logits)
    scalars = Scalars(*(jax.device_put(np.tile(x, (count, 1))) for x in scalars_of(plan, 0)))
    rows = jax.device_put(np.stack([np.arange(count), np.arange(count), np.full(count, -1)], axis=1).astype(np.int32))
    greedy, draw = jax.jit(sampler.greedy), jax.jit(sampler.draw)
    stages = [(Stage.TOP_K, jax.jit(cuts.top_k)), (Stage.TOP_P, jax.jit(cuts.top_p))]
    wanted = stages_of(plan)

    def call() -> Any:
        cut = logits
        for stage, program in stages:
            cut = program(scalars, rows, cut) if stage in wanted else cut
        return draw(scalars, rows, cut) if Stage.DRAW in wanted else greedy(cut)

    return call


def _before_stages(logits: Any, options: dict[str, Any]) -> Callable[[], Any]:
    """The one program of checkouts up to efd1214."""
    import jax
    import jax.numpy as jnp
    from twinmesh.engine.logits import empty_dense, scalars_of  # type: ignore[import-not-found]
    from twinmesh.engine.request_state import Scalars  # type: ignore[import-not-found]
    from twinmesh.engine.sampling import sample  # type: ignore[attr-defined]
    from twinmesh.engine.sampling_plan import SamplingPlan  # type: ignore[import-not-found]

    count, vocabulary = logits.shape
    scalars = Scalars(*(jax.device_put(np.tile(x, (count, 1))) for x in scalars_of(SamplingPlan(seed=1, **options), 0)))
    dense = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty_dense(count, vocabulary))
    position, program = jnp.arange(count, dtype=jnp.int32), jax.jit(sample)
    return lambda: program(logits, scalars, dense, position, position)


def _measure(checkout: Path, logits: Path) -> Times:
    """Return the times of one checkout, by this script in a process that imports the checkout."""
    from twinmesh.scripts.bench.checkouts import report_of  # earlier checkouts, which run this file too, lack it

    times: Times = report_of(checkout, __file__, ["--logits", str(logits)])
    return times


def summarise(pairs: Sequence[dict[str, Times]]) -> list[dict[str, Any]]:
    """A row for each way: this checkout's milliseconds, and the median of its ratios to the earlier one."""
    rows = []
    for way in pairs[0]["after"]:
        times = {name: [pair[name][way] for pair in pairs] for name in pairs[0]}
        row: dict[str, Any] = {"way": way, "best_ms": min(x["best_ms"] for x in times["after"])}
        row["median_ms"] = statistics.median(x["median_ms"] for x in times["after"])
        if "before" in times:
            row["before_median_ms"] = statistics.median(x["median_ms"] for x in times["before"])
            both = zip(times["after"], times["before"], strict=True)
            row["ratio"] = statistics.median(new["median_ms"] / old["median_ms"] for new, old in both)
        rows.append(row)
    return rows


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", metavar="FOLDER", help="a checkout of the earlier commit")
    parser.add_argument("--model", default="smollm2", help="whose logits (default: smollm2)")
    parser.add_argument("--rows", type=int, default=32, help="rows of logits (default: 32)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of processes (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--logits", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
