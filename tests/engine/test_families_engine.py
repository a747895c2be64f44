"""Every family through a whole engine: small pages, prompts in several chunks, windows shorter than the prompt, both
kinds of meshes, tensor parallelism; against what transformers generates (tests/make_family_fixtures.py)."""

import pytest
from helpers.core_engine import greedy, token_ids
from helpers.tiny_families import TINY
from helpers.tiny_files import expected, write_tiny_directory, write_tiny_gguf_of
from twinmesh import LLM

# Compilation takes nearly all the time: one prefill and one decode program for each mesh.
OPTIONS = dict(
    max_model_len=56, page_size=8, max_num_seqs=2, prefill_buckets=(8,), decode_buckets=(2,), dtype="float32",
    kv_cache_bytes=1 << 20,
)  # fmt: skip
SPLIT, BOTH, PARALLEL = "prefill=1,decode=1", "both=1", "prefill=1xtp2,decode=1xtp4"
# The models left out differ from these in what they are read from only, which tests/models/test_families.py looks at.
CASES = {
    "llama3": PARALLEL,
    "qwen2": PARALLEL,  # biases divided over devices, and two KV heads for four of them
    "qwen2_window": BOTH,
    "qwen3": PARALLEL,
    "mistral": SPLIT,
    "gemma3": PARALLEL,  # one KV head for four devices
    "gemma3_linear": SPLIT,
    "phi3": PARALLEL,
    "phi4": BOTH,
    "mixtral": "prefill=1,decode=1xtp4ep4",
    "qwen3_moe": "prefill=1xtp2ep2,decode=1xtp4ep2",  # an expert's columns divided as well
    "gpt_oss": PARALLEL,  # experts' columns, biases and sinks divided over devices
}
DETERMINISTIC = {"mixtral", "qwen3_moe", "gpt_oss"}


def write(path, name):
    """From a GGUF file where there can be one, for every second model; else from a directory."""
    if TINY[name].gguf and list(CASES).index(name) % 2:
        return write_tiny_gguf_of(path / f"{name}.gguf", name)
    return write_tiny_directory(path / name, name)


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_decode_steps_give_the_tokens_of_transformers(tmp_path, name):
    case = expected(name)
    prompt, tokens = case["prompt_ids"].tolist(), case["greedy_ids"].tolist()
    assert len(prompt) > 2 * OPTIONS["prefill_buckets"][0]
    with LLM(write(tmp_path, name), topology=CASES[name], deterministic=name in DETERMINISTIC, **OPTIONS) as llm:
        # The second prompt is in the way of the first: they share steps, and chunks are of other tokens.
        outputs = llm.generate([prompt, prompt[5:] + prompt[:5]], greedy(len(tokens)))
        assert token_ids(outputs)[0] == tokens
        (alone,) = llm.generate(prompt, greedy(len(tokens)))
        assert alone.outputs[0].token_ids == tokens
