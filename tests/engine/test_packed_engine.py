"""Engines over Hugging Face's quantised checkpoints: transformers' tokens, meshes, hand-offs, and `quantization`."""

import numpy as np
import pytest
from helpers.core_engine import greedy, token_ids
from helpers.packed import FORMATS
from helpers.tiny_files import expected, write_packed, write_tiny_directory
from twinmesh import LLM
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.orbax_writer import write
from twinmesh.models.decoder import abstract_params
from twinmesh.models.quantized import quantize

OPTIONS = dict(
    max_model_len=64, page_size=16, max_num_seqs=2, prefill_buckets=(32,), decode_buckets=(2,), kv_cache_bytes=1 << 20,
    dtype="float32", quantization="keep", activations="int16",
)  # fmt: skip
# One of each kind, in groups of 128 as the tests of kernels have them, which so share the kernels; and where it runs.
RUNS = [
    ("fp8 in blocks", "both=1xtp2"), ("int8 in groups", "prefill=1xtp2,decode=1"), ("awq", "prefill=1,decode=1xtp2"),
    ("int4 of 128", "both=1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return lambda name: write_packed(folder / name.replace(" ", "-"), name)


@pytest.mark.parametrize(("name", "topology"), RUNS)
def test_greedy_tokens_are_those_of_transformers(directories, name, topology):
    case = expected("packed")
    method = FORMATS[name][1]["quant_method"]
    with LLM(directories(name), topology=topology, **OPTIONS) as llm:
        assert llm.config.formats
        found = token_ids(llm.generate([case["prompt_ids"].tolist()], greedy(len(case["greedy_ids"]))))
    assert found == [case["greedy_ids"].tolist()], method


def test_new_parameters_and_orbax_keep_the_format(directories, tmp_path):
    source, case = directories("gptq"), expected("packed")
    write(open_checkpoint(source), tmp_path / "orbax")
    checkpoint = open_checkpoint(tmp_path / "orbax")
    assert (checkpoint.method, checkpoint.formats) == ("gptq", open_checkpoint(source).formats)
    path = "layers.1.mlp.up_proj"
    like = abstract_params(checkpoint.config, "float32", checkpoint.formats).specs[path].value
    prompt, params = [case["prompt_ids"].tolist()], greedy(len(case["greedy_ids"]))
    with LLM(tmp_path / "orbax", **(OPTIONS | {"quantization": None})) as llm:
        assert token_ids(llm.generate(prompt, params)) == [case["greedy_ids"].tolist()]
        llm.update_params({path: quantize(np.zeros(like.shape, np.float32), like)} if llm.config.formats else {})
        if llm.config.formats:
            assert token_ids(llm.generate(prompt, params)) != [case["greedy_ids"].tolist()]


def test_a_method_has_to_be_the_checkpoints(directories, tmp_path):
    with pytest.raises(
        ValueError, match=r"^quantization='awq' is not usable: int8 is quantised by compressed-tensors; "
    ):
        LLM(directories("int8"), **(OPTIONS | {"quantization": "awq"}))
    floats = write_tiny_directory(tmp_path / "floats", "packed")
    with pytest.raises(ValueError, match=r"floats is not quantised; .* twinmesh convert --quantize fp8\.$"):
        LLM(floats, **(OPTIONS | {"quantization": "fp8"}))
    with pytest.raises(ValueError, match=r"floats is not quantised; leave it out\.$"):
        LLM(floats, **(OPTIONS | {"quantization": "gptq"}))


def test_groups_that_a_mesh_would_cut_become_floats_on_all_meshes_and_are_named(directories, capsys):
    """256 inputs on four devices are 64 each, of groups of 128; 512 are one group each."""
    with LLM(directories("int4 of 128"), topology="both=1xtp4", progress=True, **OPTIONS) as llm:
        assert llm.config.formats == ("INT4-128-bfloat16",)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("weights: "))
    assert "of o_proj, 64 inputs on each of 4 devices are no multiple of 128, which groups have" in line
