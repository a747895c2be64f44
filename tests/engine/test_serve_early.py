"""An engine that serves while smaller sizes compile: no step waits for one, and each takes over when it is ready."""

import threading

import pytest
from helpers.core_engine import (
    Reference,
    assert_at_rest,
    executor_of,
    greedy,
    make_engine,
    model_with_windows,
    prompts_of,
    token_ids,
)
from helpers.shared_programs import SharedPrograms
from twinmesh.engine.startup import build

MODEL = model_with_windows(None)
OPTIONS = dict(prefill_buckets=(4, 16), decode_buckets=(1, 2, 4), room=6)
PROMPTS = prompts_of(3, 20, 2)


@pytest.fixture(scope="module")
def reference():
    return Reference(MODEL)


@pytest.fixture
def gate(monkeypatch):
    """Programs of small sizes are there once the gate is set."""
    gate, programs = threading.Event(), SharedPrograms()

    def make(plan, kind, *size):
        if kind in ("prefill", "decode", "fused") and size[0] < (16 if kind != "decode" else 4):
            assert gate.wait(120)
        return programs(plan, kind, *size)

    monkeypatch.setattr(build, "kept_or_compiled", lambda directory, platform: make)
    yield gate
    gate.set()


def wait_for_all(llm):
    """Wait until nothing is left to compile."""
    for thread in threading.enumerate():
        if thread.name == "twinmesh-compile":
            thread.join(120)
    assert llm.metrics().coming == ()


def right(reference, outputs):
    return all(map(reference.agrees, PROMPTS, token_ids(outputs)))


@pytest.mark.parametrize("topology", ["both=1", "both(mode=fused)=1", "prefill=1,decode=1", "both=2"])
def test_an_engine_serves_before_its_small_sizes_are_there_and_with_them_afterwards(gate, reference, topology):
    with make_engine(MODEL, topology, serve_early=True, **OPTIONS) as llm:
        assert right(reference, llm.generate(PROMPTS, greedy(10)))
        coming = llm.metrics().coming
        meshes = len(executor_of(llm).meshes)
        assert {f"decode 1 on mesh {meshes - 1}", f"decode 2 on mesh {meshes - 1}", "prefill 4 on mesh 0"} <= set(
            coming
        )
        assert llm.metrics().compiles == 0
        gate.set()
        wait_for_all(llm)
        before = llm.metrics().compiles
        assert right(reference, llm.generate(PROMPTS, greedy(10)))
        assert llm.metrics().compiles == before == 0
        assert_at_rest(llm)


def test_sizes_take_over_in_the_middle_of_a_request(gate, reference):
    ran = []
    with make_engine(MODEL, serve_early=True, **OPTIONS) as llm:
        (mesh,) = executor_of(llm).meshes
        largest = mesh.programs.decode[4]

        def counting(*args):
            ran.append(4)
            if len(ran) == 8:
                gate.set()
                wait_for_all(llm)
            return largest(*args)

        mesh.programs.decode[4] = counting
        (output,) = llm.generate(PROMPTS[0], greedy(30))
    assert reference.agrees(PROMPTS[0], output.outputs[0].token_ids)
    assert len(ran) == 8


def test_a_deterministic_engine_waits_for_all(monkeypatch):
    made, programs = [], SharedPrograms()

    def make(plan, kind, *size):
        made.append((kind, *size))
        return programs(plan, kind, *size)

    monkeypatch.setattr(build, "kept_or_compiled", lambda directory, platform: make)
    with make_engine(MODEL, deterministic=True, serve_early=True) as llm:
        assert llm.metrics().coming == ()
        assert len(made) > 10


def test_an_engine_that_is_closed_early_stops_compiling(gate):
    llm = make_engine(MODEL, serve_early=True, **OPTIONS)
    gate.set()
    llm.close()
    assert not any(thread.name == "twinmesh-compile" for thread in threading.enumerate())
    assert llm.metrics().coming == ()


def test_the_program_that_forgets_to_close_an_engine_ends(gate):
    llm = make_engine(MODEL, serve_early=True, **OPTIONS)
    gate.set()
    del llm
    wait = [thread for thread in threading.enumerate() if thread.name == "twinmesh-compile"]
    for thread in wait:
        thread.join(120)
        assert not thread.is_alive()
