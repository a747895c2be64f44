"""A mesh of tp 2, in this process or over two: `python mesh_member.py INDEX COUNT COORDINATOR CHECKPOINT...` is one of
the two. It prints as JSON what it has and has read of each checkpoint.
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
from twinmesh.engine.protocol.worker import Member
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sharding.spanning import join, spanned_devices
from twinmesh.engine.sharding.weights import load_weights
from twinmesh.engine.topology import Topology
from twinmesh.models.checkpoints import gguf_file, safetensors, streaming
from twinmesh.models.checkpoints.open import open_checkpoint


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
    found = spanned_devices(2, int(count))
    print(json.dumps([read_weights(path, found) for path in paths]))
