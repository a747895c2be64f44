"""Sampling behind a step: a row's tokens and scores are the same bits whatever the step's other rows ask for."""

import jax
import numpy as np
import pytest
from helpers.tiny_mesh import GREEDY, VOCABULARY, tiny_config, tiny_machines
from twinmesh.engine.protocol.actions import Decode, Fused, Prefill
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.worker import mesh_worker
from twinmesh.engine.worker.mesh_worker import Dispatched

PROBES = {
    "greedy": GREEDY,
    "drawn": SamplingPlan(temperature=1.3, seed=4),
    "cut": SamplingPlan(temperature=1.0, seed=5, top_p=0.8, top_k=20),
    "adjusted": SamplingPlan(temperature=1.0, seed=6, min_p=0.01, repetition_penalty=1.4, frequency_penalty=0.2),
    "scored": SamplingPlan(temperature=0.0, seed=7, logprobs=2),
}
OTHERS = {
    "greedy": [GREEDY] * 3,
    "mixed": [
        SamplingPlan(temperature=0.8, seed=1, top_p=0.7),
        SamplingPlan(temperature=0.0, seed=0, presence_penalty=1.0, logprobs=0),
        SamplingPlan(temperature=2.0, seed=2, top_k=3, min_p=0.05),
    ],
    "drawn": [SamplingPlan(temperature=1.0, seed=9)] * 3,
}
BUCKETS = (1, 2, 4)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def make(request):
    config = tiny_config(
        "both(mode=fused)=1", dtype=request.param, prefill_buckets=(8, 16), decode_buckets=BUCKETS, decode_steps=2
    )
    machines = tiny_machines(config)
    return lambda: machines()[0]


def prompt(seed, length=5):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def read(dispatched):
    """Tokens and scores of the first row."""
    tokens, scores, _ = dispatched.to_host()
    return tokens[:, 0].tolist(), None if scores is None else jax.tree.map(lambda x: x[:, 0].tolist(), scores)


class Steps:
    """A mesh with a probe in its first row and other requests beside it; what each step gives the probe."""

    def __init__(self, mesh, probe, others):
        self.mesh, self.kv_len, self.seen = mesh, 5, []
        self.names = ["probe", *(f"other {index}" for index in range(len(others)))]
        for index, (name, plan) in enumerate(zip(self.names, (probe, *others), strict=True)):
            mesh.place(name, prompt(index), plan, pages=4)

    def run(self, step, action):
        self.seen.append(read(step(action, self.mesh.records)))

    def prefill(self, bucket):
        chunks = tuple(self.mesh.chunk(name, 0, 5) for name in self.names[: bucket // 5])
        self.run(self.mesh.worker.prefill, Prefill(0, 1, bucket, chunks))

    def decode(self, bucket, steps=1):
        rows = tuple(self.mesh.row(name, self.kv_len + 1) for name in self.names[:bucket])
        self.kv_len += steps
        self.run(self.mesh.worker.decode, Decode(0, 1, bucket, steps, rows))


def steps_of(make, probe, others):
    """A probe's tokens and scores of every kind of step, by bucket."""
    found = []
    for bucket in BUCKETS:
        run = Steps(make(), probe, others[: bucket - 1])
        run.prefill(16 if bucket > 1 else 8)
        for name in run.names[3:]:  # more than a prefill step has rows for
            run.mesh.prefill(run.mesh.chunk(name, 0, 5))
        run.decode(bucket)
        run.decode(bucket)
        run.decode(bucket, steps=2)
        found.append(run.seen)
    return found


@pytest.mark.parametrize("probe", PROBES)
def test_a_row_gives_the_same_bits_whatever_the_others_ask_for(make, probe):
    """In every bucket. Scores would show a logit that differs in its last bit."""
    plan = PROBES[probe]
    want = steps_of(make, plan, OTHERS["greedy"])
    for others in ("mixed", "drawn"):
        got = steps_of(make, plan, OTHERS[others])
        for expected, seen in zip(want, got, strict=True):
            assert [tokens for tokens, _ in seen] == [tokens for tokens, _ in expected]
            if plan.logprobs is not None:
                assert seen == expected


@pytest.mark.parametrize("probe", PROBES)
def test_a_fused_step_gives_the_same_bits_whatever_its_chunks_ask_for(make, probe):
    seen = []
    for others in OTHERS.values():
        run = Steps(make(), PROBES[probe], others[:1])
        run.mesh.prefill(run.mesh.chunk("probe", 0, 5))
        chunk = run.mesh.chunk("other 0", 0, 5)
        tokens, scores, _ = run.mesh.worker.fused(
            Fused(0, 1, 8, (chunk,), (run.mesh.row("probe", 6),)), run.mesh.records
        ).to_host()
        seen.append((tokens[:, 1].tolist(), scores and jax.tree.map(lambda x: x[:, 1].tolist(), scores)))
    assert all(tokens == seen[0][0] for tokens, _ in seen)
    if PROBES[probe].logprobs is not None:
        assert all(scores == seen[0][1] for _, scores in seen)


def test_a_step_takes_the_most_likely_tokens_of_the_logits_that_it_returns(make):
    mesh = make()
    for index in range(3):
        mesh.place(index, prompt(index))
    worker = mesh.worker
    inputs = worker.inputs.prefill(16, tuple(mesh.chunk(index, 0, 5) for index in range(3)), mesh.records)
    worker.state, passed, _ = worker.programs.prefill[16](worker.params, worker.state, inputs)
    np.testing.assert_array_equal(passed.tokens, np.asarray(passed.logits).argmax(-1))
    for bucket in BUCKETS:
        rows = tuple(mesh.row(index, 6) for index in range(min(bucket, 3)))
        worker.state, passed = worker.programs.decode[bucket](
            worker.params, worker.state, worker.inputs.decode(bucket, 1, rows, mesh.records)
        )
        np.testing.assert_array_equal(passed.tokens, np.asarray(passed.logits).argmax(-1))


def test_only_the_stages_that_a_row_needs_are_dispatched(make, monkeypatch):
    mesh, dispatched = make(), []
    sample = mesh.worker.programs.sample

    class Counting(dict):
        def __getitem__(self, key):
            dispatched.append(str(key[0]))
            return sample[key]

    monkeypatch.setattr(mesh.worker.programs, "sample", Counting(sample))
    for index, plan in enumerate([GREEDY, SamplingPlan(temperature=1.0, seed=1, top_p=0.5), PROBES["scored"]]):
        mesh.place(index, prompt(index), plan)
    mesh.prefill(mesh.chunk(1, 0, 3, is_last=False), mesh.chunk(0, 0, 5))
    assert dispatched == []  # the prompt of the one that needs any is not over
    mesh.prefill(mesh.chunk(1, 3, 2), mesh.chunk(2, 0, 5))
    assert set(dispatched) == {"top_p", "draw", "score"}
    dispatched.clear()
    mesh.decode(mesh.row(0, 6))
    assert dispatched == []
    mesh.decode(mesh.row(0, 7), mesh.row(2, 6), steps=2)
    assert dispatched == ["score", "score"]


def test_what_is_read_starts_for_the_host_at_dispatch_and_nothing_else_is_waited_for(make, monkeypatch):
    mesh, started = make(), []
    real = Dispatched.__post_init__

    def starting(self):
        started.append([x.shape for x in jax.tree.leaves(self.arrays)])
        real(self)

    monkeypatch.setattr(mesh_worker.Dispatched, "__post_init__", starting)
    for index, plan in enumerate([GREEDY, PROBES["scored"]]):
        mesh.place(index, prompt(index), plan)
    mesh.prefill(mesh.chunk(0, 0, 5))
    mesh.decode(mesh.row(0, 6))
    mesh.decode(mesh.row(0, 7), steps=2)
    assert started == [[(3,)], [(1,)], [(2, 1)]]
    mesh.prefill(mesh.chunk(1, 0, 5))
    assert started[-1] == [(3,), (3,), (3,), (3, 20), (3, 20)]
