"""Every check and measurement that needs a GPU, in one command of a few minutes on an H100; nothing to download.

    python scripts/gpu_suite.py --json gpu.json [--only checks,decode] [--scale 1.0]

Sections run in processes of their own, one after the other, so that one that fails or hangs costs only itself:
`ceilings` (copy bandwidth, matmul rate), `checks` (kernels against plain XLA in float32), `decode` and `prefill`
(kernels alone, prefill beside cuDNN and torch where they are installed), `steps` (whole steps of Qwen3-8B's shapes with
random weights), `steps_without_graphs` (the same with XLA's command buffers off) and `handoff` (two meshes that share
the device give the tokens of one). Times are of chains of calls on the device (`gpu_bench.py`); rates are compared with
ceilings of the same run. `--scale` shrinks every length, to try the suite itself; on a CPU it then runs in plain XLA
and means nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinmesh.scripts.gpu_bench import Heads

type Facts = dict[str, Any]

_MARK = "facts: "
LIMIT = 200  # seconds of one section
HEADS = ((32, 8, 128), (64, 8, 64))


def main() -> int:
    """Run the sections; write what they found, also when some failed. Exit code 1 if one did."""
    args = _arguments()
    if args.section:
        print(_MARK + json.dumps(run(args.section, args.scale)), flush=True)
        return 0
    report: Facts = {"command": " ".join(sys.argv)}
    for name in args.only or SECTIONS:
        start = time.monotonic()
        report[name] = _in_process(name, args.scale)
        report[name]["section_seconds"] = round(time.monotonic() - start, 1)
        print(name, json.dumps(report[name], indent=1), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1))
    return int(any("failed" in report[name] for name in args.only or SECTIONS))


def _in_process(name: str, scale: float) -> Facts:
    """The facts of one section; why it failed, where it printed none."""
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch measures beside JAX
    if name == "steps_without_graphs":
        environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    command = [sys.executable, __file__, "--section", name, "--scale", str(scale)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LIMIT} s"}
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            facts: Facts = json.loads(line.removeprefix(_MARK))
            return facts
    return {"failed": f"exit code {done.returncode}: {done.stderr[-2000:]}"}


def run(name: str, scale: float) -> Facts:
    """One section, in this process."""
    from twinmesh.scripts.gpu_bench import device_facts

    return device_facts() | SECTIONS[name](scale)


def ceilings(scale: float) -> Facts:
    """What the device does at best."""
    from twinmesh.scripts.gpu_bench import copy_bandwidth, matmul_rate

    return {"copy_tb_s": copy_bandwidth(4e9 * scale) / 1e12, "matmul_tflop_s": matmul_rate(int(8192 * scale)) / 1e12}


def checks(scale: float) -> Facts:
    """Relative errors against plain XLA in float32, which the tests hold to the oracle.

    Fails above 1e-2, on a NaN, or where a second run differs.
    """
    import jax.numpy as jnp
    import numpy as np
    from twinmesh.kernels_pallas import paged_decode_attention, paged_prefill_attention, xla
    from twinmesh.scripts.gpu_bench import Heads, cached, queries

    lengths = [max(1, int(scale * n)) for n in (1, 63, 64, 65, 127, 128, 129, 1000, 4097)]
    chunks = [min(length, max(1, int(700 * scale))) for length in lengths]
    q_start = jnp.asarray(np.cumsum([0, *chunks]), jnp.int32)
    options: list[Facts] = [{}, {"window": 100}, {"softcap": 20.0, "sink": True}]
    errors: dict[str, float] = {}
    variants = ((32, 8, 128, 64), (64, 8, 64, 16), (8, 4, 256, 32), (16, 1, 128, 128), (9, 3, 64, 64))
    for number, (query, kv, dim, page) in enumerate(variants):
        heads = Heads(query, kv, dim, page)
        cache = cached(heads, lengths, most_bytes=1)
        arrays = cache.layer(0)
        wide = tuple(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays)
        for changes in (options[number % 3], options[(number + 1) % 3]):
            settings: Facts = {"scale": dim**-0.5, "window": None, "softcap": None, "sink": None, **changes}
            if changes.get("sink"):
                settings["sink"] = jnp.linspace(-2.0, 2.0, query)
            for kernel, oracle, rows, more in (
                (paged_decode_attention, xla.paged_decode_attention, len(lengths), ()),
                (paged_prefill_attention, xla.paged_prefill_attention, sum(chunks), (q_start,)),
            ):
                q = queries(heads, rows)
                name = f"{kernel.__name__} {heads} {changes}"
                errors[name] = _error(partial(kernel, **settings), partial(oracle, **settings), q, arrays, wide, more)
    failed = {name: error for name, error in errors.items() if not error < 1e-2}
    return {"errors": errors} | ({"failed": f"errors of {failed}"} if failed else {})


def _error(kernel: Any, oracle: Any, q: Any, arrays: Any, wide: Any, more: Any) -> float:
    import jax
    import jax.numpy as jnp
    import numpy as np

    run_kernel = jax.jit(kernel)
    # What is allocated next may lie where these were: an element that nobody writes shows as NaN.
    jax.block_until_ready([jnp.full_like(q, jnp.nan) for _ in range(4)])
    first, second = (np.asarray(run_kernel(q, *arrays, *more), np.float64) for _ in range(2))
    if not np.array_equal(first, second):
        return float("inf")
    want = np.asarray(jax.jit(oracle)(q.astype(jnp.float32), *wide, *more), np.float64)
    return float(np.linalg.norm(first - want) / np.linalg.norm(want))


def decode(scale: float) -> Facts:
    """Bandwidth of the KV read, beside that of a copy in the same process."""
    import numpy as np
    from twinmesh.scripts.gpu_bench import Heads, cached, copy_bandwidth, time_decode

    copy = copy_bandwidth(4e9 * scale)
    rows: Facts = {}
    for sizes in HEADS:
        heads = Heads(*sizes)
        for batch in (32, 128):
            for context in (1024, 8192, 32768):
                even = [max(1, int(context * scale))] * batch
                ragged = np.random.default_rng(0).integers(1, 2 * even[0], batch).tolist()
                for kind, lengths in (("even", even), ("ragged", ragged)):
                    taken = time_decode(heads, cached(heads, lengths, most_bytes=3e10))
                    rate = sum(lengths) * heads.token_bytes / taken
                    rows[f"{heads} {batch}x{context} {kind}"] = {"us": 1e6 * taken, "of_copy": rate / copy}
    return {"copy_tb_s": copy / 1e12, "rows": rows}


def prefill(scale: float) -> Facts:
    """FLOP/s of what is visible, beside the peers on the dense equivalent."""
    from twinmesh.scripts.gpu_bench import Heads, cached, matmul_rate, prefill_flops, time_prefill

    rows: Facts = {}
    for sizes in HEADS:
        heads = Heads(*sizes)
        for length, chunk in ((8192, 8192), (16384, 16384), (18432, 2048)):
            lengths, chunks = [int(length * scale)], [int(chunk * scale)]
            flops = prefill_flops(heads, lengths, chunks)
            row = {"twinmesh": flops / time_prefill(heads, cached(heads, lengths, most_bytes=1e10), chunks) / 1e12}
            for name, peer in (("cudnn", _cudnn_seconds), ("torch", _torch_seconds)):
                try:
                    row[name] = flops / peer(heads, lengths[0], chunks[0]) / 1e12
                except Exception as error:  # not installed, or it does not take these shapes
                    row[f"{name}_missing"] = f"{type(error).__name__}: {str(error)[:100]}"  # type: ignore[assignment]
            rows[f"{heads} {chunk} of {length}"] = row
    return {"matmul_tflop_s": matmul_rate(int(8192 * scale)) / 1e12, "tflop_s": rows}


def _cudnn_seconds(heads: "Heads", length: int, chunk: int) -> float:
    import jax
    import jax.numpy as jnp
    from twinmesh.scripts.gpu_bench import seconds

    if chunk != length:
        raise ValueError("cuDNN's causal mask begins at the first key")
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, length, count, heads.dim), jnp.bfloat16)
        for key, count in zip(keys, (heads.query, heads.kv, heads.kv), strict=True)
    )
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return seconds(jax.jit(attend), q, k, v)


def _torch_seconds(heads: "Heads", length: int, chunk: int) -> float:
    import torch  # type: ignore[import-not-found, unused-ignore]

    if chunk != length:
        raise ValueError("torch's causal mask begins at the first key")
    q, k, v = (
        torch.randn(1, count, length, heads.dim, device="cuda", dtype=torch.bfloat16)
        for count in (heads.query, heads.kv, heads.kv)
    )
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    for _ in range(3):
        attend()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            attend()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 4e3)
    return float(sorted(times)[len(times) // 2])


def steps(scale: float) -> Facts:
    """Whole steps of Qwen3-8B's shapes, beside the floor that the ceilings of the same process set."""
    from twinmesh.scripts.gpu_steps import measure_steps

    return measure_steps(scale)


def handoff(scale: float) -> Facts:
    """Two meshes on one device, prefill and decode, give the tokens of a mesh that does both."""
    from twinmesh.scripts.gpu_steps import compare_topologies

    return compare_topologies(scale)


SECTIONS: dict[str, Callable[[float], Facts]] = {
    "ceilings": ceilings,
    "checks": checks,
    "decode": decode,
    "prefill": prefill,
    "steps": steps,
    "steps_without_graphs": steps,
    "handoff": handoff,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="where the figures go; also written when a section fails")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)  # what the processes are told
    args = parser.parse_args()
    if unknown := set(args.only or ()) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is not a section; there are {', '.join(SECTIONS)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
