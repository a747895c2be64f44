"""The step functions on a tiny model, against plain attention over the whole sequence. No engine."""

import jax
import numpy as np
import pytest
from helpers.tiny_mesh import GREEDY, VOCABULARY, greedy_tokens, tiny_config, tiny_machines, tiny_model
from twinmesh.engine.protocol.actions import CopyPage
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.sampling.request_state import Seen

MODEL = tiny_model()
FUSED = tiny_config("both(mode=fused)=1", decode_steps=3)


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


@pytest.fixture(scope="module")
def make():
    machines = tiny_machines(FUSED)
    return lambda: machines()[0]


@pytest.fixture(scope="module")
def make_windowed():
    """Two cache groups, a window of 6 sliding over pages of 4; pools that are large beside everything else."""
    model = tiny_model(6, None, 6)
    config = tiny_config("both(mode=fused)=2", model, decode_steps=3, decode_buckets=(4,))
    machines = tiny_machines(config, model, (4000, 4000), meshes=1)
    return lambda: (machines()[0], model)


def pools(mesh):
    return [np.asarray(x) for kv in mesh.worker.state.kv for x in kv]


def poison(mesh):
    """Fill every page with NaN: what is read without having been written shows."""
    kv = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding), mesh.worker.state.kv)
    mesh.worker.state = mesh.worker.state._replace(kv=kv)


@pytest.mark.parametrize("length", [1, 4, 7, 21])
def test_chunks_and_decode_steps_give_what_plain_attention_gives(make, length):
    mesh = make()
    poison(mesh)
    mesh.place("a", prompt(length, length))
    assert mesh.generate("a", 8) == greedy_tokens(MODEL, prompt(length, length), 8)


def test_rows_of_one_step_do_not_disturb_each_other(make):
    mesh = make()
    for index, name in enumerate("abc"):
        mesh.place(name, prompt(index, 3 + index), slot=3 - index)
    firsts = mesh.prefill(*(mesh.chunk(name, 0, 3 + index) for index, name in enumerate("abc")))
    seconds = mesh.decode(*(mesh.row(name, 4 + index) for index, name in enumerate("abc")))[0]
    for index, tokens in enumerate(zip(firsts, seconds, strict=True)):
        assert list(tokens) == greedy_tokens(MODEL, prompt(index, 3 + index), 2)


def test_a_full_prefix_hit_writes_no_page_and_gives_the_same_token(make):
    mesh = make()
    mesh.place("a", prompt(0, 8))
    (token,) = mesh.prefill(mesh.chunk("a", 0, 8))
    mesh.place("b", prompt(0, 8), pages=0)
    mesh.assign("b", 0, 0, range(2))
    before = pools(mesh)
    assert mesh.prefill(mesh.chunk("b", 7, 1, write_from=8)) == [token]
    for x, y in zip(before, pools(mesh), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_chunk_is_written_from_the_position_it_names(make):
    mesh = make()
    mesh.place("a", prompt(0, 8))
    mesh.prefill(mesh.chunk("a", 0, 8, write_from=6))
    (k, *_) = pools(mesh)
    assert not k[:, :1].any()
    assert not k[:, 1, :2].any()
    assert k[:, 1, 2:].all()


def test_a_forced_token_is_fed_in_place_of_the_sampled_one(make):
    mesh = make()
    forced = [7, 11]
    mesh.place("a", prompt(0, 5), outputs=forced)
    mesh.prefill(mesh.chunk("a", 0, 5))
    mesh.decode(mesh.row("a", 6, is_forced=True))
    # The last forced token leads several steps: only the first of them is forced.
    tokens = mesh.decode(mesh.row("a", 7, is_forced=True), steps=3)
    assert [row[0] for row in tokens] == greedy_tokens(MODEL, prompt(0, 5) + forced, 3)


def test_a_chunk_may_reach_into_what_was_generated(make):
    mesh = make()
    mesh.place("a", prompt(0, 5), outputs=[7, 11, 13])
    mesh.prefill(mesh.chunk("a", 0, 4, is_last=False))
    assert mesh.prefill(mesh.chunk("a", 4, 4)) == greedy_tokens(MODEL, [*prompt(0, 5), 7, 11, 13], 1)


SAMPLED = SamplingPlan(temperature=1.0, seed=5, top_p=0.9)


@pytest.mark.parametrize("plan", [GREEDY, SAMPLED, SamplingPlan(temperature=0.0, seed=0, repetition_penalty=1.5)])
def test_several_steps_in_one_dispatch_equal_single_ones(make, plan):
    lengths = dict(a=6, b=3)
    results = []
    for steps in (1, 3):
        mesh = make()
        for name, length in lengths.items():
            mesh.place(name, prompt(length, length), plan)
        mesh.prefill(*(mesh.chunk(name, 0, length) for name, length in lengths.items()))
        tokens = []
        for done in range(0, 6, steps):
            tokens += mesh.decode(*(mesh.row(name, n + 1 + done) for name, n in lengths.items()), steps=steps)
        results.append((tokens, pools(mesh)[0], np.asarray(mesh.worker.state.requests.dense.seen)))
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)
    np.testing.assert_array_equal(results[0][2], results[1][2])


def test_steps_past_the_end_of_a_table_write_nothing(make):
    mesh = make()
    mesh.place("a", prompt(0, 30))
    mesh.place("b", prompt(1, 4))
    mesh.prefill(mesh.chunk("a", 0, 16, is_last=False))
    mesh.prefill(mesh.chunk("a", 16, 14), mesh.chunk("b", 0, 2, is_last=False))
    before = pools(mesh)
    mesh.decode(mesh.row("a", 31), steps=3)  # positions 30, 31 and 32, of 32
    for x, y in zip(before, pools(mesh), strict=True):
        np.testing.assert_array_equal(np.delete(x, 7, axis=1), np.delete(y, 7, axis=1))
        assert y[:, 7].all()


def test_a_fused_step_gives_what_separate_steps_give(make):
    results = []
    for is_fused in (False, True):
        mesh = make()
        for index, name in enumerate("abc"):
            mesh.place(name, prompt(index, 6), SAMPLED)
        mesh.prefill(mesh.chunk("a", 0, 6), mesh.chunk("b", 0, 2, is_last=False))
        chunks, rows = (mesh.chunk("b", 2, 4), mesh.chunk("c", 0, 5, is_last=False)), (mesh.row("a", 7),)
        tokens = mesh.fused(chunks, rows) if is_fused else mesh.prefill(*chunks) + mesh.decode(*rows)[0]
        tokens += mesh.decode(mesh.row("a", 8), mesh.row("b", 7))[0]
        results.append((tokens[:1] + tokens[2:], pools(mesh)))
    assert results[0][0] == results[1][0]
    for x, y in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_windowed_group_needs_no_more_than_its_window(make_windowed, steps):
    mesh, model = make_windowed()
    poison(mesh)
    text, count = prompt(3, 15), 12
    mesh.place("a", text)
    mesh.prefill(mesh.chunk("a", 0, 10, is_last=False))
    mesh.assign("a", 0, 0, [23])  # position 10 sees 5 to 10: page 0 is another's by now
    (token,) = mesh.prefill(mesh.chunk("a", 10, 5))
    tokens = [token]
    while len(tokens) < 1 + count:
        kv_len = len(text) + len(tokens)
        first = max(0, kv_len - 6) // 4
        mesh.assign("a", 0, 0, [23] * first)
        tables = list(mesh.worker.state.tables)
        tables[0] = tables[0].at[0, :first].set(23)
        mesh.worker.state = mesh.worker.state._replace(tables=tuple(tables))
        tokens += [row[0] for row in mesh.decode(mesh.row("a", kv_len), steps=steps)]
    assert tokens == greedy_tokens(model, text, 1 + count)


def test_a_windowed_group_takes_part_in_fused_steps(make_windowed):
    mesh, model = make_windowed()
    mesh.place("a", prompt(0, 9))
    mesh.place("b", prompt(1, 12))
    (first,) = mesh.prefill(mesh.chunk("a", 0, 9))
    other, second = mesh.fused((mesh.chunk("b", 0, 12),), (mesh.row("a", 10),))
    assert [first, second] == greedy_tokens(model, prompt(0, 9), 2)
    assert [other] == greedy_tokens(model, prompt(1, 12), 1)


def test_a_copied_page_holds_the_same_and_the_first_holder_keeps_his(make):
    mesh = make()
    mesh.place("a", prompt(0, 6))
    (token,) = mesh.prefill(mesh.chunk("a", 0, 6))
    mesh.place("b", prompt(0, 6), pages=0)
    mesh.assign("b", 0, 0, range(2))
    assert mesh.prefill(mesh.chunk("b", 5, 1, write_from=6)) == [token]
    mesh.worker.copy_page(CopyPage(0, 0, 1, 12))
    mesh.assign("b", 0, 1, [12])
    before = pools(mesh)
    np.testing.assert_array_equal(before[0][:, 12], before[0][:, 1])
    mesh.accept("b", prompt(0, 6), outputs=[(token + 1) % VOCABULARY])
    second = mesh.decode(mesh.row("b", 7, is_forced=True))
    np.testing.assert_array_equal(pools(mesh)[0][:, 1], before[0][:, 1])
    assert second[0] == greedy_tokens(MODEL, [*prompt(0, 6), (token + 1) % VOCABULARY], 1)


def test_a_dense_row_counts_what_is_in_the_cache_and_then_what_is_fed(make):
    mesh = make()
    plan = SamplingPlan(temperature=0.0, seed=0, presence_penalty=0.1)
    mesh.place("a", [1, 2, 3], plan, outputs=[7, 7, 9, 4])
    mesh.prefill(mesh.chunk("a", 0, 6))
    mesh.decode(mesh.row("a", 7, is_forced=True))
    expected = np.zeros(VOCABULARY, np.int32)
    expected[[1, 2, 3]] = Seen.IN_PROMPT
    expected[[7, 9, 4]] = [2 * Seen.GENERATED, Seen.GENERATED, Seen.GENERATED]
    np.testing.assert_array_equal(mesh.worker.state.requests.dense.seen[0], expected)


def test_a_slot_keeps_nothing_of_its_last_tenant(make):
    mesh = make()
    mesh.place("a", [1, 2, 3], SamplingPlan(temperature=0.0, seed=0, logit_bias={5: 100.0}))
    assert mesh.generate("a", 3) == [5, 5, 5]
    mesh.place("b", prompt(0, 6), slot=0)
    assert mesh.generate("b", 3) == greedy_tokens(MODEL, prompt(0, 6), 3)


def test_every_program_aliases_the_state_and_needs_little_besides(make_windowed):
    big = make_windowed()[0].worker
    pool = sum(x.nbytes for kv in big.state.kv for x in kv)
    assert pool >= 4 << 20
    programs = big.programs
    kinds = (programs.prefill, programs.fused, programs.decode, programs.scatter)
    for program in [program for kind in kinds for program in kind.values()]:
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= pool
        assert memory.temp_size_in_bytes < pool / 4
    for group, program in programs.copy_page.items():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in big.state.kv[group])
        assert memory.temp_size_in_bytes < pool / 100
    memory = programs.load_dense.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(big.state.requests))
    assert memory.temp_size_in_bytes < big.state.requests.dense.seen.nbytes
