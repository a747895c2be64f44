"""Rules of the hardware that the interpreter does not know, read off the traced kernels."""

import math

import jax
import jax.numpy as jnp
import pytest
from twinmesh.kernels_pallas import decode, prefill
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.tiles import DecodeTiles, PrefillTiles

LANDING = 128  # bytes in shared memory, where a tensor copy may land
SMALLEST = 16  # bytes of a copy, and what its place in either memory is a multiple of


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


def bytes_copied(copy):
    """Of the part of shared memory that a copy reads or writes."""
    into = copy.primitive.name == "copy_gmem_to_smem"
    buffer, tree = copy.invars[int(into)].aval, copy.params[f"{'dst' if into else 'src'}_transforms_treedef"]
    if not tree.num_leaves and not tree.unflatten([]):
        return buffer.size * buffer.dtype.itemsize
    indexer = tree.unflatten([0] * tree.num_leaves)[-1]
    return math.prod(indexer.get_indexer_shape()) * buffer.dtype.itemsize


@pytest.mark.parametrize(("group", "head_dim", "page_size"), [(1, 64, 16), (4, 128, 64), (16, 256, 128)])
@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_copies_are_of_sizes_and_to_places_that_the_copy_engine_takes(kernel, group, head_dim, page_size):
    """Slices of a buffer lie a multiple of their size from its beginning, which is aligned to 1024 bytes."""

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
    for name, unit in (("copy_gmem_to_smem", LANDING), ("copy_smem_to_gmem", SMALLEST)):
        sizes = [bytes_copied(copy) for copy in copies(traced.jaxpr, name)]
        assert len(sizes) >= 3
        assert not [size for size in sizes if size % unit]
