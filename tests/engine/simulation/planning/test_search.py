"""The search of a topology, on devices that are not there: what is refused, recommended, and would have to change."""

import json

import pytest
from twinmesh import SLO, plan_topology
from twinmesh.engine.simulation.planning import search as plan_search
from twinmesh.engine.simulation.planning.candidates import choices, degrees
from twinmesh.engine.simulation.planning.text import as_data, as_text
from twinmesh.models.families.known import known_config
from twinmesh.scripts.cli import main

MODEL = "llama-3.1-8b"
LOAD = "poisson:rate=4,input=600,output=24,requests=40"


def found(slo="ttft=500ms,tpot=30ms,percentile=90", model=MODEL, devices=2, **options):
    options = {"device": "h100", "workload": LOAD, "budget": 3, "requests": 40} | options
    return plan_topology(model, devices=devices, slo=slo, **options)


@pytest.fixture(scope="module")
def answer():
    return found()


def test_what_meets_the_target_is_recommended_with_what_to_expect(answer):
    assert answer.best.is_met
    assert len(answer.outcomes) == 3
    report = answer.best.report
    assert report.run.gpus == 2
    assert report.finished == 40
    assert 1000 * report.ttft.p90 <= 500
    assert report.dollars.output > 0
    text = as_text(answer)
    for part in ("meets TTFT 500 ms, TPOT 30 ms for 90 %", "roofline only", "P99", "$ per million", "joules", "Run"):
        assert part in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())


def test_fewer_devices_that_would_do_are_found_by_trying(answer):
    assert [change.what for change in answer.changes] == ["1 device instead of 2"]
    assert answer.changes[0].outcome.is_met
    assert "for 50% less" in " ".join(as_text(answer).split())


def test_the_answer_is_plain_data_for_other_programs(answer):
    data = json.loads(json.dumps(as_data(answer)))
    assert (data["format"], data["version"], data["is_met"]) == ("twinmesh plan", 1, True)
    assert data["outcomes"][0]["topology"] == answer.best.choice.topology
    assert data["outcomes"][0]["report"]["ttft"]["p99"] == answer.best.report.ttft.p99


def test_a_target_out_of_reach_gets_the_best_and_what_would_have_to_change():
    late = found("ttft=500ms,tpot=2ms,percentile=90", devices=1, budget=2, requests=12)
    assert not late.best.is_met
    text = " ".join(as_text(late).split())
    assert "no topology meets" in text
    assert "one mesh, so there are no roles to plan" in text
    (later,) = [change for change in late.changes if "TPOT" in change.what]
    assert later.outcome.is_met
    assert "instead of 2" in later.what


def test_what_does_not_fit_is_refused_with_its_arithmetic_before_anything_is_simulated(monkeypatch):
    monkeypatch.setattr(plan_search, "simulate", lambda *_: pytest.fail("simulated"))
    with pytest.raises(ValueError, match=r"does not run on 1 x h100.*GiB of weights"):
        found(model="llama-3.1-70b", devices=1)


def test_the_search_space_is_every_way_to_divide_the_devices():
    model = known_config(MODEL)
    assert degrees(model, 8) == [1, 2, 4, 8]
    assert degrees(model, 6) == [1, 2, 4]
    names = [choice.topology for choice in choices(model, 4)]
    assert {"pool=4", "prefill=3,decode=1", "pool=2xtp2", "both=1xtp4", "both(mode=fused)=2xtp2"} <= set(names)
    assert all(choice.meshes * choice.tp == 4 for choice in choices(model, 4))
    assert all(choice.meshes * choice.tp + choice.idle == 7 for choice in choices(model, 7))


def test_a_model_that_needs_two_of_three_devices_leaves_one_idle_and_pays_for_it():
    target = {"slo": "ttft=9s,tpot=90ms,percentile=50", "budget": 1, "requests": 4}
    three = found(model="llama-3.1-70b", devices=3, max_model_len=2048, **target)
    assert three.best.choice.idle == 1
    assert three.best.report.run.gpus == 3
    assert as_data(three)["outcomes"][0]["idle"] == 1
    assert "1 of the 3 devices is idle, since tp 2 does not divide them" in " ".join(as_text(three).split())
    (change,) = [change for change in three.changes if change.what == "2 devices instead of 3"]
    report = three.best.report
    assert report.dollars.output == pytest.approx(1.5 * change.outcome.report.dollars.output, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"devices": 0}, "devices=0"), ({"budget": 0}, "budget=0"), ({"device": "h10"}, "the nearest is"),
     ({"slo": SLO(ttft_ms=1), "device": None}, "nobody says what a step costs")],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        found(**changes)


def test_the_command_prints_what_it_found_and_writes_it(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["--model", MODEL, "--device", "h100", "--devices", "1", "--trace", LOAD, "--budget", "1"]
    assert main(["plan", *arguments, "--slo", "ttft=500ms,tpot=30ms", "--json", str(path)]) == 0
    assert "99 % of requests" in " ".join(capsys.readouterr().out.split())
    assert json.loads(path.read_text())["devices"] == 1


def test_a_target_without_a_unit_is_refused_with_the_right_one(capsys):
    arguments = ["--model", MODEL, "--device", "h100", "--devices", "1", "--trace", LOAD]
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments, "--slo", "ttft=500"])
    assert end.value.code == 2
    assert "write ttft=500ms" in capsys.readouterr().err
