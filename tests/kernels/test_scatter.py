"""write_rows: what it writes, what it leaves alone, and that a donated array stays where it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twinmesh.kernels_pallas.scatter import add_to_rows, write_rows


def drawn(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("index", [[4, 0, 2], [3], [5], [0, 5, 2**31 - 1, 5]], ids=["many", "one", "none", "padded"])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_land_where_they_are_sent_and_those_past_the_end_nowhere(index, axis):
    target = drawn(5, 5, 3)
    rows = np.moveaxis(-drawn(len(index), 5, 3), 0, axis)
    got = jax.jit(lambda *a: write_rows(*a, axis=axis))(target, np.int32(index), rows)
    want = np.moveaxis(target.copy(), axis, 0)
    for at, row in zip(index, np.moveaxis(rows, axis, 0), strict=True):
        if at < 5:
            want[at] = row
    np.testing.assert_array_equal(got, np.moveaxis(want, 0, axis))


@pytest.mark.parametrize("places", [[(1, 2), (0, 3), (4, 0)], [(2, 1)], [(4, 1)], [(0, 4)]])
def test_several_indices_name_one_element_each(places):
    target, rows = drawn(4, 4, 2), -drawn(len(places), 2)
    got = jax.jit(write_rows)(target, tuple(np.int32(x) for x in zip(*places, strict=True)), rows)
    want = target.copy()
    for place, row in zip(places, rows, strict=True):
        if max(place) < 4:
            want[place] = row
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("index", [[4, 0], [3], [5, 1]], ids=["many", "one", "padded"])
def test_added_rows_are_the_sum_of_both(index):
    target, rows = drawn(5, 3), drawn(len(index), 3) + 1
    got = jax.jit(add_to_rows)(target, np.int32(index), rows)
    want = target.copy()
    for at, row in zip(index, rows, strict=True):
        if at < 5:
            want[at] += row
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("write", [write_rows, add_to_rows])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_donated_array_is_written_in_place(write, count, axis):
    target, index = jnp.zeros((64, 64, 256)), np.arange(count, dtype=np.int32)
    rows = np.ones((count, 64, 256) if axis == 0 else (64, count, 256), np.float32)
    step = jax.jit(lambda *a: write(*a, axis=axis), donate_argnums=0).lower(target, index, rows).compile()
    assert step.memory_analysis().temp_size_in_bytes < target.nbytes / 4
    address = target.unsafe_buffer_pointer()
    assert step(target, index, rows).unsafe_buffer_pointer() == address
