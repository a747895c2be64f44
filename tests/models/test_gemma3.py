"""The real Gemma 3 270M against transformers (see tests/make_family_fixtures.py). Skipped where it was not fetched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.decoder import abstract_params, bind, dense_hidden
from twinmesh.models.errors import CheckpointError


@pytest.fixture(scope="module")
def gemma3():
    try:
        return open_checkpoint(resolve_model("gemma3-270m"))
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def expected(fixtures):
    return np.load(fixtures / "gemma3_logits.npz")


@pytest.fixture(scope="module")
def logits(gemma3, expected):
    """`logits(ids, rows)` -> [rows, V]: the vocabulary is too large for those of every position."""
    graphdef, _ = abstract_params(gemma3.config, jnp.float32)
    params = tuple(load_on_one_device(gemma3, "float32").values())
    length, count = len(expected["ids"]), len(expected["rows"])

    @jax.jit
    def forward(params, ids, rows):
        decoder = bind(graphdef, params)
        return decoder.logits(dense_hidden(decoder, ids)[rows])

    def at(ids, rows):
        padded = np.pad(np.asarray(ids, np.int32), (0, length - len(ids)))
        return np.asarray(forward(params, padded, np.resize(np.asarray(rows, np.int32), count)))[: len(rows)]

    return at


def test_logits_on_both_sides_of_the_window_equal_those_of_transformers(gemma3, logits, expected):
    assert {layer.window for layer in gemma3.config.layers} == {512, None}
    assert expected["rows"][-1] > 512
    found = logits(expected["ids"], expected["rows"])
    np.testing.assert_allclose(found[:, expected["columns"]], expected["column_logits"], atol=1e-3, rtol=0)
    top = np.take_along_axis(found, expected["top_ids"], axis=-1)
    np.testing.assert_allclose(top, expected["top_logits"], atol=1e-3, rtol=0)
    np.testing.assert_array_equal(found.argmax(-1), expected["top_ids"][:, 0])


def test_photosynthesis(gemma3, logits, expected):
    ids, answer = expected["question_ids"].tolist(), expected["answer_ids"].tolist()
    rows = range(len(ids) - 1, len(ids) + len(answer) - 1)
    assert logits(ids + answer, rows).argmax(-1).tolist() == answer


def test_facts(gemma3):
    config = gemma3.config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (18, 640, 2048)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 1, 256, 262144)
    assert [i for i, layer in enumerate(config.layers) if layer.window is None] == [5, 11, 17]
    assert [layer.rope.theta for layer in config.layers[4:6]] == [1e4, 1e6]
    assert config.tie_embeddings
