"""How many of an engine's programs a start finds compiled, after starts with other topologies.

    python scripts/bench/cache.py --model smollm2 --topologies both=1 prefill=1,decode=1 both=2 prefill=1,decode=1
    python scripts/bench/cache.py --package ../before ...

Starts engines one after the other, each in a process of its own, over one compilation cache that is empty at first, and
counts what is found in it and what is compiled. `--package` starts those of another checkout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Of JAX's own cache, and of kept executables.
_EVENTS = {
    "/jax/compilation_cache/cache_hits": "found",
    "/jax/compilation_cache/cache_misses": "compiled",
    "/twinmesh/kept_programs/read": "found",
    "/twinmesh/kept_programs/compiled": "compiled",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each start."""
    args = _arguments(argv)
    if args.worker:
        print(json.dumps(start(args.model, args.worker, args.max_num_seqs, args.dtype)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="twinmesh-bench-") as scratch:
        (Path(scratch) / "path").mkdir()
        (Path(scratch) / "path" / "twinmesh").symlink_to(args.package.resolve())  # its folder may have any name
        for topology in args.topologies:
            row = in_a_process(topology, args, Path(scratch))
            rows.append(row)
            counts = f"found {row['found']:3}  compiled {row['compiled']:3}"
            print(f"{topology:24} {counts}  {row['seconds']:6.1f} s", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "rows": rows}, indent=1, default=str))
    return 0


def in_a_process(topology: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Start an engine in a new process, over the scratch folder's cache."""
    from twinmesh.models.checkpoints.catalog import resolve_model

    command = [sys.executable, __file__, "--model", str(resolve_model(args.model).resolve()), "--worker", topology]
    command += ["--max-num-seqs", str(args.max_num_seqs), "--dtype", args.dtype]
    environment = os.environ | {"XDG_CACHE_HOME": str(scratch), "PYTHONPATH": str(scratch / "path")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def start(model: str, topology: str, max_num_seqs: int, dtype: str) -> dict[str, Any]:
    """Start an engine and return what was found in the cache, what was compiled, and the seconds it took."""
    import jax.monitoring
    from twinmesh import LLM

    counts: Counter[str] = Counter()

    def on_event(event: str, **kwargs: str | int) -> None:
        if event in _EVENTS:
            counts[_EVENTS[event]] += 1

    jax.monitoring.register_event_listener(on_event)
    begin = time.perf_counter()
    with LLM(model, topology=topology, max_num_seqs=max_num_seqs, dtype=dtype, max_model_len=256):
        seconds = time.perf_counter() - begin
    return {"topology": topology, "found": counts["found"], "compiled": counts["compiled"], "seconds": seconds}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--topologies", nargs="+", default=["both=1", "prefill=1,decode=1", "both=2"], help="started in this order"
    )
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--package", type=Path, default=Path(__file__).parents[2], help="the checkout that starts")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", metavar="TOPOLOGY", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
