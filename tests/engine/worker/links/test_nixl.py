"""NIXL between two processes, on memory of the host: run where it is installed.

pip install 'twinmesh[nixl]' && pytest -m long tests/engine/worker/links/test_nixl.py
"""

import jax
import jax.numpy as jnp
import pytest
from helpers.link_process import LinkProcess
from helpers.staged import mesh_on, staged
from twinmesh.engine.worker.links.link import LinkError
from twinmesh.engine.worker.links.parcels import offer_staging

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def link():
    pytest.importorskip("nixl", reason="the extra `nixl` is not installed")
    from twinmesh.engine.worker.links.nixl import NixlLink

    made = NixlLink()
    yield made
    made.close()


@pytest.fixture(scope="module")
def other(link):
    process = LinkProcess()
    yield process
    process.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("source_tp", "tp", "kv_heads"), [(1, 1, 2), (2, 4, 4), (4, 2, 4), (4, 1, 1)])
def test_a_staging_arrives_bit_for_bit_on_a_mesh_of_any_size(link, other, source_tp, tp, kv_heads, dtype):
    source = mesh_on(4, source_tp)
    staging, route = staged(kv_heads, source, tp, dtype)
    offer = offer_staging(link, staging, source, route)
    assert other.call("fetch", offer, kv_heads, source_tp, tp, dtype) is None
    link.release(offer.uuid)
    other.call("drop")


def test_an_offer_that_was_withdrawn_is_refused_though_its_memory_can_be_read(link, other):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    offer = other.call("offer", "nixl", 7.0, 1000)
    (array,) = link.fetch(offer, [jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=place)], 60.0)
    assert float(array[999]) == 7
    other.call("let_go", "nixl", offer.uuid, False)
    with pytest.raises(LinkError, match="was withdrawn"):
        link.fetch(offer, [jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=place)], 60.0)
    assert other.call("held", "nixl") == 0
