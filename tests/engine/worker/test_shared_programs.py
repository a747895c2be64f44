"""Programs that engines of the tests share: the same for the same plan, and others once anything has been replaced."""

import jax
import pytest
from helpers.shared_programs import Counter, SharedPrograms
from helpers.tiny_mesh import tiny_config, tiny_plans
from twinmesh.engine.worker import kv_cache
from twinmesh.kernels_pallas import xla


def copy_page(**changes):
    """The smallest program, of an engine that starts now."""
    (plan,), _ = tiny_plans(tiny_config(**changes))
    return SharedPrograms()(plan, "copy_page", 0)


def test_engines_of_one_kind_have_the_same_program_and_of_another_kind_another():
    program = copy_page().compiled
    assert copy_page(prefix_cache=False).compiled is program
    assert copy_page(page_size=8).compiled is not program


@pytest.mark.parametrize(
    ("where", "name"), [(kv_cache, "copy_page"), (kv_cache.DeviceState, "_replace"), (xla, "DECODE_SPLITS")]
)
def test_what_a_test_replaces_is_in_its_own_programs_and_in_no_others(monkeypatch, where, name):
    before, program = copy_page(), copy_page().compiled
    with monkeypatch.context() as patch:
        patch.setattr(where, name, object())
        replaced = copy_page()
    assert replaced.key != before.key
    assert copy_page().compiled is program


def test_what_a_test_replaces_after_the_start_stays_with_its_engine(monkeypatch):
    (plan,), _ = tiny_plans(tiny_config(page_size=2))
    early, late = (SharedPrograms()(plan, "copy_page", 0) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(xla, "DECODE_SPLITS", object())
        replaced = early.compiled
    assert late.compiled is not replaced


def test_a_setting_of_jax_makes_other_programs():
    before = SharedPrograms()
    with jax.numpy_rank_promotion("raise"):  # which engines override
        assert SharedPrograms().surroundings == before.surroundings
    with jax.default_matmul_precision("highest"), jax.debug_key_reuse(True):
        assert SharedPrograms().surroundings != before.surroundings


def test_late_programs_are_no_compilations_and_all_else_is():
    counter = Counter()
    try:
        copy_page(page_size=16).compiled  # noqa: B018
        assert counter.count == 0
        jax.jit(lambda x: x * 5 + 2)(1.0)
        assert counter.count > 0
    finally:
        counter.close()
