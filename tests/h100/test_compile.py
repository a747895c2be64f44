"""What the GPU compiler says of the kernels and of whole steps, without a GPU: `compile.py` in a process of its own."""

import re

import pytest

GIB = 2**30
SHARED = 227 * 1024  # bytes that a thread block can have
PARTS = {"decode": ["paged_decode_attention", "combine_splits"], "prefill": ["paged_prefill_attention"]}

# Every head_dim and dtype, small, usual and large pages, MQA, windows, softcaps and sinks; and pages of 8 bits.
# Heads differ from case to case, as a process assembles the same kernel (`combine_splits`) only once.
KERNELS = [
    "{}()",
    "{}(heads=(64, 8), head_dim=64, window=128, sink=True)",
    "{}(heads=(8, 4), head_dim=256, window=1024, softcap=50.0, page_size=128)",
    "{}(heads=(16, 1), head_dim=128, page_size=16, dtype='float16', window=4096, softcap=30.0, sink=True)",
    "{}(heads=(24, 8), kv=('int8', 'int8'))",
    "{}(heads=(32, 4), head_dim=64, window=128, sink=True, kv=('int8', 'fp8'))",
]  # fmt: skip
# Other page sizes, no grouping, and tp 8's single head.
MORE_KERNELS = [
    "{}(heads=(8, 4), head_dim=256, window=1024, softcap=50.0, page_size=32)",
    "{}(heads=(16, 16), head_dim=64, page_size=128)",
    "{}(heads=(4, 1), head_dim=256, page_size=128)",
    "{}(heads=(4, 1), head_dim=128, page_size=32)",
]
HEADS = [
    "heads()",
    "heads(heads=(16, 8), head_dim=256, page_size=32)",
    "heads(heads=(64, 8), head_dim=64, norms=False, tokens=512, page_size=128, dtype='float16')",
]
MORE_HEADS = [
    "heads(heads=(64, 8), head_dim=64, norms=False, tokens=512)",
    "heads(heads=(64, 8), head_dim=128, page_size=128, dtype='float16')",
    "heads(heads=(8, 8), head_dim=128, page_size=16)",
]
PRODUCTS = ["product(1, 4096, 4096)", "product(128, 12288, 4096)"]
# Gate and up in one call (tp 2's half of them) and the projection out of experts, of few rows and of many, and floats.
STACKS = [
    "stack(4, outputs=1440)",
    "stack(8192, is_unit=False)",
    "stack(256, experts=128, inputs=2048, outputs=768, name=None)",
]
MORE_STACKS = [
    "stack(128, is_unit=False)",
    "stack(32768)",
    "stack(512, name='Q8_0', dtype='float16')",
    "stack(64, experts=1, inputs=4096, outputs=12288, name='Q4_1', is_unit=False)",
    "stack(4096, experts=8, inputs=14336, outputs=4096, name=None, is_unit=False)",
]
# Steps of GPT-OSS, cut to a layer with a window and one without.
EXPERT_STEPS = ["experts_step('gpt-oss-20b', '1xtp2', 'decode', layers=2)"]
LOGITS = [32, 201088]  # of a decode step, as large as half of an expert's matrix
MORE_EXPERT_STEPS = ["experts_step('gpt-oss-20b', '1xtp1', 'prefill', layers=2)"]
# All layers: minutes each, so only when asked for (`pytest -m long`).
WHOLE = [
    f"experts_step({name!r}, {topology!r}, {kind!r})"
    for name in ("gpt-oss-20b", "gpt-oss-120b")
    for topology in ("1xtp1", "1xtp2", "1xtp4ep4", "1xtp8ep8")
    for kind in ("decode", "prefill")
]
# Of a layer: every layer is compiled to the same operations, so that a few layers tell what all do.
CUT = "step('{}', {}, '{}', layers={}, split_k=False)"
FEW, MORE = 2, 3
KINDS = [(name, 1, kind) for name in ("qwen3-8b", "llama-3.1-8b") for kind in ("decode", "prefill")]
# As they run, with products in parts; all layers only when asked for.
STEPS = ["step('qwen3-8b', 1, 'decode', layers=2)", "step('llama-3.1-8b', 4, 'prefill', layers=2)"]
WHOLE_STEPS = ["step('qwen3-8b', 1, 'decode')", "step('llama-3.1-8b', 4, 'prefill')"]
OPERATIONS = 11  # the most that a layer starts, products in parts apart


def attentions(kernels):
    return [kernel.format(name) for kernel in kernels for name in ("decode", "prefill")]


@pytest.fixture(scope="module")
def kernels(compiled):
    return compiled("compile.py", [*attentions(KERNELS), *HEADS, *PRODUCTS])


def check_attention(job, facts):
    assert not facts["remarks"]  # of ptxas, such as that products are waited for one by one
    assert [part["name"] for part in facts["kernels"]] == PARTS[job.partition("(")[0]]
    for part in facts["kernels"]:
        assert part["spilled"] == 0
        assert 0 < part["shared"] <= SHARED


@pytest.mark.parametrize("kernel", attentions(KERNELS))
def test_a_kernel_spills_no_registers_and_fits_the_shared_memory(kernels, kernel):
    check_attention(kernel, kernels[kernel])


def check_heads(facts):
    assert not facts["remarks"]
    (part,) = facts["kernels"]
    assert part["name"] == "prepare_heads"
    assert part["spilled"] == 0
    assert 0 < part["shared"] <= SHARED
    assert facts["temp"] < facts["alias"] / 4  # which are the pools: none of them is copied


@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_prepared_by_one_kernel_that_writes_the_pools_in_place(kernels, heads):
    check_heads(kernels[heads])


@pytest.mark.long
def test_more_kernels_spill_no_registers_and_fit_the_shared_memory(compiled):
    found = compiled("compile.py", [*attentions(MORE_KERNELS), *MORE_HEADS])
    for kernel in attentions(MORE_KERNELS):
        check_attention(kernel, found[kernel])
    for heads in MORE_HEADS:
        check_heads(found[heads])


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_experimental_product_of_few_rows_spills_no_registers_and_fits_the_shared_memory(kernels, product):
    (part,) = kernels[product]["kernels"]
    assert not [remark for remark in kernels[product]["remarks"] if "C7510" in remark]  # ptxas: wgmma was serialised
    assert part["name"] == "skinny_gemm"
    assert part["spilled"] == 0
    assert 0 < part["shared"] <= SHARED


@pytest.fixture(scope="module")
def of_experts(compiled):
    return compiled("compile.py", [*STACKS, *EXPERT_STEPS])


def check_stack(facts):
    assert not [remark for remark in facts["remarks"] if "serialized" in remark]
    (part,) = facts["kernels"]
    assert part["name"] == "grouped_matmul"
    assert part["spilled"] == 0
    assert 0 < part["shared"] <= SHARED


@pytest.mark.parametrize("stack", STACKS)
def test_a_product_with_a_stack_spills_no_registers_and_its_products_overlap(of_experts, stack):
    check_stack(of_experts[stack])


def lengths(step, experts):
    """How many rows a prompt's step has: tokens, the four choices of each, and these in whole tiles of each expert's.

    A decode step's are few, so that nothing that it makes of them is as large as an expert's matrix.
    """
    return (2048, 4 * 2048, 4 * 2048 + 8 * experts + 128) if "prefill" in step else ()


def check_experts_step(step, facts):
    assert facts["stacks"] == 2 * facts["layers"]
    assert facts["whiles"] == 0
    # Whatever is made as large as an expert's matrix has rows, and no matrix has as many.
    rows = lengths(step, facts["experts"])
    assert all(dims == LOGITS or dims[0] in rows or dims[1] in rows for dims in facts["large"])
    assert facts["temp"] < facts["set_aside"]
    assert facts["alias"] >= facts["pool"]


@pytest.mark.parametrize("step", EXPERT_STEPS)
def test_a_step_of_experts_multiplies_by_them_as_they_lie(of_experts, step):
    check_experts_step(step, of_experts[step])


@pytest.mark.long
def test_more_products_and_steps_of_experts_are_the_same(compiled):
    found = compiled("compile.py", [*MORE_STACKS, *MORE_EXPERT_STEPS])
    for stack in MORE_STACKS:
        check_stack(found[stack])
    for step in MORE_EXPERT_STEPS:
        check_experts_step(step, found[step])


@pytest.mark.long
@pytest.mark.parametrize("step", WHOLE)
def test_a_whole_model_of_experts_fits_with_its_kv(compiled, step):
    facts = compiled("compile.py", [step])[step]
    assert facts["stacks"] == 2 * facts["layers"]
    assert facts["argument"] + facts["output"] - facts["alias"] + facts["temp"] < 80e9
    check_experts_step(step, facts)
    assert not any(facts["spilled"].values())
    assert "grouped_matmul" in facts["spilled"]
    # Not even the experts of one layer would fit into the temporaries as floats of 16 bits.
    assert facts["temp"] < facts["layer_experts"]
    if "120b', '1xtp1'" in step:
        assert facts["pool"] >= 10e9


@pytest.fixture(scope="module")
def steps(compiled):
    return compiled("compile.py", [*STEPS, *(CUT.format(*kind, layers) for kind in KINDS for layers in (FEW, MORE))])


def check_step(step, facts):
    tp = int(re.search(r", (\d),", step)[1])
    # One more prepares the heads where a device has a multiple of eight of each kind.
    per_layer = (2 if "decode" in step else 1) + (tp == 1)
    assert facts["kernels"] == per_layer * facts["layers"]
    assert facts["alias"] >= facts["pool"]
    assert not facts["copies"]
    assert facts["temp"] < facts["set_aside"] < 2 * GIB
    # Two sums of partial products a layer, and one for the embedding, whose rows are split.
    assert facts["all_reduce"] == (2 * facts["layers"] + 1 if tp > 1 else 0)
    # The sampler sees whole rows of logits; weights and KV stay where they are.
    assert all(shape.count("f32[") == len(re.findall(r"\w+\[", shape)) for shape in facts["all_gather"])
    assert len(facts["all_gather"]) <= 1


@pytest.mark.parametrize("step", STEPS)
def test_a_step_keeps_its_pool_in_place_and_gathers_nothing(steps, step):
    check_step(step, steps[step])


@pytest.mark.long
@pytest.mark.parametrize("step", WHOLE_STEPS)
def test_a_whole_step_fits(compiled, step):
    facts = compiled("compile.py", [step])[step]
    check_step(step, facts)
    assert facts["argument"] + facts["output"] - facts["alias"] + facts["temp"] < 80e9


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_starts_few_operations_and_none_that_rewrites_page_tables(steps, kind):
    few, more = (steps[CUT.format(*kind, layers)] for layers in (FEW, MORE))
    assert more["integers"] == few["integers"]
    assert (more["operations"] - few["operations"]) / (MORE - FEW) <= OPERATIONS


@pytest.mark.parametrize("kind", KINDS)
def test_layers_share_the_room_for_what_they_compute(steps, kind):
    few, more = (steps[CUT.format(*kind, layers)] for layers in (FEW, MORE))
    check_step(CUT.format(*kind, MORE), more)
    assert more["temp"] <= few["temp"] * 1.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_which_is_all_that_a_greedy_batch_runs_has_no_branch_and_no_loop(steps, kind):
    """A GPU would ask the host about them; see `test_branches.py`."""
    facts = steps[CUT.format(*kind, MORE)]
    assert facts["conditionals"] == 0
    assert facts["trips"] == []
