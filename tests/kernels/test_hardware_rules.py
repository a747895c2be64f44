"""Rules of the hardware that the interpreter does not know, read off the traced kernels."""

import math

import jax
import jax.numpy as jnp
import pytest
from twinmesh.kernels_pallas import decode, prefill
from twinmesh.kernels_pallas.arguments import AttentionOptions, PagedKV
from twinmesh.kernels_pallas.tiles import DecodeTiles, PrefillTiles

ALIGNMENT = 128  # bytes in shared memory, where a tensor copy may land


def copies(jaxpr):
    """The copies into shared memory of a program, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "copy_gmem_to_smem":
            yield equation
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, list | tuple) else [parameter]:
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from copies(inner)


def bytes_copied(copy):
    target, tree = copy.invars[1].aval, copy.params["dst_transforms_treedef"]
    indexer = tree.unflatten([0] * tree.num_leaves)[-1]
    return math.prod(indexer.get_indexer_shape()) * target.dtype.itemsize


@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (128, 64), (256, 128)])
@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_copies_land_at_multiples_of_128_bytes(kernel, head_dim, page_size):
    """Slices of a buffer lie a multiple of their size from its beginning, which is aligned to 1024 bytes."""

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    pages = array(10, page_size, 2, head_dim, dtype=jnp.bfloat16)
    kv, options = PagedKV(pages, pages, array(4, 3), array(4)), AttentionOptions(0.1)
    q = array(256 if kernel == "prefill" else 4, 8, head_dim, dtype=jnp.bfloat16)
    if kernel == "prefill":
        tiles = PrefillTiles(128 if head_dim < 256 else 64, 2)
        traced = prefill.paged_prefill_attention.trace(q, kv, array(5), options, tiles=tiles, cores=132)
    else:
        traced = decode.paged_decode_attention.trace(q, kv, options, tiles=DecodeTiles(512, 2), cores=132)
    found = list(copies(traced.jaxpr))
    assert len(found) >= 3
    assert not [size for size in map(bytes_copied, found) if size % ALIGNMENT]
