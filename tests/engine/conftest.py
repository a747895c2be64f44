"""Engines over the tiny model."""

import pytest


@pytest.fixture(scope="session")
def make_llm(tiny_path):
    """An engine with few, small buckets, so that it starts in a second or two."""
    from twinmesh import LLM

    def make(topology="prefill=1,decode=1", **changes):
        options = dict(
            max_model_len=128, page_size=16, max_num_seqs=4, prefill_buckets=(16, 64), decode_buckets=(1, 4),
            kv_cache_bytes=4 << 20, dtype="float32",
        )  # fmt: skip
        return LLM(tiny_path, topology=topology, **(options | changes))

    return make


@pytest.fixture
def host_reads(monkeypatch):
    """Shapes of the device arrays whose values the host reads."""
    from jax._src.array import ArrayImpl

    shapes, value = [], ArrayImpl._value  # noqa: SLF001 (JAX's own: it has no public hook on reads)

    def reading(self):
        shapes.append(self.shape)
        return value.fget(self)

    monkeypatch.setattr(ArrayImpl, "_value", property(reading))  # JAX's, as above
    return shapes
