"""What a mesh's largest steps take besides weights, KV and request state: XLA's own analysis of the compiled programs.

Before anything runs: on the devices that are there, or on an H100 that is not, for which JAX's CUDA plugin compiles
without one, in a process of its own (`python -m twinmesh.engine.startup.step_temporaries`). A program's need is its
temporaries and those results that are not written in place. The model is cut to two layers of each kind, since layers
follow each other and reuse what the one before has used.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import jax
import jax.numpy as jnp
import msgspec
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from ...kernels_pallas.cpu.blocks_records import Activations
from ...models.config import ModelConfig
from ...models.decoder import abstract_params
from ..config import EngineConfig
from ..errors import EngineError
from ..sampling.request_rows import Stage
from ..sharding.mesh import abstract_mesh, mesh_of, products_on
from ..simulation.planning.memory_plan import StepMemory
from ..sizing.heads import model_on
from ..topology import MeshSpec
from ..worker.compile_program import compile_program
from ..worker.kv_cache import abstract_state
from ..worker.mesh_plan import MeshPlan
from ..worker.programs import Job

_LAYERS_OF_A_KIND = 2
_KIND, _CORES = "NVIDIA H100 80GB HBM3", 132
_PLUGIN, _MOST_DEVICES = "jax_cuda12_plugin", 8


class Asked(NamedTuple):
    """A mesh whose programs are to be compiled."""

    model: ModelConfig  # the checkpoint's
    config: EngineConfig
    spec: MeshSpec
    pages: tuple[int, ...]  # of each cache group
    kept: Mapping[str, str]  # path -> format, of the weights that stay quantised
    activations: Activations


def temporaries_on(asked: Asked, devices: Sequence[jax.Device]) -> Iterator[StepMemory]:
    """Compile the `programs` of a mesh for its devices, and say what each takes, one after the other."""
    plan = _plan(asked, mesh_of(asked.spec, devices[: asked.spec.tp]))
    for job in _jobs(asked.config, asked.spec):
        memory = compile_program(plan, job.kind, *job.size).memory_analysis()
        assert memory is not None
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        yield StepMemory(_name(job), memory.temp_size_in_bytes + max(0, new))


def programs(config: EngineConfig, spec: MeshSpec) -> list[str]:
    """Name a mesh's largest programs, in the order in which they are compiled."""
    return [_name(job) for job in _jobs(config, spec)]


def can_compile_for_h100() -> bool:
    """Return whether what compiles for GPUs that are not there is installed."""
    return importlib.util.find_spec(_PLUGIN) is not None


def temporaries_on_h100(asked: Asked) -> Iterator[StepMemory]:
    """Compile the `programs` of a mesh for H100s that need not be there, in a process of its own.

    That process ends when the iterator is closed, also in the middle of a program.

    Raises:
        EngineError: the compiler fails; its last words.
    """
    quiet = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    paths = [str(Path(path).absolute()) for path in sys.path if path]
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", __name__]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=said, env=environment) as child,
    ):
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(BrokenPipeError), child.stdin as question:  # it has failed already: its words follow
                question.write(msgspec.json.encode(asked))
            for line in child.stdout:
                yield msgspec.json.decode(line, type=StepMemory)
        except BaseException:
            child.kill()
            raise
        if child.wait() != 0:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().splitlines() or ["it says nothing"]
            remedy = "plan without it, by compiles=False or --no-compile"
            raise EngineError(f"the compiler for H100s failed, {words[-1][:200]}: {remedy}.")


def _plan(asked: Asked, mesh: Mesh) -> MeshPlan:
    model, tp = cut(asked.model), asked.spec.tp
    on_mesh, dtype = model_on(model, tp), jnp.dtype(asked.config.dtype)
    layers = {f"layers.{index}." for index in range(model.num_layers)}
    kept = {
        path: form
        for path, form in asked.kept.items()
        if not path.startswith("layers.") or any(path.startswith(prefix) for prefix in layers)
    }
    params = abstract_params(on_mesh, dtype, kept, products_on(mesh, asked.activations))
    state = abstract_state(on_mesh, asked.config, asked.pages, asked.config.kv_on(asked.spec), mesh)
    return MeshPlan(mesh, asked.spec, model, params, asked.config, state)


def cut(model: ModelConfig) -> ModelConfig:
    """Return the model with two layers of each kind."""
    seen, kept = Counter[object](), []
    for spec in model.layers:
        seen[spec] += 1
        if seen[spec] <= _LAYERS_OF_A_KIND:
            kept.append(spec)
    return replace(model, layers=tuple(kept))


def _name(job: Job) -> str:
    return " ".join(map(str, (job.kind, *job.size)))


def _jobs(config: EngineConfig, spec: MeshSpec) -> Iterator[Job]:
    rows = config.decode_buckets[-1] if spec.decodes else config.prefill_rows
    if spec.prefills:
        yield Job("prefill", (config.chunk_size,))
        if spec.fused:
            yield Job("fused", (config.chunk_size,))
            rows = config.prefill_rows + config.decode_buckets[-1]
        yield Job("score", (config.chunk_size,))
    if spec.decodes:
        yield Job("decode", (config.decode_buckets[-1],))
    yield from (Job("sample", (stage, rows)) for stage in Stage)


def _on_absent() -> None:
    """Read what is asked from stdin, compile, and write each answer to stdout, as a line of its own."""
    from jax.experimental import topologies

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever compilers print

    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    target = Path(__file__).with_name("h100.txtpb").read_text()
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology=f"1x1x{max(_MOST_DEVICES, asked.spec.tp)}", target_config=target
    ).devices  # fmt: skip
    device = AbstractDevice(device_kind=_KIND, num_cores=_CORES, platform="gpu")
    like = abstract_mesh(asked.spec)
    kinds = (AxisType.Auto,) * len(like.axis_names)
    mesh = AbstractMesh(like.axis_sizes, like.axis_names, kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        for found in temporaries_on(asked, devices):
            answers.write(msgspec.json.encode(found) + b"\n")
            answers.flush()


if __name__ == "__main__":
    _on_absent()
