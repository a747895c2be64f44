"""Rules of the hardware that the interpreter does not know, read off the traced kernels."""

import math

import jax
import jax.numpy as jnp
import pytest
from twinmesh.kernels_pallas import decode, grouped_matmul, prefill
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.quantized import abstract
from twinmesh.kernels_pallas.tiles import DecodeTiles, PrefillTiles

PLACE = 128  # bytes that an address in shared memory is a multiple of, whichever way a tensor is copied
SIZE = 16  # bytes that the size of a copy is a multiple of; so is an address in global memory, which is not tested


def copies(jaxpr, name):
    """The copies into or out of shared memory of a program, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from copies(inner, name)


def shared(copy):
    """The buffer in shared memory of a copy, and the indexers of its part, in which traced indices are None."""
    is_source = copy.primitive.name == "copy_smem_to_gmem"
    tree = copy.params[f"{'src' if is_source else 'dst'}_transforms_treedef"]
    transforms = tree.unflatten([None] * tree.num_leaves)
    return copy.invars[0 if is_source else 1].aval, [t for t in transforms if hasattr(t, "get_indexer_shape")]


def bytes_copied(copy):
    buffer, indexers = shared(copy)
    return math.prod(indexers[-1].get_indexer_shape() if indexers else buffer.shape) * buffer.dtype.itemsize


def unit_of_place(copy):
    """Bytes that the part lies a multiple of behind its buffer's beginning; 0: it is there.

    As if rows followed each other; in a tile they are 128 bytes apart.
    """
    buffer, indexers = shared(copy)
    unit, strides = 0, None
    for indexer in indexers:
        if strides is None:
            strides = [math.prod(indexer.shape[i + 1 :]) * buffer.dtype.itemsize for i in range(len(indexer.shape))]
        left = []
        for index, stride in zip(indexer.indices, strides, strict=True):
            start = getattr(index, "start", index)
            unit = math.gcd(unit, stride if start is None else start * stride)
            left += [stride] if hasattr(index, "start") else []
        strides = left
    return unit


def check(traced):
    for name in ("copy_gmem_to_smem", "copy_smem_to_gmem"):
        found = list(copies(traced.jaxpr, name))
        assert len(found) >= 3
        assert not [size for copy in found if (size := bytes_copied(copy)) % SIZE]
        assert not [unit for copy in found if (unit := unit_of_place(copy)) % PLACE]


@pytest.mark.parametrize(("name", "rows", "inputs"), [("MXFP4", 4, 2880), ("Q8_0", 512, 1440), (None, 64, 192)])
def test_copies_of_experts_are_of_sizes_and_to_places_that_the_copy_engine_takes(name, rows, inputs):
    x, sizes = jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    like = (8, inputs, 192)
    w = abstract(name, like, 1, 1) if name else jax.ShapeDtypeStruct(like, jnp.bfloat16)
    check(grouped_matmul.grouped_matmul.trace(x, (w,), (), sizes, dtype=jnp.dtype("float32"), cores=132))


@pytest.mark.parametrize(("group", "head_dim", "page_size"), [(1, 64, 16), (4, 128, 64), (16, 256, 128)])
@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_copies_are_of_sizes_and_to_places_that_the_copy_engine_takes(kernel, group, head_dim, page_size):
    """Buffers begin at multiples of 1024 bytes."""

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    pages = array(10, page_size, 2, head_dim, dtype=jnp.bfloat16)
    kv, options = PagedKV(pages, pages, array(4, 3), array(4)), AttentionOptions(0.1)
    q = array(256 if kernel == "prefill" else 4, 2 * group, head_dim, dtype=jnp.bfloat16)
    if kernel == "prefill":
        tiles = PrefillTiles(128 if head_dim < 256 else 64, 2)
        traced = prefill.paged_prefill_attention.trace(q, kv, array(5), options, tiles=tiles, cores=132)
    else:
        traced = decode.paged_decode_attention.trace(q, kv, options, tiles=DecodeTiles(512, 2), cores=132)
    check(traced)
