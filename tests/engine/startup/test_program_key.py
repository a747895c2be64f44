"""Names of kept programs: everything that a program depends on changes its name, and nothing else does."""

import os
import re
import sys
from dataclasses import replace
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest
from helpers.tiny_mesh import tiny_config, tiny_model
from twinmesh.engine.kv_dtypes import KVDtype
from twinmesh.engine.protocol.service import SLO
from twinmesh.engine.sampling.request_rows import Stage
from twinmesh.engine.sharding.mesh import build_meshes
from twinmesh.engine.sizing.heads import model_on
from twinmesh.engine.startup import program_key
from twinmesh.engine.startup.program_key import describe_plan, hash_sources, program_name, read_cpu, surroundings
from twinmesh.engine.topology import Role
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.engine.worker.kv_cache import abstract_state
from twinmesh.engine.worker.mesh_plan import MeshPlan
from twinmesh.models.decoder import abstract_params


def plan(topology="both=1", model=None, mesh=0, pages=24, dtype="float32", **changes):
    model, config = model or tiny_model(), tiny_config(topology, dtype=dtype, **changes)
    devices, spec = build_meshes(config.topology)[mesh], config.topology.meshes[mesh]
    own = model_on(model, spec.tp)
    state = abstract_state(own, config, (pages,), KVDtype(dtype, dtype), devices)
    return MeshPlan(devices, spec, model, abstract_params(own, jnp.dtype(dtype)), config, state)


OTHERS = {
    "pages": dict(pages=25),
    "slots": dict(max_num_seqs=3),
    "length": dict(max_model_len=64),
    "page size": dict(page_size=8),
    "rows of a prefill step": dict(prefill_rows=2),
    "type": dict(dtype="bfloat16"),
    "tp": dict(topology="both=1xtp2"),
    "rows of a fused step": dict(decode_buckets=(1, 5)),
    "deterministic": dict(deterministic=True, decode_buckets=(4,)),
    "vocabulary": dict(model=replace(tiny_model(), vocab_size=51)),
    "layers": dict(model=tiny_model(None, None, None)),
    "window": dict(model=tiny_model(8, 8)),
    "epsilon": dict(model=replace(tiny_model(), rms_norm_eps=1e-6)),
    "family": dict(model=replace(tiny_model(), family="qwen3")),
}


def test_each_part_of_a_plan_changes_what_describes_it():
    assert describe_plan(plan()) == describe_plan(plan())
    described = {name: describe_plan(plan(**changes)) for name, changes in OTHERS.items()}
    assert len({describe_plan(plan()), *described.values()}) == 1 + len(OTHERS)


def test_surroundings_stay_the_same_while_nothing_changes():
    assert surroundings() == surroundings()


def test_each_version_that_takes_part_is_in_the_surroundings(monkeypatch):
    before, real = surroundings(), metadata.version
    for package in ("jax", "jaxlib", "flax", "numpy", "ml_dtypes"):
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "version", lambda name, one=package: real(name) + ".1" * (name == one))
            assert surroundings() != before


@pytest.mark.parametrize("name", ["XLA_FLAGS", "XLA_ANYTHING", "NPROC", "TF_XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_variables_that_change_what_is_compiled_are_in_the_surroundings(name, monkeypatch):
    before = surroundings()
    monkeypatch.setenv(name, "--xla_cpu_enable_fast_math=true")
    assert surroundings() != before


def test_the_number_of_cores_is_in_the_surroundings(monkeypatch):
    """XLA cuts a CPU's loops for the threads that it has."""
    before = surroundings()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(77))
    assert surroundings() != before


@pytest.mark.parametrize("feature", ["avx512_vnni", "avx2", "amx_tile"])
def test_an_instruction_set_more_is_another_cpu(feature, monkeypatch):
    before = surroundings()
    monkeypatch.setattr(program_key, "read_cpu", lambda: f"{read_cpu()} {feature}")
    assert surroundings() != before


def test_the_cpus_clock_is_not_in_its_description(tmp_path):
    path, lines = tmp_path / "cpuinfo", "processor\t: {0}\nmodel name\t: X\ncpu MHz\t\t: {0}\nflags\t\t: a b\n"
    seen = set()
    for number in (0, 1):
        path.write_text(lines.format(number) + "\n" + lines.format(9))
        seen.add(read_cpu(path))
    assert seen == {"model name\t: X\nflags\t\t: a b"}
    assert isinstance(read_cpu(tmp_path / "missing"), str)


@pytest.mark.parametrize(
    ("setting", "value"), [("jax_enable_custom_prng", True), ("jax_cpu_enable_async_dispatch", False)]
)
def test_a_setting_of_jax_is_in_the_surroundings(setting, value):
    before, earlier = surroundings(), jax.config.values[setting]
    try:
        jax.config.update(setting, value)
        assert surroundings() != before
    finally:
        jax.config.update(setting, earlier)


@pytest.mark.parametrize(
    ("setting", "value"), [("jax_enable_x64", True), ("jax_threefry_partitionable", False), ("jax_log_compiles", True)]
)
def test_a_setting_that_programs_do_not_see_is_not(setting, value):
    before, earlier = surroundings(), jax.config.values[setting]
    try:
        jax.config.update(setting, value)
        assert surroundings() == before
    finally:
        jax.config.update(setting, earlier)


def test_names_tell_kinds_sizes_plans_and_surroundings_apart():
    names = [
        program_name(*parts)
        for parts in (
            ("s", "p", "decode", (1,)), ("s", "p", "decode", (8,)), ("s", "p", "decode", (1, 8)),
            ("s", "p", "decode", (18,)), ("s", "p", "decode", ()), ("s", "p", "score", (1,)),
            ("s", "q", "decode", (1,)), ("r", "p", "decode", (1,)),
        )
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) < 200 for name in names)


@pytest.fixture
def package(tmp_path):
    for name in (
        "engine/a.py",
        "engine/worker/b.py",
        "models/c.py",
        "kernels_pallas/d.py",
        "tests/e.py",
        "engine/f.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x = {name!r}\n")
    return tmp_path


LATER = 1e11  # seconds: nothing has changed since then


@pytest.mark.parametrize("name", ["engine/a.py", "engine/worker/b.py", "models/c.py", "kernels_pallas/d.py"])
def test_a_source_that_is_changed_renamed_or_gone_is_another_source(package, name):
    seen = [hash_sources(package, LATER)]
    (package / name).write_text("y = 1\n")
    seen.append(hash_sources(package, LATER))
    (package / name).rename(package / (name + "x.py"))
    seen.append(hash_sources(package, LATER))
    (package / (name + "x.py")).unlink()
    seen.append(hash_sources(package, LATER))
    assert None not in seen
    assert len(set(seen)) == 4


def test_files_that_no_program_is_traced_from_are_not_looked_at(package):
    before = hash_sources(package, LATER)
    (package / "tests/e.py").write_text("")
    (package / "engine/f.txt").write_text("")
    assert hash_sources(package, LATER) == before


def test_sources_that_changed_since_the_process_started_are_not_what_it_runs(package):
    assert hash_sources(package, 1e9) is None
    assert hash_sources(package, None) is None


def test_a_package_without_sources_has_no_hash(tmp_path):
    assert hash_sources(tmp_path, LATER) is None


def test_sources_that_cannot_be_read_mean_that_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(program_key, "hash_sources", lambda package, started: None)
    assert surroundings() is None


def test_python_is_in_the_surroundings(monkeypatch):
    """Programs are kept as pickles."""
    before = surroundings()
    monkeypatch.setattr(sys, "version", "4.0")
    assert surroundings() != before


SAME = {
    "topology": dict(topology="both=2"),
    "device": dict(topology="both=2", mesh=1),
    "role": dict(topology="prefill=1,decode=1"),
    "mode": dict(topology="both(mode=fused)=1"),
    "sizes of prefill steps": dict(prefill_buckets=(8, 16)),
    "sizes of decode steps": dict(decode_buckets=(2, 4)),
    "sizes of transfers": dict(handoff_factor=2),
    "prefix cache": dict(prefix_cache=False),
    "retries": dict(max_retries=7),
    "pool": dict(topology="pool=2"),
    "roles of a pool": dict(topology="pool=2", roles=(Role.PREFILL, Role.DECODE)),
    "SLO": dict(slo=SLO(ttft_ms=100)),
    "ageing": dict(age_seconds=5.0),
    "bounds of the queue": dict(max_waiting=3, max_waiting_tokens=99),
}
PROGRAMS = (
    ("prefill", 16), ("score", 16), ("decode", 4), ("decode_steps", 4, 2), ("fused", 16), ("sample", Stage.DRAW, 4),
    ("gather", 1, 2), ("scatter", 1, 2), ("allocate",), ("load_dense",), ("copy_page", 0),
)  # fmt: skip


def texts_of(own):
    """The programs as text, without the lines of Python that they were traced from."""
    texts = [compile_program(own, *program).as_text() for program in PROGRAMS]
    return [re.sub(r"\{file_name_id=[^}]*\}|metadata=\{[^}]*\}", "", text.partition("%")[2]) for text in texts]


@pytest.fixture(scope="module")
def texts():
    return texts_of(plan())


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME)
def test_what_decides_only_which_programs_there_are_changes_none_of_them_and_no_name(texts, changes):
    assert describe_plan(plan(**changes)) == describe_plan(plan())
    assert texts_of(plan(**changes)) == texts
