"""The cost of loading a model: peak memory of the host against what the model takes, and time against the disk.

    python scripts/bench/load.py --models smollm2 gemma3-270m --topologies both=1 both=1xtp2 --json load.json
    python scripts/bench/load.py --synthetic 2
    python scripts/bench/load.py --models smollm2 --dtype float32 --check-cost 9

Each load is a process of its own. Its peak is the growth of its resident memory, from just before the weights are read;
the bound is the sum of all shards (on a CPU they are in the host's memory; those that meshes share count once) and 1.5
times the largest parameter. Nothing is mapped. The disk's rate is that of reading the same files from first to last
byte, without and with the page cache. Linux only.

`--synthetic GB` writes a bfloat16 llama of that size to a temporary directory, loads it and deletes it.
`--check-cost N` measures something else: what it costs to look for weights that are not finite. One process loads the
model N times with and N times without the check, by turns and out of the page cache, and counts seconds of CPU.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_BUFFER = 8 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a row for each model and topology, and return the exit code."""
    args = _arguments(argv)
    if args.worker:
        print(json.dumps(measure(*args.worker)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="twinmesh-bench-") as scratch:
        models = list(args.models)
        if args.synthetic:
            models.append(str(write_llama(Path(scratch), args.synthetic)))
        for model in models:
            for topology in args.topologies:
                if args.check_cost:
                    rows.append(check_cost(model, topology, args.dtype, args.check_cost))
                    print(_cost_row(rows[-1]), flush=True)
                    continue
                command = [sys.executable, __file__, "--worker", model, topology, args.dtype]
                rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
                print(_row(rows[-1]), flush=True)
    if args.json:
        report = {"args": vars(args), "machine": platform.platform(), "cores": os.cpu_count(), "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=1))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], help="names, paths or hub ids")
    parser.add_argument("--synthetic", type=float, metavar="GB", help="also a made-up model of this size")
    parser.add_argument("--topologies", nargs="+", default=["both=1"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--check-cost", type=int, metavar="N", help="loads with and without the check of values")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(model: str, topology: str, dtype: str) -> dict[str, Any]:
    """Load `model` once in this process and return a row of bytes and seconds."""
    import jax
    import jax.numpy as jnp
    from twinmesh.engine.sharding.mesh import build_meshes
    from twinmesh.engine.sharding.weights import held, load_weights
    from twinmesh.engine.topology import Topology
    from twinmesh.models.checkpoints.catalog import resolve_model
    from twinmesh.models.checkpoints.open import open_checkpoint

    path = resolve_model(model)
    meshes = build_meshes(Topology.parse(topology))
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    cached_before = read(files)  # whatever that took: from here on all that fits is in the cache
    cold = drop(files) and read(files)
    warm = read(files)
    jax.block_until_ready(jnp.zeros(1) + 1)
    is_cold = drop(files)
    checkpoint = open_checkpoint(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = _memory("VmRSS"), time.perf_counter()
    params = load_weights(checkpoint, jnp.dtype(dtype), meshes, progress=False)
    seconds = time.perf_counter() - start
    shards = held(params, None).copied
    largest = max(array.nbytes for array in jax.tree.leaves(params))
    peak = _memory("VmHWM") - before
    return {
        "model": model,
        "topology": topology,
        "dtype": dtype,
        "file_bytes": sum(file.stat().st_size for file in files),
        "shard_bytes": shards,
        "largest_bytes": largest,
        "peak_bytes": peak,
        "largest_above_shards": (peak - shards) / largest,
        "load_seconds": seconds,
        "loaded_without_page_cache": is_cold,
        "read_seconds_without_page_cache": cold or None,
        "read_seconds_with_page_cache": min(warm, cached_before),
    }


def check_cost(model: str, topology: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Load `model` by turns with and without the check of its values, and return the CPU seconds of each."""
    import jax.numpy as jnp
    from twinmesh.engine.sharding.mesh import build_meshes
    from twinmesh.engine.sharding.weights import load_weights
    from twinmesh.engine.topology import Topology
    from twinmesh.models.checkpoints.catalog import resolve_model
    from twinmesh.models.checkpoints.open import open_checkpoint

    checkpoint, meshes = open_checkpoint(resolve_model(model)), build_meshes(Topology.parse(topology))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(-1, rounds):  # the first is not counted
        for allowed in (turn % 2 == 0, turn % 2 != 0):
            start = time.process_time()
            load_weights(checkpoint, jnp.dtype(dtype), meshes, progress=False, allow_nonfinite=allowed)
            if turn >= 0:
                seconds[allowed].append(time.process_time() - start)
    return {"model": model, "topology": topology, "dtype": dtype, "checked": seconds[False], "unchecked": seconds[True]}


def _cost_row(row: dict[str, Any]) -> str:
    checked, unchecked = sorted(row["checked"]), sorted(row["unchecked"])
    ratio = statistics.median(a / b for a, b in zip(row["checked"], row["unchecked"], strict=True))
    return (
        f"{Path(row['model']).name:24} {row['topology']:12} {row['dtype']:9} loaded in {checked[0]:.3f} s of CPU, "
        f"without the check in {unchecked[0]:.3f} s (the least of {len(checked)}); median of the ratios {ratio:.3f}"
    )


def read(files: Sequence[Path]) -> float:
    """Read all bytes of `files`, one file after the other, and return the seconds that it took."""
    buffer, start = bytearray(_BUFFER), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def drop(files: Sequence[Path]) -> bool:
    """Ask the kernel to drop `files` from its cache; return whether it did, as far as their first bytes tell."""
    forgotten = True
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
                forgotten = False
            except BlockingIOError:
                pass
    return forgotten


def _memory(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def write_llama(directory: Path, gigabytes: float, hidden: int = 2048) -> Path:
    """Write a bfloat16 llama of about that size to `directory`: as many layers as it takes, in a file each."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    settings = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 512, "head_dim": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    table = (32000, hidden)
    shapes = dict(_layer_shapes(settings))
    table_bytes, layer_bytes = 4 * 32000 * hidden, 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    settings["num_hidden_layers"] = layers = max(1, round((gigabytes * 1e9 - table_bytes) / layer_bytes))
    files = {f"layer{i}.safetensors": {f"model.layers.{i}.{n}": s for n, s in shapes.items()} for i in range(layers)}
    files["rest.safetensors"] = {
        "model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": table[1:],
    }  # fmt: skip
    for file, tensors in files.items():
        save_file({name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in tensors.items()}, directory / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def _layer_shapes(settings: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, dim = settings["hidden_size"], settings["intermediate_size"], settings["head_dim"]
    rows = {"q": settings["num_attention_heads"] * dim}
    rows["k"] = rows["v"] = settings["num_key_value_heads"] * dim
    for name, count in rows.items():
        yield f"self_attn.{name}_proj.weight", (count, hidden)
    yield "self_attn.o_proj.weight", (hidden, rows["q"])
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


def _row(row: dict[str, Any]) -> str:
    size, mega = row["file_bytes"], 1e6
    cold = row["read_seconds_without_page_cache"]
    disk = f"disk {size / cold / mega:,.0f} MB/s" if cold else "disk not measured: the page cache cannot be dropped"
    return (
        f"{Path(row['model']).name:24} {row['topology']:12} {row['dtype']:9} file {size / mega:7,.0f} MB, shards "
        f"{row['shard_bytes'] / mega:7,.0f} MB, peak {row['peak_bytes'] / mega:7,.0f} MB = shards + "
        f"{row['largest_above_shards']:.2f} x largest; loaded in {row['load_seconds']:.2f} s"
        f"{' without' if row['loaded_without_page_cache'] else ' with'} page cache = "
        f"{size / row['load_seconds'] / mega:,.0f} MB/s; {disk}, page cache "
        f"{size / row['read_seconds_with_page_cache'] / mega:,.0f} MB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
