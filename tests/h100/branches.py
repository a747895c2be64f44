"""Looks for branches and loops in what samples on H100s that are not there. A program, not a test.

`python branches.py JOB...` prints, for each job, a line `@@ {"job": ...}` and a line `## {facts}`, as `compile.py`;
`test_branches.py` reads them.
"""

import json
import sys
from dataclasses import replace

import jax.numpy as jnp
from compile import DEVICES, MODELS, branches, count, on_h100s
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.kv_dtypes import KVDtype
from twinmesh.engine.sampling.request_rows import Stage
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sizing.heads import model_on
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.engine.worker.kv_cache import abstract_state
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.models.decoder import abstract_params

ROWS, TOKENS = 32, 2048
LAYERS = 2  # sampling is the same behind any number of them


def plan(name, tp):
    model = model_on(MODELS[name], tp)
    model = replace(model, layers=model.layers[:LAYERS])
    config = EngineConfig(
        Topology.parse(f"both=1xtp{tp}"), max_model_len=8192, prefill_buckets=(TOKENS,), decode_buckets=(ROWS,),
        max_num_seqs=ROWS,
    )  # fmt: skip
    (mesh,) = build_meshes(config.topology, DEVICES[:tp])
    state = abstract_state(model, config, (2048,), KVDtype("bfloat16", "bfloat16"), mesh)
    return MeshPlan(mesh, config.topology.meshes[0], model, abstract_params(model, jnp.bfloat16), config, state)


def stage(which, name="qwen3-8b", tp=1):
    with on_h100s(tp, "tp"):
        text = compile_program(plan(name, tp), "sample", Stage(which), ROWS).as_text()
    return {**branches(text), "sorts": count(text, "sort")}


if __name__ == "__main__":
    for job in sys.argv[1:]:
        print("@@", json.dumps({"job": job}), flush=True)
        print("##", json.dumps(eval(job)), flush=True)
