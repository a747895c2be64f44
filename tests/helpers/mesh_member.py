"""A mesh of tp 2, in this process or over two: `python mesh_member.py INDEX COUNT COORDINATOR CHECKPOINT...` is one of
the two. It prints as JSON the tokens and scores of a few requests, and what it read of each checkpoint.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny_mesh
from helpers.shared_programs import SharedPrograms
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.protocol.worker import Member
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sharding.spanning import join, spanned_devices
from twinmesh.engine.sharding.weights import load_weights
from twinmesh.engine.startup.compilation import Compilation
from twinmesh.engine.startup.kept_programs import use_cache
from twinmesh.engine.topology import Topology
from twinmesh.models.checkpoints import gguf_file, safetensors, streaming
from twinmesh.models.checkpoints.catalog import cache_directory
from twinmesh.models.checkpoints.open import open_checkpoint


def run_requests(devices):
    """Return the tokens of several requests, the scores of one, and the first tokens again after a reset."""
    config = tiny_mesh.tiny_config("both=1xtp2", decode_buckets=(4,), decode_steps=2)
    with patch.object(tiny_mesh, "build_meshes", lambda topology: build_meshes(topology, devices)):
        plans, params = tiny_mesh.tiny_plans(config, pages=(40,))
    (programs,) = Compilation(plans, 2, make=SharedPrograms()).wait()
    mesh = tiny_mesh.TinyMesh(plans[0], programs, params[0])
    mesh.place("greedy", range(3, 13))
    found = [mesh.generate("greedy", 8)]
    mesh.place("drawn", range(7, 30), SamplingPlan(temperature=0.7, seed=5, presence_penalty=0.5))
    found.append(mesh.generate("drawn", 6))
    mesh.place("scored", range(5, 17), SamplingPlan(temperature=0.0, seed=0, prompt_logprobs=1))
    action = tiny_mesh.Prefill(0, 9, 16, (mesh.chunk("scored", 0, 12),))
    scored = mesh.worker.prefill(action, mesh.records)  # a step behind it is dispatched before it is read
    found.append(mesh.decode(mesh.row("scored", 13), steps=2))
    found.append([round(float(x), 4) for x in scored.to_host()[2][0].logprob])
    mesh.worker.reset()
    mesh.place("again", range(3, 13))
    return [*found, mesh.generate("again", 8)]


def read_weights(path, devices):
    """Load a checkpoint: return a sum over each shard that this process has, and how many numbers were read of it."""
    (mesh,) = build_meshes(Topology.parse("both=1xtp2"), devices)
    read = []

    def counting(kind):
        plain = kind.read_rows

        def read_rows(*args):
            rows = plain(*args)
            read.append(rows.size)
            return rows

        return patch.object(kind, "read_rows", read_rows)

    with patch.object(streaming, "BLOCK_BYTES", 1 << 8), ExitStack() as opened:
        for kind in (gguf_file.GGUFFile, safetensors.SafetensorsFiles):
            opened.enter_context(counting(kind))
        checkpoint = open_checkpoint(path)
        (params,) = load_weights(checkpoint, jnp.dtype("float32"), [mesh], checkpoint.formats, progress=False)
    shards = [
        {str(shard.index): float(np.asarray(shard.data).astype(np.float64).sum()) for shard in array.addressable_shards}
        for array in jax.tree.leaves(params)
    ]
    return shards, sum(read)


if __name__ == "__main__":
    index, count, coordinator, *paths = sys.argv[1:]
    join(Member(int(index), int(count), coordinator), timeout=60)
    use_cache(cache_directory() / "compiled")
    found = spanned_devices(2, int(count))
    weights = [read_weights(path, found) for path in paths]
    print(json.dumps({"tokens": run_requests(found), "weights": weights}))
