"""What a step of the GPU suite is held against: counts, not times."""

import jax
import jax.numpy as jnp
import pytest
from twinmesh.engine.worker.kv_cache import DeviceState
from twinmesh.kernels_pallas.tiles import length_class
from twinmesh.models.decoder import abstract_params
from twinmesh.scripts.gpu import steps as gpu_steps


@pytest.mark.parametrize(("model", "billions"), [(gpu_steps.QWEN3_8B, 8.19), (gpu_steps.LLAMA_3_1_8B, 8.03)])
def test_a_step_reads_all_weights_but_the_embedding_and_a_prompt_multiplies_by_all_but_the_head(model, billions):
    read, products = gpu_steps.weight_bytes(abstract_params(model, jnp.bfloat16))
    table = 2 * model.vocab_size * model.hidden_size
    assert read + table == pytest.approx(2e9 * billions, rel=1e-3)
    assert products == read - table


def test_requests_are_as_long_as_the_prompt_and_weights_have_the_models_shapes():
    plan = gpu_steps.plan_for(gpu_steps.shrink(gpu_steps.QWEN3_8B), 1024, 8192)
    assert isinstance(plan.state, DeviceState)
    assert length_class(plan.config.max_pages * plan.config.page_size) == 8192
    specs = [spec.value for spec in plan.params.specs.values()]
    made = gpu_steps.random_params(plan)
    assert [(x.shape, x.dtype) for x in made] == [(spec.shape, spec.dtype) for spec in specs]
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(made))
