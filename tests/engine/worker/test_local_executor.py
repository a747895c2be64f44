"""The executor on tiny models: what its actions do on real devices, and what comes back. No scheduler."""

import threading
from queue import SimpleQueue

import jax
import numpy as np
import pytest
from helpers.tiny_mesh import (
    GREEDY,
    VOCABULARY,
    dense_scores,
    greedy_tokens,
    tiny_config,
    tiny_machines,
    tiny_model,
    tiny_weights,
)
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.protocol.actions import (
    Accept,
    AssignPages,
    Chunk,
    CopyPage,
    Decode,
    DecodeRow,
    DropTransfer,
    Finish,
    Fused,
    Prefill,
    ResetMesh,
    Scatter,
    StartTransfer,
)
from twinmesh.engine.protocol.events import TransferFailed, TransferReady
from twinmesh.engine.protocol.results import StepFailed, StepResult
from twinmesh.engine.protocol.sampling_plan import SamplingPlan
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.local_executor import LocalExecutor
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.kernels_pallas.cpu.threads import process_cores

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


class Run:
    """An executor, and its completions as they come. `clock` counts calls."""

    def __init__(self, machines):
        self.completions, self.time, self.step = SimpleQueue(), 0.0, 0
        self.executor = LocalExecutor([mesh.worker for mesh in machines], self.completions.put, self.clock)

    def clock(self):
        self.time += 1
        return self.time

    def submit(self, name, prompt=PROMPT, plan=GREEDY, outputs=()):
        self.do(Accept(name, np.array(prompt, np.int32), plan, np.array(outputs, np.int32)))

    def do(self, *actions):
        for action in actions:
            self.executor.perform(action)

    def wait(self, kind=StepResult):
        completion = self.completions.get(timeout=60)
        assert isinstance(completion, kind), completion
        return completion

    def prefill(self, name, mesh=0, slot=0, start=0, length=9, **options):
        self.step += 1
        chunk = Chunk(name, 1, slot, start, length, **(dict(write_from=0, is_last=True) | options))
        self.do(Prefill(mesh, self.step, 16, (chunk,)))
        return self.wait()

    def decode(self, rows, mesh=0, steps=1):
        self.step += 1
        self.do(Decode(mesh, self.step, 4, steps, tuple(DecodeRow(name, 1, slot, n) for name, slot, n in rows)))
        return self.wait()


@pytest.fixture(scope="module")
def machines():
    """Topology -> fresh meshes with their programs, compiled once."""
    made = {}

    def of(topology):
        if topology not in made:
            model = tiny_model(6, None)
            steps = 2 if "fused" in topology else 1
            config = tiny_config(topology, model, decode_buckets=(4,), decode_steps=steps)
            made[topology] = tiny_machines(config, model)
        return made[topology]()

    return of


@pytest.fixture
def start(machines):
    runs = []

    def make(topology="both(mode=fused)=1"):
        runs.append(Run(machines(topology)))
        return runs[-1]

    yield make
    for run in runs:
        run.executor.close()


MODEL = tiny_model(6, None)


def assign(mesh, slot, first_page, count=5):
    pages = tuple(range(first_page, first_page + count))
    return [AssignPages(mesh, slot, group, 0, pages) for group in range(2)]


def test_a_step_result_names_its_rows_and_holds_a_token_for_each(start):
    run = start()
    run.submit("a")
    run.do(*assign(0, 2, 0))
    result = run.prefill("a", slot=2)
    assert (result.mesh, result.step, result.tokens.shape) == (0, 1, (1, 1))
    assert result.scores is None
    tokens = result.tokens.tolist()
    result = run.decode([("a", 2, 10)], steps=2)
    assert result.rows == (DecodeRow("a", 1, 2, 10),)
    assert [token for step in tokens + result.tokens.tolist() for token in step] == greedy_tokens(MODEL, PROMPT, 3)


def test_a_fused_step_reports_chunks_before_rows(start):
    run = start()
    run.submit("a")
    run.submit("b", [7, 7, 3])
    run.do(*assign(0, 2, 0), *assign(0, 0, 8))
    first = run.prefill("a", slot=2).tokens[0, 0]
    chunk, row = Chunk("b", 1, 0, 0, 3, 0, True), DecodeRow("a", 1, 2, 10)
    run.do(Fused(0, 9, 16, (chunk,), (row,)))
    result = run.wait()
    assert result.rows == (chunk, row)
    ((other, second),) = result.tokens.tolist()
    assert [first, second] == greedy_tokens(MODEL, PROMPT, 2)
    assert [other] == greedy_tokens(MODEL, [7, 7, 3], 1)


def test_scores_come_for_rows_that_want_them(start):
    run = start()
    run.submit("a", plan=SamplingPlan(temperature=0.0, seed=0, logprobs=2))
    run.submit("b")
    run.do(*assign(0, 0, 0), *assign(0, 1, 8))
    first = run.prefill("a")
    run.prefill("b", slot=1)
    second = run.decode([("b", 1, 10), ("a", 0, 10)], steps=2)
    tokens = [first.tokens[0, 0], *second.tokens[:, 1]]
    expected = dense_scores(MODEL, [*PROMPT, *tokens])[len(PROMPT) - 1 :]
    found = [first.score_of(0, 0), second.score_of(0, 1), second.score_of(1, 1)]
    for score, row, token in zip(found, expected, tokens, strict=False):
        np.testing.assert_allclose(score.logprob, row[[token]], atol=1e-4)
        assert score.rank.tolist() == [1]
        assert score.top_ids[0, :3].tolist() == np.argsort(-row)[:3].tolist()
        assert score.top_logprobs.shape == (1, 20)


def test_a_prompt_is_scored_chunk_by_chunk_from_its_second_token_on(start):
    run = start()
    run.submit("a", plan=SamplingPlan(temperature=0.0, seed=0, prompt_logprobs=0))
    run.submit("b")
    run.do(*assign(0, 0, 0), *assign(0, 1, 8))
    chunks = (Chunk("b", 1, 1, 0, 6, 0, False), Chunk("a", 1, 0, 0, 4, 0, False))
    run.do(Prefill(0, 8, 16, chunks))
    results = [run.wait(), run.prefill("a", start=4, length=5)]
    pieces = [results[0].prompt_scores[1], results[1].prompt_scores[0]]
    assert [result.prompt_scores.keys() for result in results] == [{1}, {0}]
    assert [len(piece.logprob) for piece in pieces] == [4, 4]
    expected = dense_scores(MODEL, PROMPT)
    found = np.concatenate([piece.logprob for piece in pieces])
    np.testing.assert_allclose(found, expected[np.arange(8), PROMPT[1:]], atol=1e-4)
    assert (np.concatenate([piece.top_ids[:, 0] for piece in pieces]) == expected[:8].argmax(-1)).all()


def test_a_prompt_is_not_scored_again_once_there_is_output(start):
    run = start()
    run.submit("a", plan=SamplingPlan(temperature=0.0, seed=0, prompt_logprobs=0), outputs=[8])
    run.do(*assign(0, 0, 0))
    assert run.prefill("a", length=len(PROMPT) + 1).prompt_scores == {}


def test_a_copied_page_is_the_new_holders_own(start):
    run = start()
    run.submit("a")
    run.submit("b")
    run.do(*assign(0, 0, 0), *assign(0, 1, 0))
    run.prefill("a")
    run.prefill("b", slot=1, start=8, length=1, write_from=9)
    for group in range(2):
        run.do(CopyPage(0, group, 2, 10), AssignPages(0, 1, group, 2, (10,)))
    result = run.decode([("a", 0, 10), ("b", 1, 10)])
    assert result.tokens[0].tolist() == greedy_tokens(MODEL, PROMPT, 2)[1:] * 2


def transfer(run, source=0, destination=1, number=1, *, slots=(0, 3), pages=((0, 1, 2), (0, 1, 2)), to=9):
    """Move pages to `to`, `to` + 1, ... of the destination; the scatter once they are there."""
    run.do(StartTransfer(number, 4, source, slots[0], pages, destination))
    assert run.wait(TransferReady).transfer == number
    there = tuple(tuple(range(to, to + len(group))) for group in pages)
    run.do(Scatter(number, destination, slots[1], there))


PENALISED = SamplingPlan(temperature=0.0, seed=0, repetition_penalty=1.3, presence_penalty=0.5)


@pytest.mark.parametrize("plan", [GREEDY, PENALISED, SamplingPlan(temperature=1.0, seed=3)])
@pytest.mark.parametrize("topology", ["prefill=1,decode=2", "prefill=1xtp2,decode=1xtp4"])
def test_a_request_goes_on_elsewhere_as_it_would_have_here(start, topology, plan):
    def finish(run, mesh, slot, tokens):
        for kv_len in range(len(PROMPT) + len(tokens), len(PROMPT) + 5):
            tokens += run.decode([("a", slot, kv_len)], mesh).tokens[:, 0].tolist()
        return tokens

    here = start("both(mode=fused)=1")
    here.submit("a", plan=plan)
    here.do(*assign(0, 0, 0))
    expected = finish(here, 0, 0, here.prefill("a").tokens[0].tolist())
    run = start(topology)
    run.submit("a", plan=plan)
    run.do(*assign(0, 0, 0), *assign(1, 3, 9))
    tokens = run.prefill("a").tokens[0].tolist()
    transfer(run)
    run.submit("a", plan=plan, outputs=tokens)
    assert finish(run, 1, 3, tokens) == expected
    traffic = run.executor.traffic
    assert traffic.transfers == 1
    assert traffic.bytes > 0
    assert traffic.seconds > 0


def test_pages_may_go_ahead_of_the_state(start):
    run = start("prefill=1,decode=2")
    run.submit("a")
    run.do(*assign(0, 0, 0), *assign(1, 3, 9))
    run.prefill("a", length=8, is_last=False)
    transfer(run, slots=(None, None), pages=((0, 1), (0, 1)))
    tokens = run.prefill("a", start=8, length=1).tokens[0].tolist()
    transfer(run, number=2, pages=((2,), (2,)), to=11)
    tokens += run.decode([("a", 3, 10)], 1).tokens[0].tolist()
    assert tokens == greedy_tokens(MODEL, PROMPT, 2)


@pytest.mark.parametrize("back", [1, 3], ids=["to another slot", "to its old slot"])
def test_a_decoding_request_may_move_back_and_forth(start, back):
    def finish(move):
        run = start("prefill=1,decode=2")
        run.submit("a", plan=PENALISED)
        run.do(*assign(0, 0, 0), *assign(1, 3, 9))
        tokens = run.prefill("a").tokens[0].tolist()
        transfer(run)
        run.submit("a", plan=PENALISED, outputs=tokens)
        tokens += run.decode([("a", 3, 10)], 1).tokens[0].tolist()
        where = (3, 1)
        if move:
            run.do(*assign(2, 0, 4))
            transfer(run, 1, 2, 2, slots=(3, 0), pages=((9, 10, 11), (9, 10, 11)), to=4)
            run.submit("a", plan=PENALISED, outputs=tokens)
            tokens += run.decode([("a", 0, 11)], 2).tokens[0].tolist()
            run.do(*assign(1, back, 15))
            transfer(run, 2, 1, 3, slots=(0, back), pages=((4, 5, 6), (4, 5, 6)), to=15)
            run.submit("a", plan=PENALISED, outputs=tokens)
            where = (back, 1)
        for kv_len in range(10 + len(tokens) - 1, 15):
            tokens += run.decode([("a", where[0], kv_len)], where[1]).tokens[0].tolist()
        return tokens

    assert finish(move=True) == finish(move=False)


def test_a_dropped_transfer_leaves_nothing_staged(start):
    run = start("prefill=1,decode=2")
    run.submit("a")
    run.do(*assign(0, 0, 0))
    run.prefill("a")
    run.do(StartTransfer(1, 4, 0, 0, ((0, 1, 2), (0, 1, 2)), 1))
    run.wait(TransferReady)
    run.do(DropTransfer(1), DropTransfer(1))
    assert not run.executor.num_staged


def test_a_mesh_has_the_programs_that_its_topology_needs(start):
    def programs(topology):
        kinds = [vars(mesh.programs) for mesh in start(topology).executor.meshes]
        return [{name for name, programs in kind.items() if programs} - {"allocate", "ready"} for kind in kinds]

    always = {"sample", "load_dense", "copy_page"}
    prefilling = always | {"prefill", "score"}
    assert programs("both(mode=fused)=1") == [prefilling | {"fused", "decode", "decode_steps"}]
    decoding = always | {"decode", "gather", "scatter"}
    assert programs("prefill=1,decode=2") == [prefilling | {"gather"}, decoding, decoding]
    made = start().executor.meshes[0].programs
    assert set(made.decode) == {4}
    assert set(made.decode_steps) == {(4, 2)}
    assert {rows for _, rows in made.sample} == {3, 4, 7}  # of prefill, decode and fused steps


@pytest.mark.parametrize(
    ("topology", "leaves_for", "comes_from"),
    [
        ("both=1", [set()], [set()]),
        ("both=2", [{1}] * 2, [{1}] * 2),
        ("prefill=1xtp2,decode=1", [{1}, set()], [set(), {2}]),
        ("prefill=2,decode=2xtp4", [{4}] * 4, [set(), set(), {1, 4}, {1, 4}]),
    ],
)
def test_kv_crosses_between_the_meshes_that_may_need_it(topology, leaves_for, comes_from):
    topology = Topology.parse(topology)
    config, model = EngineConfig(topology, 32), tiny_model()
    plans = [MeshPlan(None, spec, model, None, config, None) for spec in topology.meshes]
    assert [plan.destinations for plan in plans] == leaves_for[: len(plans)]
    assert [plan.sources for plan in plans] == comes_from


def test_new_parameters_serve_the_steps_that_follow(start):
    run = start()
    run.submit("a")
    run.do(*assign(0, 0, 0))
    old = tiny_weights(MODEL)
    before = run.prefill("a").tokens[0, 0]
    run.executor.replace_params({path: np.roll(x, 1, axis=-1) for path, x in old.items()})
    assert run.prefill("a").tokens[0, 0] != before
    run.executor.replace_params(old)
    assert run.prefill("a").tokens[0, 0] == before


@pytest.mark.parametrize("topology", ["both(mode=fused)=1", "prefill=1,decode=1", "both=2"])
def test_no_program_has_parameters_donated(start, topology):
    """They are shared between meshes and may lie in a read-only mapping: a program would write over them."""
    seen = 0
    for mesh in start(topology).executor.meshes:
        programs = mesh.programs
        compiled = [
            *programs.prefill.values(), *programs.fused.values(), *programs.score.values(), *programs.decode.values(),
            *programs.decode_steps.values(),
        ]  # fmt: skip
        for program in compiled:
            params = program.args_info[0][0]
            assert len(params) == len(mesh.params)
            assert not any(info.donated for info in params)
            seen += 1
    assert seen >= 3


class Burning:
    """Stands for an array that a device failed to compute."""

    ndim = 1

    def copy_to_host_async(self):
        pass

    def block_until_ready(self):
        raise RuntimeError("the device is on fire")


def test_a_step_that_raises_on_the_device_is_reported_and_the_mesh_starts_anew(start):
    run = start()
    run.submit("a")
    run.do(*assign(0, 0, 0))
    expected = run.prefill("a").tokens
    programs = run.executor.meshes[0].programs.prefill
    program = programs[16]

    def burning(params, state, inputs):
        state, passed, hidden = program(params, state, inputs)
        return state, passed._replace(tokens=Burning()), hidden

    programs[16] = burning
    try:
        run.do(Prefill(0, 7, 16, (Chunk("a", 1, 0, 0, 9, 0, True),)))
        failure = run.wait(StepFailed)
    finally:
        programs[16] = program
    assert (failure.mesh, failure.step) == (0, 7)
    assert failure.reason == "RuntimeError: the device is on fire"
    assert process_cores().threads == process_cores().count
    run.do(ResetMesh(0))
    np.testing.assert_array_equal(run.prefill("a").tokens, expected)


def test_meshes_share_the_cores_while_their_steps_are_under_way(start, monkeypatch):
    """The clock, which a waiter reads when a step is done, holds each step under way until the test lets go."""
    run, cores, let_go = start("prefill=1,decode=1"), process_cores(), threading.Event()
    monkeypatch.setattr(cores, "count", 8)
    try:
        cores.add(0)
        vars(run.executor).update(_clock=lambda: let_go.wait(60) and 1.0)
        shares = []
        for mesh in (0, 0, 1):
            run.submit(f"r{len(shares)}")
            step = Prefill if mesh == 0 else Decode
            chunk = Chunk(f"r{len(shares)}", 1, len(shares), 0, 9, write_from=0, is_last=True)
            rows = (DecodeRow(f"r{len(shares)}", 1, len(shares), 10),)
            run.do(step(mesh, len(shares), 16, (chunk,)) if mesh == 0 else step(mesh, len(shares), 4, 1, rows))
            shares.append(cores.threads)
        let_go.set()
        for _ in shares:
            run.wait()
        assert (shares, cores.threads) == ([8, 8, 4], 8)
    finally:
        let_go.set()
        monkeypatch.undo()
        cores.add(0)


def test_a_transfer_that_raises_is_reported(start, monkeypatch):
    run = start("prefill=1,decode=2")
    monkeypatch.setattr("twinmesh.engine.worker.local_executor.send", lambda *args: Burning())
    run.do(StartTransfer(5, 1, 0, 0, ((0,), (0,)), 1))
    failure = run.wait(TransferFailed)
    assert (failure.transfer, failure.reason) == (5, "RuntimeError: the device is on fire")
    assert run.executor.traffic.transfers == 0


def test_what_a_step_was_given_is_not_touched_again(start):
    """Tables change as soon as a step is dispatched; on CPU it may still be reading."""
    run = start()
    run.submit("a")
    run.submit("b", [VOCABULARY - 1] * 9)
    run.do(*assign(0, 0, 0))
    mesh, given = run.executor.meshes[0], []
    program = mesh.programs.prefill[16]
    mesh.programs.prefill[16] = lambda params, state, inputs: (given.append(inputs), program(params, state, inputs))[1]
    try:
        run.prefill("a")
        copies = jax.tree.map(np.copy, given[0])
        run.do(*assign(0, 0, 10))
        run.prefill("b")
    finally:
        mesh.programs.prefill[16] = program
    jax.tree.map(np.testing.assert_array_equal, given[0], copies)


def test_a_finished_request_is_forgotten_and_close_lets_go_of_everything(start):
    run = start()
    run.submit("a")
    run.do(Finish("a", "stop"))
    assert run.executor.records == {}
    run.executor.close()
    assert run.executor.meshes == []
