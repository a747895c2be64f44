"""What the kernels' own code puts into which register of which thread: it is run with numpy in the place of MLIR.

The interpreter does not know such code. Which elements a thread has of an array in a layout follows from the layout.
"""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from twinmesh.kernels_pallas import fragments
from twinmesh.kernels_pallas.block_tiles import LAYOUTS, Tiles, dequantize, pack_scales, pack_values
from twinmesh.kernels_pallas.formats.hopper import HOPPER_FORMATS

THREADS = 128
BITS = {"uint32": np.uint32, "float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}


def elements(layout, shape):
    """The flat indices of the elements that a thread has, [threads, registers, vector], from the tiling."""
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead = index.ndim - len(tile)
        split = [part for size, unit in zip(index.shape[lead:], tile, strict=True) for part in (size // unit, unit)]
        index = index.reshape(*index.shape[:lead], *split)
        outer, inner = range(lead, index.ndim, 2), range(lead + 1, index.ndim, 2)
        index = index.transpose(*range(lead), *outer, *inner)
    split = [d for d in (*layout.warp_dims, *layout.lane_dims) if isinstance(d, int)]
    index = np.moveaxis(index, [*split, layout.vector_dim], [*range(len(split)), -1])
    sizes = [index.shape[i] for i in range(len(split))]
    index = index.reshape(*sizes, -1, index.shape[-1])
    for at, dim in enumerate((*layout.warp_dims, *layout.lane_dims)):
        if not isinstance(dim, int):  # threads that have the same
            index = np.repeat(np.expand_dims(index, at), dim.times, axis=at)
    return index.reshape(THREADS, -1, index.shape[-1])


def registers_of(array, layout):
    """The registers of an array in a layout, each a vector for every thread, as `FragmentedArray` has them."""
    at = elements(layout, array.shape)
    made = np.empty(at.shape[1], object)
    made[:] = [array.reshape(-1)[at[:, i]] for i in range(at.shape[1])]
    return SimpleNamespace(registers=made)


class Vector(SimpleNamespace):
    """`jax.extend.mlir.dialects.vector`, of vectors [threads, n]."""

    extract = staticmethod(lambda x, _, at: x[:, at[0]])
    bitcast = staticmethod(lambda kind, x: x.view(BITS[kind[1]]))
    broadcast = staticmethod(lambda kind, x: np.repeat(np.asarray(x)[:, None], kind[0], axis=1))
    from_elements = staticmethod(lambda _, parts: np.stack(parts, axis=1))


class Arith(SimpleNamespace):
    """`jax.extend.mlir.dialects.arith`."""

    constant = staticmethod(lambda _, x: np.full(THREADS, x, np.uint32 if isinstance(x, int) else np.float32))
    andi, ori, muli, shrui = (staticmethod(f) for f in (np.bitwise_and, np.bitwise_or, np.multiply, np.right_shift))
    mulf, subf, addf = (staticmethod(f) for f in (np.multiply, np.subtract, np.add))
    extui = extf = truncf = staticmethod(lambda kind, x: x.astype(BITS[kind[1] if isinstance(kind, tuple) else kind]))
    bitcast = staticmethod(lambda kind, x: x.view(BITS[kind]))


@pytest.fixture
def numpy_code(monkeypatch):
    monkeypatch.setattr(fragments, "arith", Arith)
    monkeypatch.setattr(fragments, "vector", Vector)
    monkeypatch.setattr(fragments, "i32", lambda: "uint32")
    monkeypatch.setattr(fragments, "f32", lambda: "float32")
    monkeypatch.setattr(fragments, "vector_of", lambda size, kind: (size, kind))
    monkeypatch.setattr(fragments, "integer", lambda value: np.full(THREADS, value, np.uint32))
    monkeypatch.setattr(fragments, "number_of", lambda one: one[:, 0].astype(np.float32))
    monkeypatch.setattr(fragments.Code, "kind", property(lambda self: "bfloat16" if self.is_wide else "float16"))
    made = lambda _registers, _layout, _is_signed: SimpleNamespace(registers=_registers)  # noqa: E731
    kept = SimpleNamespace(WGMMA_LAYOUT=mgpu.WGMMA_LAYOUT, FragmentedArray=made)
    monkeypatch.setattr(fragments, "mgpu", kept)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", HOPPER_FORMATS)
def test_each_register_gets_the_weights_of_its_place(numpy_code, name, dtype):
    rng, layout = np.random.default_rng(0), LAYOUTS[name]
    values = pack_values(rng.integers(0, 1 << layout.bits, (64, 32), np.uint8), layout.bits)
    if layout.codes:
        scales = rng.integers(*((1, 254) if dtype == "bfloat16" else (105, 139)), (64, 1), np.uint8)
    else:
        scales = rng.uniform(-1, 1, (64, 1)).astype(layout.scale_dtype)
    mins = pack_scales(rng.uniform(-1, 1, (64, 1)).astype(layout.scale_dtype)) if layout.has_mins else None
    tiles = Tiles(values, pack_scales(scales), mins)
    want = np.asarray(fragments.ordered(dequantize(name, tiles))).astype(dtype)

    code = fragments.Code(jnp.dtype(dtype), layout.zero)
    lies = fragments.VALUES[layout.bits].to_mgpu(), fragments.SCALES.to_mgpu()
    arrays = [registers_of(values.reshape(4, -1, 256).squeeze(), lies[0])]
    arrays += [registers_of(part[:, 0], lies[1]) for part in tiles[1:] if part is not None]
    made = fragments.in_registers(code.codes if layout.codes else code.numbers, layout.bits)(None, *arrays)
    at = elements(plgpu.Layout.WGMMA.to_mgpu(), (64, 32))
    for register, place in zip(made.registers.reshape(-1), at.transpose(1, 0, 2), strict=True):
        np.testing.assert_array_equal(register.astype(np.float32), want.reshape(-1)[place].astype(np.float32))


def test_the_order_of_inputs_is_a_permutation_of_each_half_block():
    order = np.asarray(fragments.ordered(jnp.arange(64)))
    assert sorted(order[:16]) == list(range(16))
    np.testing.assert_array_equal(order[16:32], order[:16] + 16)
    np.testing.assert_array_equal(order[32:], order[:32] + 32)
