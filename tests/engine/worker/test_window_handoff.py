"""A hand-off of a model with windows: the arrays that move hold the windows' pages and no more."""

import pytest
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.simulation.capacity import DeviceMemory, plan_memory
from twinmesh.engine.worker.kv_cache import abstract_state
from twinmesh.engine.worker.kv_transfer import abstract_staging, plan, staged_pages
from twinmesh.models.families.known import known_model
from twinmesh.models.quantized import nbytes


@pytest.mark.parametrize("tp", [1, 2])
def test_the_arrays_of_a_hand_off_are_the_bytes_that_are_planned_and_half_are_spared(tp):
    model, formats = known_model("gpt-oss-20b")
    options = EngineOptions("", topology=f"prefill=1xtp{tp},decode=1xtp{tp}", max_model_len=16384)
    config, (pool, _), *_ = plan_memory(model, options, DeviceMemory("h100", 84_942_979_072), kept=formats)
    mesh, _ = build_meshes(config.topology)
    state = abstract_state(model, config, pool.pages, config.kv_on(config.topology.meshes[0]), mesh)
    pages = staged_pages(config, 8192 // config.page_size)
    moved = nbytes(abstract_staging(state, mesh, plan(model.num_kv_heads, tp, tp), pages).kv)
    caps = [config.pages_to_send(window) for window in config.windows]
    assert moved == pool.transfer_bytes(8192 // config.page_size, caps) - pool.state_bytes
    assert pages == (3, 128)  # of the layers with a window of 128 tokens, and of the others
    whole = sum(128 * size for size in pool.page_bytes)
    assert moved / whole == pytest.approx((3 + 128) / 256)
