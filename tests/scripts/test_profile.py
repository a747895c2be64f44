"""`twinmesh profile`: a tiny model's steps are measured, fitted and written; a GPU's are computed without it."""

import dataclasses

import pytest
from helpers.core_engine import make_engine, model_with_windows
from twinmesh.engine.simulation.costs.profile import read_profile
from twinmesh.engine.topology import Topology
from twinmesh.scripts import arguments
from twinmesh.scripts.cli import main
from twinmesh.scripts.profile_loads import Grid, Load, OnMesh, Serving, places
from twinmesh.scripts.profile_run import errors_of, fitted, held_out, run_loads


@pytest.fixture(scope="module")
def llm():
    with make_engine(model_with_windows(None), "prefill=1,decode=1", policy=OnMesh(), room=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def seen(llm):
    return run_loads(llm, 2, is_quick=True, progress=False)


def test_every_program_is_measured_and_held_against_other_points(seen):
    costs = fitted(seen)
    assert (list(costs.prefill), list(costs.decode), costs.fused) == ([16], [4], {})
    assert costs.link.fixed + costs.link.byte > 0
    assert costs.host.step > 0
    assert costs.host.arrival + costs.host.token > 0
    points = held_out(seen, costs)
    assert {error.kind for error in errors_of(points)} == {"prefill", "decode"}
    assert not any(point.load.is_fitted for point in points)


def test_some_steps_run_alone_and_some_beside_the_other_mesh(seen):
    steps = [step for one in seen for step in one.steps if step.kind == "decode"]
    assert any(step.beside for step in steps)
    assert any(not step.beside for step in steps)


def test_the_engine_is_at_rest_afterwards(llm, seen):
    assert not llm.engine.core.inspect(lambda scheduler, _: scheduler.requests)


def test_the_command_writes_what_can_be_read(llm, seen, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "load_llm", lambda args: _Open(llm))
    monkeypatch.setattr("twinmesh.scripts.profile_run.run_loads", lambda llm, rounds, **kinds: seen)
    out = tmp_path / "profile.json"
    assert main(["profile", "--model", "tiny", "--quick", "--out", str(out)]) == 0
    profile = read_profile(out)
    assert (profile.model, profile.source, profile.prefill_buckets) == ("tiny", "measured", (16,))
    assert profile.costs == fitted(seen)
    printed = capsys.readouterr().out
    assert "decode" in printed
    assert "held out: mean error" in printed


@dataclasses.dataclass
class _Open:
    """An engine that stays open when the command is done with it."""

    llm: object

    def __enter__(self):
        return self.llm

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize(
    ("topology", "pairs"),
    [
        ("both=2", [(0, 0), (1, 1)]),
        ("prefill=1,decode=1", [(0, 1)]),
        ("prefill=2,decode=1", [(0, 2), (1, 2)]),
        ("pool=2", [(0, 0), (1, 1)]),
    ],
)
def test_requests_go_to_each_mesh_that_prefills(llm, topology, pairs):
    config = dataclasses.replace(llm.config, topology=Topology.parse(topology))
    assert [(place.prefill, place.decode) for place in places(config)] == pairs


def test_a_fused_mesh_gets_prompts_beside_its_own_answers(llm):
    config = dataclasses.replace(llm.config, topology=Topology.parse("both(mode=fused)=1"))
    loads = list(Grid(config, 10_000, is_quick=False).loads())
    at_once = [load for load in loads if isinstance(load, Load)]
    assert any(load.behind and load.behind.place == load.place for load in at_once)
    assert all(max(load.prompts) + load.tokens <= config.max_model_len for load in at_once)


def test_meshes_are_also_measured_as_they_serve_few_and_many_at_a_time(llm):
    config = dataclasses.replace(llm.config, topology=Topology.parse("both=2"), max_num_seqs=8, decode_buckets=(8,))
    served = [load for load in Grid(config, 10_000, is_quick=False).loads() if isinstance(load, Serving)]
    assert [(load.concurrency, load.is_fitted) for load in served] == [(2, True), (4, True), (16, True), (8, False)]
    requests = [request for load in served for request in load.requests]
    assert {request.place.prefill for request in requests} == {0, 1}
    assert all(request.prompt + request.tokens <= config.max_model_len for request in requests)


def test_a_gpu_that_is_not_here_has_its_costs_computed(tmp_path, capsys):
    out = tmp_path / "h100.json"
    asked = ["--model", "llama-3.1-8b", "--device", "h100", "--topology", "both=1xtp2", "--out", str(out)]
    assert main(["profile", *asked]) == 0
    profile = read_profile(out)
    assert (profile.model, profile.device, profile.source, profile.tp) == ("llama-3.1-8b", "h100", "roofline", (2, 2))
    assert profile.errors == ()
    assert "never measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--device", "h10"], "the nearest is 'h100'"),
        (["--device", "h100", "--quick"], "nothing is measured"),
        (["--device", "h100", "--dtype", "float32"], "computes costs in bfloat16"),
        (["--device", "h100", "--model", "lama-3.1-8b"], "the nearest is 'llama-3.1-8b'"),
        (["--device", "h100", "--model", "llama-3.1-70b"], "tp 2 fits"),
        (["--workers", "processes"], "measures the devices of this process"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_in_a_line(arguments, why, capsys):
    assert main(["profile", "--model", "llama-3.1-8b", *arguments]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1
