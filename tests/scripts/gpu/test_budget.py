"""How a step's time is divided between kinds of kernels: made-up kernels, and a profile that is really taken."""

import jax
import jax.numpy as jnp
import pytest
from twinmesh.scripts.gpu import budget as gpu_budget
from twinmesh.scripts.gpu.budget import Event

HLO = """
ENTRY %main {
  %fusion.7 = bf16[8]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(step)/layer0/attention/append_kv/scatter"}
  %loop_add.1 = bf16[8]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(step)/layer0/mlp/add" stack_frame_id=3}
  ROOT %argmax.2 = s32[8]{0} fusion(%a), kind=kInput, metadata={op_name="jit(step)/sample/reduce"}
  %custom-call.5 = (bf16[8], s8[9]) custom-call(%a), metadata={op_name="jit(step)/layer0/mlp/dot_general"}
}
"""


@pytest.mark.parametrize(
    ("name", "operation", "kind"),
    [
        ("paged_decode_attention_mosaic_gpu_kernel", "", "attention"),
        ("loop_dynamic_fusion", "fusion.7", "append"),
        ("prepare_heads_mosaic_gpu_kernel", "", "append"),
        ("fusion_7", "", "append"),
        ("loop_add_1", "", "elementwise"),
        ("argmax_2", "argmax.2", "sampling"),
        ("void cub::DeviceRadixSortOnesweepKernel<int>", "", "sampling"),
        ("nvjet_hsh_64x8_64x16_1x1_h_bz_TNN", "", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "", "gemm"),
        ("unknown_kernel", "custom-call.5", "gemm"),
        ("gemm_fusion_dot_12", "", "gemm"),
        ("grouped_matmul_mosaic_gpu_kernel", "", "gemm"),
        ("MemcpyD2D", "", "copy"),
        ("something_else", "", "elementwise"),
    ],
)
def test_a_kernel_is_told_apart_by_its_scope_and_its_name(name, operation, kind):
    assert gpu_budget.kind_of(Event(name, operation, 0, 1), gpu_budget.scopes(HLO)) == kind


def test_times_add_up_and_what_no_kernel_covers_is_a_gap():
    events = [
        Event("nvjet_b", "", 3e6, 2e6),  # beside the next, on another stream
        Event("paged_decode_attention", "", 0, 2e6),
        Event("loop_add_1", "", 4e6, 2e6),
        Event("nvjet_a", "", 7e6, 1e6),
    ]
    found = gpu_budget.budget(events, gpu_budget.scopes(HLO), calls=2)
    assert found["span_ms"] == pytest.approx(4)
    assert found["gap_ms"] == pytest.approx(1)  # from 2 to 3, and from 6 to 7, of two calls
    assert found["kinds_ms"] == {
        "attention": 1, "gemm": 1.5, "append": 0, "sampling": 0, "elementwise": 1, "copy": 0,
    }  # fmt: skip
    assert found["kernels"] == 2
    assert list(found["longest_ms"]) == ["paged_decode_attention", "nvjet_b", "loop_add_N", "nvjet_a"]


def test_a_profile_of_a_program_has_its_products():
    def step(x):
        with jax.named_scope("sample"):
            return jnp.sort(x @ x, axis=0)

    x = jnp.ones((256, 256))
    program = jax.jit(step).lower(x).compile()
    found = gpu_budget.measure_budget(lambda: program(x), program.as_text(), step_ms=1.0, calls=2)
    assert "failed" not in found
    assert found["kinds_ms"]["sampling"] > 0
    assert found["span_ms"] > 0
    assert found["kernels"] >= 1


def test_an_empty_folder_has_no_events(tmp_path):
    assert gpu_budget.read_events(tmp_path) == []
