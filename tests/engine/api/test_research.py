"""Hidden states, logits, embeddings and parameters of running engines, against transformers and dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twinmesh.models
from helpers.quantized import write_quantized
from helpers.tiny_files import FIXTURES, expected, write_tiny_directory
from twinmesh import LLM, EngineError, PoolingParams, SamplingParams
from twinmesh.engine.api.research import local

OPTIONS = dict(
    topology="prefill=1,decode=1", max_model_len=128, page_size=16, max_num_seqs=4, prefill_buckets=(16, 64),
    decode_buckets=(1, 4), kv_cache_bytes=4 << 20, dtype="float32",
)  # fmt: skip
RANDOM = np.random.RandomState(0)
# More than one wave and step, chunks of one prompt in several steps, and a prompt of one token.
PROMPTS = [RANDOM.randint(5, 200, length).tolist() for length in (1, 17, 100, 60, 3, 30, 2, 2, 2, 90, 5)]


@pytest.fixture(scope="module")
def llm(tiny_path):
    with LLM(tiny_path, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def model(tiny_path):
    return twinmesh.models.load(tiny_path)


@pytest.fixture(scope="module")
def dense(model):
    """`dense(prompt)` -> hidden states [3, n, E] after the embeddings, the first layer and the last one."""
    states = jax.jit(lambda params, tokens: model.hidden_states(params, tokens, (0, 1, -1)))

    def of(prompt, params=model.params):
        return np.asarray(states(params, jnp.asarray(np.pad(prompt, (0, 100 - len(prompt))))))[:, : len(prompt)]

    return of


def test_hidden_states_are_those_of_dense_attention_however_prompts_are_packed(llm, model, dense):
    found = llm.hidden_states(PROMPTS, layers=[0, 1, -1])
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert (one.prompt_token_ids, one.positions) == (prompt, list(range(len(prompt))))
        assert one.layers == (0, 1, model.config.num_layers)
        assert one.states.dtype == np.float32
        np.testing.assert_allclose(one.states, dense(prompt), atol=1e-3)


def test_positions_are_counted_from_either_end(llm, dense):
    (one,) = llm.hidden_states([PROMPTS[1]], positions=[-1, 3])
    assert one.positions == [16, 3]
    np.testing.assert_allclose(one.states[0], dense(PROMPTS[1])[-1][[16, 3]], atol=1e-3)


def test_logits_are_those_that_sampling_takes(llm):
    prompts = ["the sea", PROMPTS[2]]
    for one, output in zip(
        llm.logits(prompts), llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1)), strict=True
    ):
        assert one.logits.shape[0] == 1
        assert int(one.logits[0].argmax()) == output.outputs[0].token_ids[0]
    (score,) = llm.score([PROMPTS[2][:20]], [PROMPTS[2][20:]])
    (every,) = llm.logits([PROMPTS[2]], positions=None)  # in blocks of 64
    shifted = every.logits - np.logaddexp.reduce(every.logits, axis=-1, keepdims=True)
    wanted = shifted[np.arange(19, 99), PROMPTS[2][20:]]
    np.testing.assert_allclose(score.logprobs, wanted, atol=1e-4)


def test_embeddings_have_the_shape_of_vllm(llm, dense):
    states = dense(PROMPTS[3])[-1]
    for pooling, wanted in {"last": states[-1], "mean": states.mean(0), "cls": states[0]}.items():
        (plain,) = llm.embed([PROMPTS[3]], pooling=pooling, normalize=False)
        (unit,) = llm.embed([PROMPTS[3]], pooling=pooling)
        assert plain.outputs.hidden_size == len(wanted)
        assert plain.prompt_token_ids == PROMPTS[3]
        np.testing.assert_allclose(plain.outputs.embedding, wanted, atol=1e-3)
        np.testing.assert_allclose(unit.outputs.embedding, wanted / np.linalg.norm(wanted), atol=1e-3)


def test_an_embedding_is_cut_and_then_divided_by_its_length_as_vllms_parameters_say(llm, dense, capsys):
    whole, prompts = dense(PROMPTS[3])[-1][-1], [PROMPTS[3], PROMPTS[3]]
    params = [PoolingParams(dimensions=4), PoolingParams(use_activation=False)]
    cut, plain = (one.outputs.embedding for one in llm.embed(prompts, pooling_params=params, use_tqdm=True))
    np.testing.assert_allclose(cut, whole[:4] / np.linalg.norm(whole[:4]), atol=1e-3)
    np.testing.assert_allclose(plain, whole, atol=1e-3)
    (same,) = llm.embed([PROMPTS[3]], pooling_params=params[0], lora_request=None)
    assert same.outputs.embedding == cut


def test_nothing_is_compiled_for_engines_that_do_not_ask(tiny_path):
    with LLM(tiny_path, **OPTIONS) as llm:
        llm.generate(PROMPTS[:2], SamplingParams(max_tokens=2))
        assert llm.metrics().compiles == 0
        llm.embed(PROMPTS[:1])
        compiled = llm.metrics().compiles
        assert compiled > 0
        llm.embed(PROMPTS[:1])
        assert llm.metrics().compiles == compiled
    with pytest.raises(EngineError, match="closed"):
        llm.embed(PROMPTS[:1])


def test_parameters_that_were_replaced_are_those_of_hidden_states(tiny_path, model, dense):
    with LLM(tiny_path, **OPTIONS) as llm:
        zeros = np.zeros(llm.parameters()["layers.0.mlp.down_proj"].shape, np.float32)
        llm.update_params({"layers.0.mlp.down_proj": zeros})
        (one,) = llm.hidden_states([PROMPTS[1]])
    changed = model.params | {"layers.0.mlp.down_proj": jnp.asarray(zeros)}
    np.testing.assert_allclose(one.states[0], dense(PROMPTS[1], changed)[-1], atol=1e-3)


def test_requests_that_run_meanwhile_are_what_they_were(llm):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    wanted = llm.generate("the sea", params)[0].outputs[0].token_ids
    llm.add_request("x", "the sea", params)
    llm.hidden_states(PROMPTS)
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert list(outputs[-1].outputs[0].token_ids) == list(wanted)


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("gemma3", "both=1xtp2"),
        ("gpt_oss", "both=1"),
        ("mixtral", "both=1xtp2"),
        ("llama3", "prefill=1xtp2,decode=1"),
        ("qwen3", "both=1"),
    ],
)
@pytest.mark.long
def test_families_have_the_states_and_embeddings_of_transformers(tmp_path, name, topology):
    fixture, ids = np.load(FIXTURES / "hidden_states.npz"), expected(name)["ids"]
    with LLM(write_tiny_directory(tmp_path / name, name), **(OPTIONS | dict(topology=topology))) as llm:
        (one,) = llm.hidden_states([ids], layers=[0, 1, -1], positions=[0, 7, 39])
        (mean,) = llm.embed([ids], pooling="mean", normalize=False)
        (logits,) = llm.logits([ids], positions=[5, -1])
    np.testing.assert_allclose(one.states, fixture[name], atol=1e-3)
    np.testing.assert_allclose(mean.outputs.embedding, fixture[f"{name}_mean"], atol=1e-3)
    np.testing.assert_allclose(logits.logits, expected(name)["logits"][[5, -1]], atol=1e-3)


@pytest.mark.long
def test_quantised_weights_and_pages_of_8_bits_are_read_as_they_are(tmp_path):
    path = write_quantized(tmp_path / "q.gguf")
    floats, prompt = twinmesh.models.load(path), PROMPTS[1]
    options = OPTIONS | dict(topology="both=1", kv_cache_dtype="fp8", activations="float")
    with LLM(path, **options) as llm:
        assert llm.parameters()["embedding.weight"].dtype == "Q8_0"
        (one,) = llm.hidden_states([prompt])
    wanted = np.asarray(floats.hidden_states(floats.params, jnp.asarray(prompt)))
    np.testing.assert_allclose(one.states, wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda llm: llm.hidden_states("a", layers=[99]), r"layers holds 99: give numbers from 0"),
        (lambda llm: llm.hidden_states("a", layers=[]), r"layers=\[\] names none"),
        (lambda llm: llm.hidden_states([[5, 6]], positions=[2]), r"positions holds 2: a prompt of 2 tokens has 0 to 1"),
        (lambda llm: llm.logits("a", positions=[]), r"positions=\[\] names none"),
        (lambda llm: llm.logits(""), "prompt is empty"),
        (lambda llm: llm.embed([[5] * 128]), "128 tokens"),
        (lambda llm: llm.embed("a", pooling="max"), "pooling='max' is not usable: give one of mean, last, cls"),
        (lambda llm: llm.embed("a", pooling_params=PoolingParams(dimensions=9999)), "dimensions=9999 is not usable"),
        (lambda llm: llm.embed("a", pooling_params=[PoolingParams()] * 2), "1 prompts and 2 pooling_params"),
        (lambda llm: llm.embed("a", pooling_params={"dimensions": 3}), "pooling_params of type dict are not usable"),
        (lambda llm: PoolingParams(dimensions=0), "dimensions=0 is not usable: it must be a whole number, 1 or more"),
        (lambda llm: PoolingParams(use_activation="yes"), "use_activation='yes' is not usable"),
    ],
)
def test_what_cannot_be_computed_is_refused(llm, call, says):
    with pytest.raises(ValueError, match=says):
        call(llm)


def test_an_engine_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"^embed needs the model's parameters in this process"):
        local(object(), "embed")
