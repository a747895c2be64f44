"""Every preset on a real engine, of a tiny model: what comes of it is a report like any other."""

from dataclasses import replace

import pytest
from twinmesh import LLM
from twinmesh.engine.benchmark.engine_target import EngineTarget
from twinmesh.engine.benchmark.presets import PRESETS
from twinmesh.engine.benchmark.runner import run_preset
from twinmesh.engine.metrics.benchmark_file import About


@pytest.fixture(scope="module")
def target(tiny_path):
    with LLM(
        str(tiny_path), topology="prefill=1,decode=1", dtype="float32", max_model_len=64, max_num_seqs=4, page_size=16,
        prefill_buckets=(32,), decode_buckets=(4,),
    ) as llm:  # fmt: skip
        yield EngineTarget(llm, tiny_path, dollars_per_gpu_hour=2.0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_real_engine_runs_every_preset(name, target):
    preset, seen = replace(PRESETS[name], concurrencies=(2,)), []
    (point,) = run_preset(target, preset, About(), seen.append, scale=0.0005).points
    report, records, series = point.measured
    assert seen == [point]
    assert report.run.source == "measured"
    assert report.finished == report.requests == report.late.count == len(records) > 1
    assert [mesh.role for mesh in report.meshes] == ["prefill", "decode"]
    assert all(0 < mesh.busy < report.wall for mesh in report.meshes)
    assert report.dollars.output > 0
    assert report.tokens.cached + sum(report.missed_tokens.values()) == report.tokens.prompt
    assert max(series.running) <= 2
    assert all(figure.of(point.measured) is not None for figure in preset.figures)
