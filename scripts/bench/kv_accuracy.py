"""What storing keys and values in fewer bits costs in accuracy, against float32 throughout.

    python scripts/bench/kv_accuracy.py --models smollm2 gemma3-270m --json kv.json

Half of the tokens are prose, the guides in this checkout's docs, half are code, its scheduler. They are read in
windows, teacher-forced: each window is one chunk, whose keys and values are stored in pages and read from there by the
engine's own attention. A way is the dtype of activations and what KV is stored as, DTYPE:KV. Reported for each: the
share of positions at which the most likely next token is another than the reference's, the mean Kullback-Leibler
divergence of the next token's distribution from the reference's, and both over those of bfloat16 KV with the same
activations.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
_REFERENCE = "float32:float32"
_KV = ("bfloat16", "int8", "int8/fp8", "fp8")
_WAYS = tuple(f"{dtype}:{kv}" for dtype in ("float32", "bfloat16") for kv in _KV)
_BLOCK = 64  # positions whose logits are in memory at a time


class Loss(NamedTuple):
    """Of every position, what a way loses."""

    divergence: list[float]  # nats
    changed: list[bool]  # whether another token is the most likely one


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a row for each model and way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2", "gemma3-270m"])
    parser.add_argument("--tokens", type=int, default=2048, help="positions, half of prose and half of code")
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other")
    parser.add_argument("--ways", nargs="+", default=list(_WAYS), metavar="DTYPE:KV")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    rows = [row for model in args.models for row in _measure(model, args)]
    if args.json:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform(), "cores": os.cpu_count()}
        Path(args.json).write_text(json.dumps(about | {"args": vars(args), "rows": rows}, indent=1))
    return 0


def report(model: str, losses: dict[str, Loss]) -> list[dict[str, Any]]:
    """Sum up each way's losses, and compare with bfloat16 KV under the same activations."""
    rows = []
    for way, loss in losses.items():
        changed, divergence = _means(loss)
        like = losses.get(f"{way.split(':')[0]}:bfloat16")
        of_bfloat16 = _means(like) if like is not None else (0.0, 0.0)
        rows.append(
            {
                "model": model,
                "way": way,
                "positions": len(loss.changed),
                "changed": changed,
                "divergence": divergence,
                "changed_ratio": changed / of_bfloat16[0] if of_bfloat16[0] else None,
                "divergence_ratio": divergence / of_bfloat16[1] if of_bfloat16[1] else None,
            }
        )
    return rows


def _means(loss: Loss) -> tuple[float, float]:
    return sum(loss.changed) / len(loss.changed), sum(loss.divergence) / len(loss.divergence)


def _measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax.numpy as jnp
    from twinmesh.engine.sharding.mesh import build_meshes
    from twinmesh.engine.sharding.weights import load_weights
    from twinmesh.engine.topology import Topology
    from twinmesh.models.checkpoints.catalog import resolve_model
    from twinmesh.models.checkpoints.open import open_checkpoint

    checkpoint = open_checkpoint(resolve_model(name))
    meshes = build_meshes(Topology.parse("both=1"))
    windows = _windows(checkpoint.tokenizer(), args)
    dtypes = dict.fromkeys(way.split(":")[0] for way in (_REFERENCE, *args.ways))
    weights = {
        dtype: load_weights(checkpoint, jnp.dtype(dtype), meshes, {}, progress=False)[0] for dtype in dtypes
    }  # fmt: skip
    losses: dict[str, Loss] = {}
    passes = {
        way: _forward(checkpoint.config, meshes[0], way, args.window) for way in (_REFERENCE, *args.ways)
    }  # fmt: skip
    compare = {dtype: _comparison(checkpoint.config, dtype) for dtype in dtypes}
    references = [passes[_REFERENCE](weights["float32"], window) for window in windows]
    for way in args.ways:
        dtype, found = way.split(":")[0], Loss([], [])
        for window, reference in zip(windows, references, strict=True):
            hidden = passes[way](weights[dtype], window)
            divergence, changed = compare[dtype](weights["float32"], weights[dtype], reference, hidden)
            found.divergence.extend(divergence.tolist())
            found.changed.extend(changed.tolist())
        losses[way] = found
        row = report(name, losses)[-1]
        print(
            f"{name:12} {way:20} {row['positions']} positions  changed {row['changed']:.4f} "
            f"({_shown(row['changed_ratio'])})  KL {row['divergence']:.3e} ({_shown(row['divergence_ratio'])})",
            flush=True,
        )
    return report(name, losses)


def _shown(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _windows(tokenizer: Any, args: argparse.Namespace) -> list[Any]:
    """Cut windows of tokens, half of them of prose and half of code."""
    import numpy as np

    windows = []
    each = -(-args.tokens // (2 * args.window))
    for folder, pattern in (("docs/guides", "*.md"), ("engine/scheduler", "*.py")):
        text = "\n".join(file.read_text() for file in sorted((_ROOT / folder).glob(pattern)))
        ids = tokenizer.encode(text)[: each * args.window]
        if len(ids) < each * args.window:
            raise SystemExit(f"{folder} has {len(ids)} tokens, fewer than {each * args.window}: ask for fewer.")
        windows += list(np.array(ids, np.int32).reshape(each, args.window))
    return windows


def _forward(config: Any, mesh: Any, way: str, window: int) -> Callable[[Any, Any], Any]:
    """Make the pass over one window: hidden states [T, E], with keys and values stored in pages."""
    import jax
    import jax.numpy as jnp
    from twinmesh.engine.config import EngineConfig
    from twinmesh.engine.kv_dtypes import parse_kv_dtypes
    from twinmesh.engine.sizing.cache_groups import groups
    from twinmesh.engine.topology import Topology
    from twinmesh.engine.worker.channel_scales import channel_scales, of_groups
    from twinmesh.engine.worker.kv_cache import abstract_state, with_scales
    from twinmesh.engine.worker.paged_attention import PagedAttention, PrefillRows, StepRows
    from twinmesh.models.decoder import abstract_params, bind

    dtype, kv = way.split(":")
    dtypes = parse_kv_dtypes(kv, dtype)
    engine = EngineConfig(Topology.parse("both=1"), max_model_len=window, dtype=dtype, kv=dtypes)
    pages = engine.pages_for(window)
    counts = [pages for _ in groups(config)]
    state = abstract_state(config, engine, counts, dtypes.decode, mesh)
    graphdef = abstract_params(config, jnp.dtype(dtype)).graphdef
    table, position = jnp.arange(pages, dtype=jnp.int32)[None], jnp.arange(window, dtype=jnp.int32)

    @jax.jit
    def forward(params: Any, tokens: Any) -> Any:
        decoder = bind(graphdef, params)
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.kv)
        pools = with_scales(empty, of_groups(channel_scales(decoder), config, dtypes.decode))
        chunk = PrefillRows((table,) * len(counts), jnp.int32([window]), jnp.int32([0, window]))
        rows = StepRows((position,) * len(counts), prefill=chunk)
        return decoder.hidden(tokens, position, PagedAttention(mesh, config), pools, rows)[0]

    return forward


def _comparison(config: Any, dtype: str) -> Callable[..., Any]:
    """Make what compares two passes: the divergence at each position, and whether the likeliest token is another."""
    import jax
    import jax.numpy as jnp
    from twinmesh.models.decoder import abstract_params, bind

    reference_graph = abstract_params(config, jnp.float32).graphdef
    graph = abstract_params(config, jnp.dtype(dtype)).graphdef

    def block(reference: Any, decoder: Any, rows: tuple[Any, Any]) -> tuple[Any, Any]:
        want, got = (jax.nn.log_softmax(d.logits(x)) for d, x in zip((reference, decoder), rows, strict=True))
        divergence = jnp.sum(jnp.exp(want) * (want - got), axis=-1)
        return divergence, want.argmax(-1) != got.argmax(-1)

    @jax.jit
    def compare(reference_params: Any, params: Any, reference: Any, hidden: Any) -> Any:
        decoders = bind(reference_graph, reference_params), bind(graph, params)
        cut = jax.tree.map(lambda x: x.reshape(-1, _BLOCK, x.shape[1]), (reference, hidden))
        divergence, changed = jax.lax.map(partial(block, *decoders), cut)
        return divergence.reshape(-1), changed.reshape(-1)

    return compare


if __name__ == "__main__":
    sys.exit(main())
