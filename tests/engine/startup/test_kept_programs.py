"""A second start reads its programs back: nothing is traced, lowered or compiled, and the tokens are the same."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from helpers.core_engine import greedy, make_engine, model_with_windows, prompts_of
from helpers.tiny_mesh import tiny_config, tiny_plans
from jax.experimental.compilation_cache import compilation_cache
from twinmesh import SamplingParams
from twinmesh.engine.startup import build, kept_programs, program_key
from twinmesh.engine.startup.kept_programs import KeptPrograms, kept_or_compiled, load
from twinmesh.engine.startup.program_folder import ProgramFolder
from twinmesh.engine.startup.program_key import surroundings
from twinmesh.engine.worker.compile_program import compile_program
from twinmesh.kernels_pallas.cpu import loader
from twinmesh.models.checkpoints.catalog import cache_directory

MODEL = model_with_windows(None, 6)
PROMPTS = prompts_of(5, 20, 3)
PARAMS = [
    greedy(12),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=7, repetition_penalty=1.2, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=12, logprobs=3, prompt_logprobs=2, ignore_eos=True),
]
FUSED = "both(mode=fused)=1"
SIZES = dict(decode_buckets=(8,))  # as many rows as a step of prompts has, so that they share what samples


@pytest.fixture(autouse=True, scope="module")
def _without_jaxs_cache():
    """What JAX reads from its own cache, in this process or from disk, cannot be kept."""
    chosen = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    jax.config.update("jax_compilation_cache_dir", chosen)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def _choose_nothing():
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def start(folder, topology=FUSED, *, compile_with=compile_program, **changes):
    """Start an engine over the folder; return its answers, and the kinds and sizes of what was compiled."""
    compiled = []

    def counting(plan, kind, *size):
        compiled.append((kind, *size))
        return compile_with(plan, kind, *size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_programs, "compile_program", counting)
        patch.setattr(build, "kept_or_compiled", lambda *_: KeptPrograms(ProgramFolder(folder), surroundings()))
        with make_engine(MODEL, topology, room=6, **(SIZES | changes)) as llm:
            outputs = llm.generate(PROMPTS, PARAMS)
            assert llm.metrics().compiles == 0
    made = [(output.prompt_logprobs, output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]
    assert not any(output.error for output in outputs)
    return made, compiled


def tokens_of(answers):
    return [tokens for _, tokens, _ in answers]


class Compiled(Exception):
    """In place of a compilation that a test only wants to see begin."""


def refuse(*_):
    raise Compiled


def one_plan():
    return tiny_plans(tiny_config())[0][0]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder after a first start, its answers and what it compiled."""
    folder = tmp_path_factory.mktemp("kept") / "executables"
    return folder, *start(folder)


@pytest.fixture
def folder(first, tmp_path):
    """A copy of that folder."""
    shutil.copytree(first[0], tmp_path / "executables")
    return tmp_path / "executables"


def test_a_second_start_compiles_nothing_and_answers_the_same(first, folder):
    _, answers, compiled = first
    assert len(compiled) == len(list(folder.iterdir()))
    assert start(folder, compile_with=refuse) == (answers, [])


def test_programs_of_several_devices_and_hand_offs_are_kept_and_no_mesh_compiles_what_another_has(tmp_path):
    answers, compiled = start(tmp_path / "own", "pool=2xtp2", roles="prefill=1,decode=1")
    assert {"gather", "scatter"} <= {kind for kind, *_ in compiled}
    assert len(compiled) == len({*compiled})
    assert start(tmp_path / "own", "pool=2xtp2", roles="both=2", compile_with=refuse) == (answers, [])


def test_a_pool_takes_the_programs_of_one_mesh_whatever_the_roles(first, folder):
    """Those of hand-offs are all that an engine without any does not have."""
    split, compiled = start(folder, "pool=2", roles="prefill=1,decode=1")
    assert {kind for kind, *_ in compiled} == {"gather", "scatter"}
    assert split == start(folder, "pool=2", roles="both=2", compile_with=refuse)[0]
    assert tokens_of(split) == tokens_of(first[1])


@pytest.mark.parametrize("topology", ["both=2", "both=2xtp2"])
def test_a_program_of_one_mesh_runs_on_the_devices_of_another(tmp_path, monkeypatch, topology):
    plans, _ = tiny_plans(tiny_config(topology))
    make = KeptPrograms(ProgramFolder(tmp_path / "own"), "")
    make(plans[0], "allocate")
    monkeypatch.setattr(kept_programs, "compile_program", refuse)
    for array in jax.tree.leaves(make(plans[1], "allocate")()):
        assert array.sharding.device_set == {*plans[1].mesh.devices.flat}


def test_a_program_that_cannot_be_moved_is_compiled(tmp_path, monkeypatch):
    plans, _ = tiny_plans(tiny_config("both=2"))
    monkeypatch.setattr(kept_programs, "load_onto", refuse)
    make = KeptPrograms(ProgramFolder(tmp_path / "own"), "")
    for plan in plans:
        (device,) = plan.mesh.devices.flat
        assert {array.device for array in jax.tree.leaves(make(plan, "allocate")())} == {device}


@pytest.mark.parametrize(
    "changes", [{"max_num_seqs": 3}, {"page_size": 8}, {"topology": "both=1xtp2"}, {"dtype": "bfloat16"}]
)
def test_programs_of_another_engine_are_not_taken(folder, changes):
    with pytest.raises(Compiled):
        start(folder, compile_with=refuse, **changes)


def test_every_damaged_program_is_made_again_and_no_other(first, folder):
    damaged = []
    for index, file in enumerate(sorted(folder.iterdir())[:3]):
        damaged.append(file.name)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes([data, data[:-1], b""][index])
    answers, compiled = start(folder)
    assert answers == first[1]
    assert sorted(kind for kind, *_ in compiled) == sorted(name.partition("-")[0] for name in damaged)
    assert start(folder, compile_with=refuse) == (answers, [])


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04N."], ids=["empty", "text", "None"])
def test_a_file_that_was_written_whole_and_is_no_program_is_a_miss(folder, content):
    kept = ProgramFolder(folder)
    for file in folder.iterdir():
        kept.write(file.name, content)
    with pytest.raises(Compiled):
        start(folder, compile_with=refuse)


@pytest.mark.parametrize("package", ["jax", "jaxlib", "flax"])
def test_another_version_compiles_its_own(folder, monkeypatch, package):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: real(name) + ".1" * (name == package))
    with pytest.raises(Compiled):
        start(folder, compile_with=refuse)


def test_another_cpu_compiles_its_own(folder, monkeypatch):
    monkeypatch.setattr(program_key, "read_cpu", lambda: "a CPU without AVX-512")
    with pytest.raises(Compiled):
        start(folder, compile_with=refuse)


@pytest.mark.parametrize(
    "own", [None, "twinmesh.decode_float32:64.fedcba9876543210"], ids=["absent", "another version"]
)
def test_a_program_that_calls_a_kernel_which_is_not_here_is_a_miss(monkeypatch, own):
    asked = []
    monkeypatch.setattr(loader, "target", lambda name, *parameters: (asked.append((name, *parameters)), own)[1])
    data = pickle.dumps(([0], b"\n\x01twinmesh.decode_float32:64.0123456789abcdef\x12", None, None))
    with pytest.raises(LookupError, match=r"decode_float32:64\.0123456789abcdef"):
        load(data, one_plan())
    assert asked == [("decode_float32", 64)]


@pytest.mark.parametrize("tools", [None, SimpleNamespace(identity="another")], ids=["no kernels", "others"])
def test_kernels_of_another_version_are_other_surroundings(monkeypatch, tools):
    monkeypatch.setattr(loader, "toolchain", lambda: SimpleNamespace(identity="one"))
    before = surroundings()
    monkeypatch.setattr(loader, "toolchain", lambda: tools)
    assert surroundings() != before


def test_a_folder_that_takes_nothing_costs_one_line(tmp_path):
    (tmp_path / "file").write_text("it is in the way")
    with pytest.warns(UserWarning, match="cannot be kept in") as said:
        folder = ProgramFolder(tmp_path / "file")
    make = KeptPrograms(folder, "")
    assert None not in [make(one_plan(), "copy_page", group) for group in (0, 0)]
    assert len(said) == 1


def test_a_program_that_jax_does_not_serialise_is_not_kept(tmp_path, monkeypatch):
    def refuse(program):
        raise NotImplementedError

    monkeypatch.setattr(kept_programs, "serialize", refuse)
    assert KeptPrograms(ProgramFolder(tmp_path / "own"), "")(one_plan(), "copy_page", 0) is not None
    assert not list((tmp_path / "own").iterdir())


def test_programs_are_kept_in_a_folder_of_the_users(tmp_path):
    assert isinstance(kept_or_compiled(tmp_path, "cpu"), KeptPrograms)
    assert [path.name for path in tmp_path.iterdir()] == [f"executables-{os.geteuid()}"]
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("why", ["a GPU", "sources that changed"])
def test_jaxs_own_cache_is_in_their_place_where_executables_cannot_be_kept(tmp_path, monkeypatch, why):
    if why != "a GPU":
        monkeypatch.setattr(kept_programs, "surroundings", lambda: None)
    assert kept_or_compiled(tmp_path, "gpu" if why == "a GPU" else "cpu") is compile_program
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_the_process_has_chosen_is_the_only_one(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    assert kept_or_compiled(tmp_path / "own", "cpu") is compile_program
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "chosen")
    assert not (tmp_path / "own" / f"executables-{os.geteuid()}").exists()


def test_nothing_is_kept_where_jaxs_cache_is_turned_off(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert kept_or_compiled(tmp_path, "cpu") is compile_program
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert list(tmp_path.iterdir()) == []
    assert jax.config.jax_compilation_cache_dir is None


def test_what_is_compiled_once_a_cache_was_chosen_is_not_kept(tmp_path):
    """JAX may have read it there."""
    make = KeptPrograms(ProgramFolder(tmp_path / "own"), "")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
    make(one_plan(), "copy_page", 0)
    assert list((tmp_path / "own").iterdir()) == []


def script(tmp_path):
    """A start in a process of its own, over files of its own; the cache is in the environment."""
    path = tmp_path / "start.py"
    path.write_text(
        "import json, sys, jax, jax.monitoring\n"
        "events = []\n"
        "jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: events.append(event))\n"
        "from twinmesh import LLM, SamplingParams\n"
        "options = dict(max_model_len=64, page_size=16, max_num_seqs=2, prefill_buckets=(16,), decode_buckets=(8,))\n"
        "with LLM(sys.argv[1], kv_cache_bytes=1 << 20, dtype='float32', **options) as llm:\n"
        "    made = [event for event in events if 'jaxpr_to_mlir' in event or 'backend_compile' in event]\n"
        "    (out,) = llm.generate('hello', SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))\n"
        "    print(json.dumps([len(made), list(out.outputs[0].token_ids), llm.metrics().compiles]))\n"
    )
    return path


def in_a_process(tmp_path, model):
    package, kernels = Path(build.__file__).parents[2], tmp_path / "cache" / "twinmesh" / "kernels"
    if not kernels.exists():  # what has nothing to do with programs is not to be compiled anew
        kernels.parent.mkdir(parents=True)
        (cache_directory() / "kernels").mkdir(mode=0o700, parents=True, exist_ok=True)
        kernels.symlink_to(cache_directory() / "kernels")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, script(tmp_path), model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=package.parent, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_another_process_reads_what_one_has_kept(tmp_path, tiny_path):
    made, tokens, _ = in_a_process(tmp_path, tiny_path)
    assert made > 10
    warm, again, compiles = in_a_process(tmp_path, tiny_path)
    assert (again, compiles) == (tokens, 0)
    assert warm < 5  # what loading weights compiles
