"""What scoring prompts takes of a device's memory, as compiled, beside what generating takes anyway."""

import jax.numpy as jnp
import pytest
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.sampling.request_rows import Stage
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sizing.defaults import defaults_for, engine_config
from twinmesh.engine.startup.step_temporaries import cut
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.engine.worker.kv_cache import abstract_state
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.models.decoder import abstract_params
from twinmesh.models.families.known import known_config


def planned(topology, **options):
    """The first mesh of an engine of SmolLM2 with two layers, as a CPU's defaults have it."""
    model = cut(known_config("smollm2-135m"))
    config = engine_config(EngineOptions("x", topology=topology, **options), model, defaults_for("cpu", ""), "float32")
    mesh, spec = build_meshes(config.topology)[0], config.topology.meshes[0]
    state = abstract_state(model, config, [512] * len(config.windows), config.kv_on(spec), mesh)
    return MeshPlan(mesh, spec, model, abstract_params(model, jnp.float32), config, state)


def taken(plan, kind, *size):
    """Bytes that a program takes beside its arguments."""
    memory = compile_program(plan, kind, *size).memory_analysis()
    return memory.temp_size_in_bytes + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)


@pytest.mark.parametrize("topology", ["both=1", pytest.param("prefill=1,decode=1", marks=pytest.mark.long)])
def test_scoring_takes_as_much_for_long_prompts_as_for_short_ones_and_no_more_than_generating(topology):
    plan = planned(topology)
    small, large = plan.config.prefill_buckets[0], plan.config.prefill_buckets[-1]
    scoring = taken(plan, "score", large)
    assert scoring <= taken(plan, "score", small) + 1024
    rows = plan.config.decode_buckets[-1]
    assert plan.config.scored_rows == rows
    generating = [taken(plan, "prefill", large), *(taken(plan, "sample", stage, rows) for stage in Stage)]
    assert scoring <= max(generating)
