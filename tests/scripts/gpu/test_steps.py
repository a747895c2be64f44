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
    reads = gpu_steps.weight_reads(abstract_params(model, jnp.bfloat16), model)
    table = model.vocab_size * model.hidden_size
    assert reads.step_bytes(1) + 2 * table == pytest.approx(2e9 * billions, rel=1e-3)
    assert 2 * reads.token_numbers == pytest.approx(reads.step_bytes(128) - 2 * table, rel=1e-3)  # norms are float32


@pytest.mark.parametrize(
    ("model", "billions", "active"), [(gpu_steps.GPT_OSS_20B, 20.9, 3.6), (gpu_steps.GPT_OSS_120B, 116.8, 5.1)]
)
def test_of_experts_a_step_reads_those_that_rows_choose(model, billions, active):
    """The numbers of parameters are those of the models' card; active are counted with the head, not the embedding."""
    reads = gpu_steps.weight_reads(
        abstract_params(model, jnp.bfloat16, gpu_steps.mxfp4_experts(model)), model
    )  # fmt: skip
    experts = reads.expert_bytes / 4.25 * 8
    table = model.vocab_size * model.hidden_size
    assert (experts + reads.whole_bytes / 2 + table) / 1e9 == pytest.approx(billions, rel=2e-2)
    assert (reads.token_numbers + reads.head_numbers) / 1e9 == pytest.approx(active, rel=2e-2)
    share = 4 / model.experts.count
    assert reads.step_bytes(1) - reads.whole_bytes == pytest.approx(share * reads.expert_bytes)
    assert reads.step_bytes(10**6) == pytest.approx(reads.whole_bytes + reads.expert_bytes)


@pytest.mark.parametrize("model", [gpu_steps.QWEN3_8B, gpu_steps.GPT_OSS_20B])
def test_requests_are_as_long_as_the_prompt_and_weights_have_the_models_shapes(model):
    plan = gpu_steps.plan_for(gpu_steps.shrink(model), 1024, 8192)
    assert isinstance(plan.state, DeviceState)
    assert length_class(plan.config.max_pages * plan.config.page_size) == 8192
    specs = jax.tree.leaves([spec.value for spec in plan.params.specs.values()])
    params = gpu_steps.random_params(plan)
    assert len(params) == len(plan.params.specs)
    made = jax.tree.leaves(params)
    assert [(x.shape, x.dtype) for x in made] == [(spec.shape, spec.dtype) for spec in specs]
    assert all(jnp.isfinite(x).all() for x in made)
