"""Host time per decode step: what the dispatching thread spends on scheduling, dispatch and updates.

    python scripts/bench/host.py --json host.json

Reported is the CPU time of the dispatching thread per step, in milliseconds, by the number of requests that decode, of
parameter leaves, and of devices; each leaf costs the host time on every device. The model has random weights. Its
programs are hollow unless `--real-device`: they take and give back the same arrays and compute nothing. XLA on CPU
prepares a program's execution on the thread that dispatches it and computes on the cores that the host needs too; a GPU
does neither. With `--decision-log` each engine is measured with a decision log too, side by side.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from queue import SimpleQueue

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled
from twinmesh.engine.core.engine_core import EngineCore
from twinmesh.engine.core.submission import Submission, Update
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.protocol.events import RequestFacts
from twinmesh.engine.protocol.executor import Executor
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.scheduler.scheduler import Scheduler
from twinmesh.engine.sharding.mesh import param_on
from twinmesh.engine.sharding.weights import Params
from twinmesh.engine.sizing.heads import model_on
from twinmesh.engine.startup.build import start_core
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.kv_cache import DeviceState
from twinmesh.engine.worker.local_executor import LocalExecutor
from twinmesh.engine.worker.mesh_worker import MeshWorker
from twinmesh.models.config import AttentionSpec, ModelConfig, Rope
from twinmesh.models.decoder import abstract_params

_PROMPT, _TOKENS = 8, 200
ROUNDS = 7


def model_with_layers(layers: int) -> ModelConfig:
    """Make a decoder of 9 parameters a layer and 2 besides, as small as eight-fold tensor parallelism lets it be."""
    return ModelConfig("llama", 128, 16, 16, 8, 8, 2, 1e-5, True, 1024, (AttentionSpec(Rope(1e4)),) * layers)


def random_params(
    dtype: jnp.dtype, meshes: Sequence[Mesh], _formats: Mapping[str, str], *, model: ModelConfig
) -> list[Params]:
    """Make parameters of the right shapes for each mesh; their values do not matter here."""
    random = np.random.default_rng(0)
    return [
        tuple(
            jax.tree.map(
                lambda like: jax.device_put(random.standard_normal(like.shape).astype(like.dtype), like.sharding),
                param_on(mesh, spec),
            )
            for spec in abstract_params(model_on(model, mesh.size), dtype).specs.values()
        )
        for mesh in meshes
    ]


def hollow_out(meshes: Sequence[MeshWorker]) -> None:
    """Replace an engine's step programs by ones that take and give back the same arrays and compute nothing."""
    for mesh in meshes:
        programs, state = mesh.programs, mesh.plan.state
        for key, program in programs.prefill.items():
            programs.prefill[key] = hollow(program, state)
        for rows, program in programs.decode.items():
            programs.decode[rows] = hollow(program, state)


def hollow(program: Compiled, state: DeviceState) -> Compiled:
    """Compile a program of the same signature as a step, which returns the state as it came and zeros for the rest."""
    outputs, shardings = program.out_info, jax.tree.map(lambda x: x.sharding, state)
    whole = shardings.scalars.ints

    def step(params: Params, state: DeviceState, *inputs: jax.Array) -> tuple[object, ...]:
        return state, *(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), output) for output in outputs[1:])

    (arguments, _) = program.in_avals
    shapes = jax.tree.map(
        lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y), arguments, program.input_shardings[0]
    )
    out = (shardings, *(whole for _ in outputs[1:]))
    return jax.jit(step, donate_argnums=1, out_shardings=out, keep_unused=True).lower(*shapes).compile()


def measure(topology: str, layers: int, requests: int, real: bool, log: str | None) -> dict[str, float | int | str]:
    """Run `requests` at once to their end, ROUNDS times; return the dispatching thread's time per decode step. `log` is
    where the engine writes its decision log, if it does."""
    model, dtype = model_with_layers(layers), jnp.dtype(jnp.float32)
    options = EngineOptions(
        "random", topology=topology, dtype=dtype, max_model_len=512, max_num_seqs=requests, prefill_buckets=(512,),
        decode_buckets=(requests,), kv_cache_bytes=512 << 20, max_retries=0, decision_log=log,
    )  # fmt: skip
    core, _ = start_core(model, dtype, partial(random_params, model=model), options)
    try:
        if not real:
            hollow_out(core.inspect(meshes_of))
        rounds = [host_time(core, requests) for _ in range(ROUNDS)]
    finally:
        core.close()
    return {
        "topology": topology,
        "devices": options.parsed_topology.num_devices,
        "leaves": len(abstract_params(model, dtype).specs),
        "requests": requests,
        "real_device": real,
        "decision_log": log is not None,
        "host_ms_per_step": round(min(rounds), 3),
        "host_ms_per_step_median": round(statistics.median(rounds), 3),
    }


def meshes_of(scheduler: Scheduler, executor: Executor) -> Sequence[MeshWorker]:
    """Return the meshes of a running engine; for `EngineCore.inspect`."""
    assert isinstance(executor, LocalExecutor)
    return executor.meshes


def host_time(core: EngineCore, requests: int) -> float:
    """Run `requests` once and return the dispatching thread's milliseconds per step."""
    before = core.metrics()
    run(core, requests)
    after = core.metrics()
    return 1e3 * (after.host_seconds - before.host_seconds) / (after.steps - before.steps)


def run(core: EngineCore, requests: int) -> None:
    """Submit all requests at once and wait for all of them."""
    sink: SimpleQueue[Update] = SimpleQueue()
    random = np.random.default_rng(1)
    core.submit([_submission(core, random.integers(0, 100, _PROMPT), sink) for _ in range(requests)])
    left = requests
    while left:
        update = sink.get()
        if update.error is not None:
            raise RuntimeError(update.error)
        left -= update.finish_reason is not None


def _submission(core: EngineCore, prompt: np.ndarray, sink: "SimpleQueue[Update]") -> Submission:
    facts, plan = RequestFacts(next(core.ids), _PROMPT, _TOKENS), SamplingPlan(temperature=0.0, seed=0)
    return Submission(core.clock(), facts, prompt.astype(np.int32), plan, frozenset(), None, sink)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a few engines, print their figures as JSON and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=["both=1", "both=1xtp8"], help="engines to measure")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 45], help="decoder layers, 9 leaves each and 2 (default: 1 45)"
    )
    parser.add_argument(
        "--requests", type=int, nargs="+", default=[1, 8, 64], help="requests running at once (default: 1 8 64)"
    )
    parser.add_argument("--real-device", action="store_true", help="run the real programs")
    parser.add_argument("--decision-log", action="store_true", help="measure with a decision log too, side by side")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    topologies = arguments.topology
    jax.config.update("jax_num_cpu_devices", max(Topology.parse(text).num_devices for text in topologies))
    start = time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory() as folder:
        logs = (None, f"{folder}/run.log") if arguments.decision_log else (None,)
        rows = [
            measure(topology, layers, requests, arguments.real_device, log)
            for topology, layers, requests, log in product(topologies, arguments.layers, arguments.requests, logs)
        ]
    report = {"benchmark": "host", "date": start, "jax": jax.__version__, "rows": rows}
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
