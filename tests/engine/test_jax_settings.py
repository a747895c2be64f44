"""Settings of JAX that a process has chosen for itself change no token and stop no engine."""

import jax
import numpy as np
import pytest
from helpers.core_engine import make_engine, model_with_windows
from twinmesh import SamplingParams
from twinmesh.engine.worker.jax_settings import own_settings

MODEL = model_with_windows(None)
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6),
    SamplingParams(temperature=1, seed=3, max_tokens=6, logprobs=2),
    SamplingParams(temperature=1, seed=4, top_p=0.7, top_k=5, presence_penalty=1, max_tokens=6, n=2),
    SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1),
]
SETTINGS = [
    ("jax_threefry_partitionable", False),
    ("jax_default_prng_impl", "rbg"),
    ("jax_random_seed_offset", 7),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_enable_x64", True),
    ("jax_default_matmul_precision", "bfloat16"),
    ("jax_debug_nans", True),
    ("jax_disable_jit", True),
    ("jax_no_tracing", True),
    ("jax_transfer_guard", "disallow"),
]


def answers():
    with make_engine(MODEL, topology="prefill=1,decode=1") as llm:
        outputs = [llm.generate([5, 6, 7, 8, 9], params)[0] for params in PARAMS]
    tokens = [completion.token_ids for output in outputs for completion in output.outputs]
    return tokens, [{i: round(p.logprob, 4) for i, p in at.items()} for at in outputs[3].prompt_logprobs[1:]]


@pytest.fixture(scope="module")
def expected():
    return answers()


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_setting_of_the_process_changes_nothing(name, value, expected):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        assert answers() == expected
        assert getattr(jax.config, name) == value
    finally:
        jax.config.update(name, before)


def mesh_of(*shape, kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh(shape, ("x", "tp")[: len(shape)], axis_types=(kind,) * len(shape))


EXPLICIT = jax.sharding.AxisType.Explicit
CONTEXTS = {
    "a mesh": lambda: jax.set_mesh(mesh_of(2)),
    "a mesh of one device": lambda: jax.set_mesh(mesh_of(1)),
    "a mesh with the engine's axis": lambda: jax.set_mesh(mesh_of(2, 2)),
    "a mesh of all devices": lambda: jax.set_mesh(mesh_of(8)),
    "an explicit mesh": lambda: jax.set_mesh(mesh_of(2, kind=EXPLICIT)),
    "an abstract mesh": lambda: jax.sharding.use_abstract_mesh(mesh_of(2, kind=EXPLICIT).abstract_mesh),
    "another device": lambda: jax.default_device(jax.devices()[3]),
    "checks of leaks": jax.checking_leaks,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_of_the_calling_thread_changes_nothing(context, expected):
    with CONTEXTS[context]():
        before = jax.sharding.get_abstract_mesh()
        assert answers() == expected
        assert jax.sharding.get_abstract_mesh() == before


def test_the_settings_of_the_calling_thread_are_its_own_again():
    def drawn():
        return np.asarray(jax.random.uniform(jax.random.key(3), (3,))).tolist()

    with jax.threefry_partitionable(False), jax.numpy_rank_promotion("raise"):
        before = drawn()
        with own_settings():
            assert (jax.numpy.zeros((2, 2)) + jax.numpy.zeros(2)).shape == (2, 2)
            assert drawn() != before
        assert drawn() == before
        with pytest.raises(ValueError, match="rank_promotion"):
            jax.numpy.zeros((2, 2)) + jax.numpy.zeros(2)
