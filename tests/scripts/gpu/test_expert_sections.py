"""The suite's sections with experts, tried on the CPU at toy sizes: what they report, and how far it holds together."""

import json

import pytest
from twinmesh.scripts.gpu import aims as gpu_aims
from twinmesh.scripts.gpu import experts as gpu_experts
from twinmesh.scripts.gpu import facts as gpu_facts
from twinmesh.scripts.gpu import steps as gpu_steps

SCALE = 1e-3


def report_of(section):
    """All that a section finds, as its line of JSON brings it to the report."""
    found = {}
    for piece in section(SCALE):
        gpu_facts.merge(found, gpu_facts.read(gpu_facts.line(piece)))
    return json.loads(json.dumps(found))


@pytest.fixture
def toy(monkeypatch):
    """One format, few experts, and one call for each time: what a time is worth is not for tests."""
    monkeypatch.setattr(gpu_experts, "EXPERTS", 4)
    monkeypatch.setattr(gpu_experts, "LAYERS", 1)
    monkeypatch.setattr(gpu_experts, "CHECKED_ROWS", (3,))
    monkeypatch.setattr(gpu_experts, "ROWS", (800,))
    monkeypatch.setattr(gpu_experts, "HOPPER_FORMATS", ("MXFP4",))
    monkeypatch.setattr(gpu_steps, "BATCHES", (2,))
    monkeypatch.setattr(gpu_steps, "PROFILED", (2,))


def test_experts_are_checked_in_every_format_and_timed_beside_their_floors(toy):
    found = report_of(gpu_experts.experts)
    assert "failed" not in found
    assert set(found["errors"]) == {"MXFP4", "bfloat16"}
    assert all(0 < errors["3"] < gpu_experts.LIMIT for errors in found["errors"].values())
    assert set(found["rows"]) == {"MXFP4 8", "bfloat16 8"}
    for name, row in found["rows"].items():
        assert row["us"] > 0
        assert row["of_floor"] == pytest.approx(row["floor_us"] / row["us"])
        # A row chooses four of the experts; of bfloat16, both floors are the same.
        assert row["experts"] == 4
        is_less = row["floor_us"] < row["bfloat16_floor_us"]
        assert is_less == name.startswith("MXFP4")


def test_steps_of_gpt_oss_have_floors_and_a_public_figure_with_its_source(toy):
    found = report_of(gpu_steps.gpt_oss)
    assert set(found["public"]) == {"tokens_s", "source"}
    assert set(found["decode"]) == {"2"}
    row = found["decode"]["2"]
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
    assert 0 < row["weights_floor_ms"] < row["floor_ms"]
    assert "vllm_ms" not in row
    assert row["budget"]["kinds_ms"]
    assert found["prefill"]["of_matmul"] > 0


def test_aims_of_experts_are_null_until_they_are_measured():
    names = {"experts in MXFP4 over the floor in 16 bits", "decode step of gpt-oss of its floor"}
    nothing = gpu_aims.aims({})
    assert all(nothing[name]["met"] is None for name in names)
    rows = {"MXFP4 1": {"us": 20.0, "bfloat16_floor_us": 30.0}, "bfloat16 1": {"us": 60.0, "bfloat16_floor_us": 30.0}}
    steps = {"decode": {"1": {"of_floor": 0.8}}}
    found = gpu_aims.aims({"experts": {"rows": rows}, "steps_gpt_oss": steps})
    assert found["experts in MXFP4 over the floor in 16 bits"]["found"] == 1.5
    assert all(found[name]["met"] for name in names)
