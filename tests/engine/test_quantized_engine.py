"""Engines whose weights stay quantised, against the model with the same weights in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.core_engine import greedy, token_ids
from helpers.loading import load_on_one_device
from helpers.quantized import write_quantized
from twinmesh import LLM, SamplingParams
from twinmesh.kernels_pallas.matmul import Products
from twinmesh.kernels_pallas.quantized import QuantizedArray, parameter
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.orbax_writer import write
from twinmesh.models.decoder import abstract_params, bind, dense_hidden
from twinmesh.models.quantized import quantize
from twinmesh.scripts.cli import main

OPTIONS = dict(
    max_model_len=96, page_size=16, max_num_seqs=4, prefill_buckets=(16, 64), decode_buckets=(4,),
    kv_cache_bytes=4 << 20, dtype="float32", quantization="keep", activations="float",
)  # fmt: skip
PROMPTS = ["the rain and the land", "in the end of an era, the other one", "a"]
UP = "layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_quantized(tmp_path_factory.mktemp("quantised") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path):
    """The checkpoint, and its parameters as they stay."""
    checkpoint = open_checkpoint(path)
    return checkpoint, load_on_one_device(checkpoint, "float32", formats=checkpoint.formats)


def floats(params):
    return {path: parameter(x) if isinstance(x, QuantizedArray) else x for path, x in params.items()}


@functools.cache
def _forward(config):
    graphdef = abstract_params(config, jnp.float32, products=Products("float")).graphdef

    @jax.jit
    def run(params, ids):
        decoder = bind(graphdef, params)
        return decoder.logits(dense_hidden(decoder, ids))

    return run


def forward(checkpoint, params, ids):
    """Logits by plain attention over the whole sequence."""
    padded = np.zeros(96, np.int32)
    padded[: len(ids)] = ids
    return np.asarray(_forward(checkpoint.config)(tuple(params.values()), padded))[: len(ids)]


def most_likely(checkpoint, params, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(forward(checkpoint, params, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_logits_are_those_of_the_dequantised_weights(model):
    checkpoint, params = model
    ids = np.arange(40) % 275
    expected = forward(checkpoint, load_on_one_device(checkpoint, "float32"), ids)
    np.testing.assert_allclose(forward(checkpoint, params, ids), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("topology", ["both=1", "both=1xtp2", "prefill=1xtp2,decode=1"])
def test_greedy_tokens_are_those_of_the_dequantised_weights(path, model, topology):
    with LLM(path, topology=topology, **OPTIONS) as llm:
        assert set(llm.config.formats) == {"Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q6_K", "Q4_K"}
        found = token_ids(llm.generate(PROMPTS, greedy(32)))
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = [most_likely(model[0], floats(model[1]), prompt, 32) for prompt in prompts]
    assert found == expected


def test_several_steps_of_one_dispatch_and_16_bits(path):
    with LLM(path, decode_steps=4, **(OPTIONS | {"dtype": "bfloat16"})) as llm:
        several = token_ids(llm.generate(PROMPTS, greedy(16)))
    with LLM(path, **(OPTIONS | {"dtype": "bfloat16"})) as llm:
        assert token_ids(llm.generate(PROMPTS, greedy(16))) == several


def test_new_parameters_take_the_place_of_quantised_ones_in_their_format(path, model):
    checkpoint, params = model
    new = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32) / 16
    prompt = checkpoint.tokenizer().encode(PROMPTS[0])
    with LLM(path, **OPTIONS) as llm:
        with pytest.raises(ValueError, match=r"is float32\[256, 512\]: it must be Q4_1\[256, 512\], as before; round "):
            llm.update_params({UP: new})
        rounded = quantize(new, params[UP])
        before = token_ids(llm.generate([prompt], greedy(16)))
        llm.update_params({UP: rounded})
        after = token_ids(llm.generate([prompt], greedy(16)))
        llm.update_params({UP: params[UP]})
        assert token_ids(llm.generate([prompt], greedy(16))) == before
    assert after == [most_likely(checkpoint, floats(params | {UP: rounded}), prompt, 16)]
    assert before != after


def test_prompt_scores_go_through_the_quantised_head(path, model):
    checkpoint, params = model
    ids = checkpoint.tokenizer().encode(PROMPTS[1])
    with LLM(path, **OPTIONS) as llm:
        (output,) = llm.generate([ids], SamplingParams(prompt_logprobs=0, max_tokens=1))
    found = [at[token].logprob for token, at in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
    expected = jax.nn.log_softmax(forward(checkpoint, floats(params), ids))[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_an_orbax_checkpoint_gives_the_same_tokens(path, tmp_path):
    write(open_checkpoint(path), tmp_path / "orbax")
    found = []
    for source in (path, tmp_path / "orbax"):
        with LLM(source, topology="both=1xtp2", **OPTIONS) as llm:
            found.append(token_ids(llm.generate(PROMPTS, greedy(16))))
    assert found[0] == found[1]


def test_the_command_says_what_stays_quantised(path, capsys):
    arguments = ["--model", str(path), "--max-model-len", "64", "--prompt", "the", "--max-tokens", "2"]
    assert main(["generate", *arguments, "--dtype", "float32", "--quantization", "keep"]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("weights: "))
    assert "3 Q8_0 (" in line
    assert "; activations and KV: float32" in line


@pytest.mark.parametrize("name", ["q4_0", "", "None", True])
def test_an_unknown_quantization_is_one_sentence(path, name):
    with pytest.raises(ValueError, match=r"^quantization=.* is not usable: use one of auto, keep, none; or, [^.]*\.$"):
        LLM(path, quantization=name)


def test_none_runs_them_as_floats_and_takes_floats(path):
    with LLM(path, **(OPTIONS | {"quantization": "none"})) as llm:
        assert llm.config.formats == ()
        llm.update_params({UP: np.zeros((256, 512), np.float32)})
        assert llm.generate("a", SamplingParams(max_tokens=2, temperature=0))[0].outputs[0].token_ids


def test_activations_of_8_bits_stay_near_the_floats(path, model):
    """Kernels round activations where there are any; XLA does not."""
    checkpoint, params = model
    ids = checkpoint.tokenizer().encode(PROMPTS[1])
    with LLM(path, **(OPTIONS | {"activations": "int8"})) as llm:
        (output,) = llm.generate([ids], SamplingParams(prompt_logprobs=0, max_tokens=1))
    found = [at[token].logprob for token, at in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
    expected = jax.nn.log_softmax(forward(checkpoint, floats(params), ids))[np.arange(len(ids) - 1), ids[1:]]
    assert np.abs(np.array(found) - expected).mean() < 0.1
