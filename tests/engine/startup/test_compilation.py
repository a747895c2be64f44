"""What is compiled first, what runs meanwhile, and what a compilation that fails costs. Programs are stand-ins here."""

import threading

import pytest
from helpers.tiny_mesh import tiny_config
from twinmesh.engine.config import bucket_for
from twinmesh.engine.sampling.request_rows import Stage
from twinmesh.engine.startup.compilation import Compilation
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.engine.worker.programs import Job, Programs, bundles

BUCKETS = dict(prefill_buckets=(4, 8, 16), decode_buckets=(1, 2, 4))


def plan(topology="both=1", mesh=0, **changes):
    config = tiny_config(topology, **(BUCKETS | changes))
    return MeshPlan(None, config.topology.meshes[mesh], None, None, config, None)


class Maker:
    """Makes a name in place of each program; those of `held` wait for `release`, and those of `failing` raise."""

    def __init__(self, held=lambda kind, *size: False, failing=lambda kind, *size: False):
        self.held, self.failing = held, failing
        self.made, self._go_on = [], threading.Event()

    def __call__(self, plan, kind, *size):
        if self.held(kind, *size):
            assert self._go_on.wait(60)
        if self.failing(kind, *size):
            raise RuntimeError(f"no {kind}")
        self.made.append((kind, *size))
        return (kind, *size)

    def release(self):
        self._go_on.set()


@pytest.fixture
def compile_with():
    made = []

    def start(maker, *plans, **options):
        made.append((maker, Compilation(plans, 2, make=maker, **options)))
        return made[-1][1]

    yield start
    for maker, compilation in made:
        maker.release()
        compilation.close()


def finish(compilation):
    for thread in compilation.threads:
        thread.join(60)


def release_and_finish(maker, compilation):
    maker.release()
    finish(compilation)


def small(kind, *size):
    return kind in ("prefill", "decode") and size[0] < max(BUCKETS[f"{kind}_buckets"])


@pytest.mark.parametrize("topology", ["both=1", "both(mode=fused)=1", "both=2", "prefill=1,decode=2"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_program_is_in_one_bundle_and_each_phase_begins_with_its_largest_size(topology, steps):
    for mesh in range(len(plan(topology).config.topology.meshes)):
        first, rest = bundles(plan(topology, mesh, decode_steps=steps))
        jobs = [job for bundle in (*first, *rest) for job in bundle.jobs]
        assert len(jobs) == len(set(jobs))
        spec = plan(topology, mesh).spec
        largest = {("prefill", 16)} if spec.prefills else set()
        largest |= {("decode", 4)} if spec.decodes else set()
        assert {(bundle.phase, bundle.size) for bundle in first} == largest | {(None, 0)}
        for phase in ("prefill", "decode"):
            sizes = [bundle.size for bundle in rest if bundle.phase == phase]
            assert sizes == sorted(sizes)


@pytest.mark.parametrize("topology", ["both=1", "both(mode=fused)=1", "prefill=1,decode=1"])
@pytest.mark.parametrize("rows", [3, 2, 4])
def test_a_size_that_is_ready_has_all_that_its_step_may_call(compile_with, topology, rows):
    """Also where a decode step has as many rows of logits as a prefill step."""
    plans = [plan(topology, mesh, decode_steps=2, prefill_rows=rows) for mesh in range(topology.count("=1"))]
    for own, programs in zip(plans, compile_with(Maker(), *plans).wait(), strict=True):
        for tokens in programs.ready.get("prefill", ()):
            assert programs.prefill[tokens] == ("prefill", tokens)
            assert programs.score[tokens] == ("score", tokens)
            assert (tokens in programs.fused) == own.spec.fused
            assert {(stage, rows) for stage in Stage} <= programs.sample.keys()
        for bucket in programs.ready.get("decode", ()):
            assert programs.decode[bucket] == ("decode", bucket)
            assert programs.decode_steps[bucket, 2] == ("decode_steps", bucket, 2)
            assert {(stage, bucket) for stage in Stage} <= programs.sample.keys()
        assert ("prefill" in programs.ready, "decode" in programs.ready) == (own.spec.prefills, own.spec.decodes)


def test_all_are_waited_for_unless_said_otherwise(compile_with):
    maker = Maker()
    (programs,) = compile_with(maker, plan()).wait()
    assert programs.ready == {"prefill": (4, 8, 16), "decode": (1, 2, 4)}
    assert len(maker.made) == len(set(maker.made))


def test_serving_can_begin_with_the_largest_sizes_and_the_others_take_over(compile_with):
    maker = Maker(held=small)
    compilation = compile_with(maker, plan(), serve_early=True)
    (programs,) = compilation.wait()
    assert programs.ready == {"prefill": (16,), "decode": (4,)}
    assert [programs.size_for("prefill", size) for size in (4, 8, 16)] == [16] * 3
    assert set(compilation.coming) == {
        f"{name} on mesh 0" for name in ("prefill 4", "prefill 8", "decode 1", "decode 2")
    }
    maker.release()
    finish(compilation)
    assert programs.ready == {"prefill": (4, 8, 16), "decode": (1, 2, 4)}
    assert [programs.size_for("decode", size) for size in (1, 2, 4)] == [1, 2, 4]
    assert compilation.coming == ()


def test_a_size_is_not_ready_before_the_last_of_its_programs_is(compile_with):
    maker = Maker(held=lambda kind, *size: (kind, *size) == ("score", 4) or small(kind, *size))
    compilation = compile_with(maker, plan(), serve_early=True)
    (programs,) = compilation.wait()
    maker.held = lambda kind, *size: (kind, *size) == ("score", 4)
    assert 4 not in programs.ready["prefill"]
    maker.release()
    finish(compilation)
    assert 4 in programs.ready["prefill"]


@pytest.mark.parametrize("failing", [("decode", 4), ("allocate",), ("score", 16), ("sample", Stage.DRAW, 3)])
@pytest.mark.parametrize("serve_early", [False, True])
def test_a_start_ends_with_what_a_program_that_it_needs_raised(compile_with, failing, serve_early):
    maker = Maker(failing=lambda kind, *size: (kind, *size) == failing)
    compilation = compile_with(maker, plan(), serve_early=serve_early)
    with pytest.raises(RuntimeError, match=f"no {failing[0]}"):
        compilation.wait()
    assert not any(thread.is_alive() for thread in compilation.threads)


def test_without_serving_early_a_small_size_that_fails_ends_the_start_as_well(compile_with):
    maker = Maker(failing=lambda kind, *size: (kind, *size) == ("decode", 1))
    with pytest.raises(RuntimeError, match="no decode"):
        compile_with(maker, plan()).wait()


def test_a_larger_size_goes_on_in_place_of_one_that_fails_while_the_engine_serves(compile_with):
    maker = Maker(held=small, failing=lambda kind, *size: (kind, *size) == ("decode", 2))
    compilation = compile_with(maker, plan(), serve_early=True)
    (programs,) = compilation.wait()
    with pytest.warns(UserWarning, match=r"decode 2 on mesh 0 could not be compiled \(RuntimeError: no decode\)"):
        release_and_finish(maker, compilation)
    assert programs.ready["decode"] == (1, 4)
    assert programs.size_for("decode", 2) == 4
    assert compilation.coming == ()


def test_closing_begins_no_other_compilation_and_waits_for_those_under_way(compile_with):
    maker = Maker(held=small)
    compilation = compile_with(maker, plan(), serve_early=True)
    compilation.wait()
    before = len(maker.made)
    threading.Timer(0.05, maker.release).start()
    compilation.close()
    assert len(maker.made) <= before + 2  # one on each thread
    assert compilation.coming == ()
    assert not any(thread.is_alive() for thread in compilation.threads)


def test_programs_that_are_not_needed_are_left_out(compile_with):
    maker = Maker()
    compile_with(maker, plan(), needs=lambda job: job.kind not in ("score", "sample")).wait()
    assert {kind for kind, *_ in maker.made} == {"allocate", "prefill", "decode", "load_dense", "copy_page"}


@pytest.mark.parametrize("ready", [(4,), (1, 4), (2, 4), (1, 2, 4)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_runs_in_the_smallest_size_that_holds_it_and_is_ready(ready, size):
    programs = Programs(ready={"decode": ready})
    assert programs.size_for("decode", size) == bucket_for(size, ready) >= size


def test_a_job_names_a_field_of_the_programs_and_its_key():
    programs = Programs()
    for job, made in ((Job("allocate"), "a"), (Job("decode", (4,)), "b"), (Job("sample", (Stage.DRAW, 4)), "c")):
        programs.add(job, made)
    assert (programs.allocate, programs.decode, programs.sample) == ("a", {4: "b"}, {(Stage.DRAW, 4): "c"})
