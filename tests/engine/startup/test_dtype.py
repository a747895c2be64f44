"""Which dtype an engine runs in."""

import jax.numpy as jnp
import pytest
from helpers.core_engine import model_with_windows
from twinmesh.engine.startup import dtype as dtypes
from twinmesh.engine.startup.dtype import choose_dtype, parse_dtype, speed_of_bfloat16

MODEL = model_with_windows(None)
GEMMA = model_with_windows(None, fits_float16=False)


def choose(asked="auto", model=MODEL, stored="float32", platform="cuda", max_num_seqs=32, deterministic=False):
    options = dict(platform=platform, max_num_seqs=max_num_seqs, deterministic=deterministic)
    return choose_dtype(asked, model, stored, **options).name


@pytest.mark.parametrize("asked", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_what_was_asked_for_is_taken(asked):
    assert choose(asked, platform="cpu", max_num_seqs=1) == "bfloat16"


@pytest.mark.parametrize(
    ("stored", "model", "chosen"),
    [
        ("float32", MODEL, "bfloat16"),
        ("bfloat16", MODEL, "bfloat16"),
        ("float16", MODEL, "float16"),
        ("float16", GEMMA, "bfloat16"),
    ],
)
def test_a_gpu_runs_what_the_checkpoint_holds_in_sixteen_bits(stored, model, chosen):
    assert choose(model=model, stored=stored) == chosen


@pytest.mark.parametrize(
    ("speed", "max_num_seqs", "deterministic", "chosen"),
    [
        (2.0, 8, False, "bfloat16"),
        (2.0, 7, False, "float32"),
        (2.0, 8, True, "float32"),
        (1.1, 32, False, "float32"),
    ],
)
def test_a_cpu_runs_what_is_fastest_for_the_batch(monkeypatch, speed, max_num_seqs, deterministic, chosen):
    monkeypatch.setattr(dtypes, "speed_of_bfloat16", lambda rows: speed)
    assert choose(platform="cpu", max_num_seqs=max_num_seqs, deterministic=deterministic) == chosen


def test_the_speed_of_bfloat16_is_a_ratio():
    assert 0.01 < speed_of_bfloat16(8) < 100


def test_float16_is_refused_where_the_model_overflows_in_it():
    with pytest.raises(ValueError, match=r"float16.*llama: use bfloat16 or float32"):
        choose("float16", model=GEMMA)


@pytest.mark.parametrize("asked", ["int8", "int4x", "float64", object()])
def test_other_types_are_refused_by_name(asked):
    with pytest.raises(ValueError, match=r"dtype=.* is not supported: use one of auto, float32, bfloat16, float16\."):
        parse_dtype(asked)
