"""Timing of the links between meshes, and what counts as a transfer through the host."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_mesh import tiny_config, tiny_plans
from twinmesh.engine.startup.links import Link, looks_staged, time_link, time_links, warn_if_staged
from twinmesh.engine.worker.kv_transfer import gather, padded, plan, staged_pages


@pytest.mark.parametrize(
    ("seconds", "seconds_to_return", "staged"),
    [(0.1, 0.09, True), (0.1, 0.001, False), (0.009, 0.009, False), (2.2, 2.2, True), (0.5, 0.2, False)],
)
def test_a_slow_transfer_whose_call_blocks_looks_staged(seconds, seconds_to_return, staged):
    assert looks_staged(Link(0, 1, 1 << 20, seconds, seconds_to_return)) == staged


def test_one_sentence_names_the_meshes_the_rate_and_the_remedy():
    with pytest.warns(
        UserWarning, match=r"from mesh 2 to mesh 3 .* \(0\.5 GB/s; the call took 900 of 1000 ms\): choose"
    ):
        warn_if_staged(Link(2, 3, 500_000_000, 1.0, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_staged(Link(2, 3, 500_000_000, 1.0, 0.001))


def test_the_fastest_transfer_counts_and_the_first_never_does():
    # Start, return and arrival of each: the first would be the fastest, the third of the others is.
    times = iter([0.0, 0.1, 0.2, 1.0, 1.1, 5.0, 6.0, 6.1, 9.0, 10.0, 10.25, 11.0])
    sent = []

    def send(staging):
        sent.append(staging)
        return staging

    link = time_link(0, 1, lambda: (jnp.zeros(8, jnp.float32),), send, lambda: next(times))
    assert link == Link(0, 1, 32, 1.0, 0.25)
    assert link.rate == 32.0
    assert len(sent) == 4


class Gathering:
    """What `time_links` needs of a mesh executor: its plan, and a gather of pages that nobody holds."""

    def __init__(self, plan):
        self.plan, self.jitted = plan, jax.jit(gather, static_argnames=("mesh", "route"))
        self.state = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), plan.state))()

    def gather(self, action, destination_tp):
        assert (action.source_slot, action.source_pages) == (None, ((),))
        mesh, config = self.plan.mesh, self.plan.config
        route = plan(self.plan.model.num_kv_heads, mesh.size, destination_tp)
        pages = tuple(padded((), count, 0) for count in staged_pages(config, action.bucket))
        return self.jitted(self.state, pages, np.int32(config.max_num_seqs), mesh=mesh, route=route)


def test_every_pair_that_ends_in_a_decoding_mesh_is_timed():
    plans, _ = tiny_plans(tiny_config("prefill=1,decode=2xtp2"))
    ticks = iter(range(10_000))
    links = time_links([Gathering(plan) for plan in plans], lambda: float(next(ticks)))
    assert [(link.source, link.destination) for link in links] == [(0, 1), (2, 1), (0, 2), (1, 2)]
    assert {link.seconds for link in links} == {2.0}
    kv = 2 * 2 * 8 * 4 * 2 * 8 * 4  # k and v, layers, pages, page_size, heads, head_dim, float32
    assert all(kv < link.bytes < 2 * kv for link in links)
