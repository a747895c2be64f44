"""What a driver makes of what its workers have found: refusals before anything loads, and the least that all can do."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from helpers.core_engine import greedy
from helpers.workers import OPTIONS
from twinmesh import LLM
from twinmesh.engine.config import EngineConfig, GpuShare
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.startup.worker_part import (
    Asked,
    Found,
    asked_options,
    files_stamp,
    read_found,
    read_options,
    to_bytes,
    versions,
)
from twinmesh.engine.startup.workers import check_alike, why_not, why_over
from twinmesh.engine.topology import Topology
from twinmesh.engine.worker.remote.processes import WorkerProcesses

TOPOLOGY = Topology.parse("prefill=1,decode=2")
CONFIG = EngineConfig(TOPOLOGY, 128, decode_buckets=(32,))
FOUND = Found(versions(), "cpu", "cpu", CONFIG, 8, (1 << 20,), {}, "stamp")


class Named:
    """A crew, as far as messages name its workers."""

    class backend:
        @staticmethod
        def name(worker):
            return f"worker {worker}"


def changed(**changes):
    return msgspec.structs.replace(FOUND, **changes)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            changed(versions=FOUND.versions | {"jax": "0.1"}),
            r"^worker 1 has jax 0\.1 and this process has .*: install the same everywhere\.$",
        ),
        (
            changed(platform="gpu", device_kind="H100"),
            r"^worker 1 has devices of kind H100 \(gpu\) and worker 0 has cpu \(cpu\): the meshes of one engine need",
        ),
        (
            changed(config=replace(CONFIG, dtype="bfloat16")),
            r"^worker 1 would compute in bfloat16 and worker 0 in float32: name one dtype\.$",
        ),
        (
            changed(config=replace(CONFIG, prefill_buckets=(16,))),
            r"^worker 1 finds other defaults for its devices, or other files, than worker 0: let the machines",
        ),
    ],
)
def test_workers_that_differ_are_refused_by_name(other, says):
    check_alike(Named(), [FOUND, FOUND])
    with pytest.raises(ValueError, match=says) as caught:
        check_alike(Named(), [FOUND, other])
    assert "\n" not in str(caught.value)


def test_shorter_contexts_are_no_difference():
    check_alike(Named(), [FOUND, changed(config=replace(CONFIG, max_model_len=64))])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (FOUND, None),
        (changed(budgets=(1,)), None),
        (changed(files="other"), "the model's files have changed since the engine started: start the engine anew."),
        (
            changed(versions={}),
            "another version was installed since the engine started: start the engine anew.",
        ),
        (changed(device_kind="other"), "its devices are other now and were cpu."),
    ],
)
def test_a_worker_that_is_not_as_it_was_may_not_join(other, says):
    assert why_not(FOUND, to_bytes(other)) == says


def test_what_was_found_by_another_version_is_refused_in_a_sentence():
    says = r"^what it has found cannot be read here \(.*\): install the same version of Twinmesh everywhere\.$"
    with pytest.raises(ValueError, match=says):
        read_found(msgspec.msgpack.encode({"versions": {}}))
    assert re.match(says, why_not(FOUND, b""))


def test_new_weights_change_the_stamp_of_a_model_and_other_files_do_not(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("before")
    before = files_stamp(tmp_path)
    (tmp_path / "results.jsonl").write_text("a line")
    assert files_stamp(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("longer than before")
    assert files_stamp(tmp_path) != before
    assert files_stamp(tmp_path / "config.json") not in (before, files_stamp(tmp_path))


def test_an_engine_is_over_when_a_phase_has_no_mesh_left():
    assert why_over(TOPOLOGY, {1}) is None
    assert why_over(TOPOLOGY, {1, 2}) == "no mesh is left to decode"
    assert why_over(TOPOLOGY, {0}) == "no mesh is left to prefill"
    assert why_over(Topology.parse("pool=2"), {1}) is None


def test_options_cross_but_those_that_are_the_drivers():
    given = dict(
        topology="prefill=1xtp2,decode=1", dtype="bfloat16", prefill_buckets=(16, 32), slo=SLO(ttft_ms=5), mmap=False
    )
    again = read_options(asked_options(EngineOptions("m", workers="processes", seed=3, progress=True, **given)))
    assert again == EngineOptions("m", **given)


def test_a_share_of_gpus_crosses_as_what_it_is_and_folders_stay():
    given = EngineOptions("m", workers="processes", memory_fraction=GpuShare(0.5), profile_dir=Path("traces"))
    again = read_options(msgspec.msgpack.decode(to_bytes(asked_options(given)), type=Asked))
    assert isinstance(again.memory_fraction, GpuShare)
    assert again == EngineOptions("m", memory_fraction=0.5)


def test_what_is_no_plain_data_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"^hf_overrides=\{.*\} cannot be sent to workers \(.*\): use plain numbers"):
        asked_options(EngineOptions("m", workers="processes", hf_overrides={"rope_theta": object()}))


def test_each_process_sees_the_gpus_of_its_own_meshes(monkeypatch):
    backend = WorkerProcesses(Topology.parse("prefill=1xtp2,decode=2"))
    assert [place.meshes for place in backend.places] == [(0,), (1,), (2,)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [backend.environment(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(3)] == ["0,1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert [backend.environment(worker)["CUDA_VISIBLE_DEVICES"] for worker in range(3)] == ["7,5", "3", "1"]


def test_a_model_that_is_not_there_is_refused_before_any_worker_starts(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.gguf"):
        LLM(tmp_path / "nothing.gguf", topology="prefill=1,decode=1", workers="processes")


@pytest.mark.long
def test_what_only_a_worker_finds_out_is_refused_in_a_sentence_that_names_it(tiny_path):
    with pytest.raises(
        ValueError, match=r"^worker [01] \(process \d+\) cannot serve: .*memory_fraction.*\.$"
    ) as caught:
        LLM(tiny_path, topology="both=2", workers="processes", memory_fraction=0.5, **OPTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_a_decision_log_of_workers_that_were_killed_replays(tiny_path, tmp_path):
    from helpers.workers import kill, start, wait_until_back
    from twinmesh.engine.simulation.logs.replay import replay

    with start(tiny_path, decision_log=tmp_path / "log") as llm:
        stream = llm.stream([5, 6, 7], greedy(30))
        deltas = iter(stream)
        next(deltas)
        epoch = kill(llm, 1)
        assert sum(len(delta.token_ids) for delta in deltas) >= 28
        wait_until_back(llm, 1, epoch)
    with open(tmp_path / "log", encoding="utf-8") as file:
        assert replay(file).events
