"""Starting an engine: what is checked first, what happens last, and that nothing stays open when it fails."""

import threading

import pytest
from helpers.core_engine import make_engine, model_with_windows
from twinmesh.engine.startup import build
from twinmesh.engine.worker.local_executor import LocalExecutor

MODEL = model_with_windows(None)
EARLIER = "what an earlier run wrote"


class Failure(Exception):
    pass


def fail(*args, **kwargs):
    raise Failure


def refuse(*args, **kwargs):
    pytest.fail("this comes later")


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "run.log"
    path.write_text(EARLIER)
    return path


# In the order of start-up: memory is looked at when the weights are loaded.
@pytest.mark.parametrize("step", ["build_meshes", "memory_for_kv", "Compilation", "MeshWorker"])
def test_a_start_that_fails_leaves_an_earlier_log_as_it_was(step, log, monkeypatch):
    monkeypatch.setattr(build, step, fail)
    with pytest.raises(Failure):
        make_engine(MODEL, decision_log=log)
    assert log.read_text() == EARLIER


def test_a_start_that_fails_leaves_no_new_log(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "Compilation", fail)
    with pytest.raises(Failure):
        make_engine(MODEL, decision_log=tmp_path / "run.log")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["LocalExecutor", "EngineCore"])
def test_a_start_that_fails_at_last_closes_the_log_and_joins_every_thread(step, log, monkeypatch):
    opened, before = [], set(threading.enumerate())

    def open_log(path, run):
        opened.append(build_open_log(path, run))
        return opened[-1]

    def half_made_core(scheduler, executor, *rest):
        made = executor(lambda completion: None)
        assert isinstance(made, LocalExecutor)
        assert set(threading.enumerate()) > before
        raise Failure

    build_open_log = build.open_log
    monkeypatch.setattr(build.loader, "compile_ahead", lambda *kernels: None)  # whose thread ends by itself
    monkeypatch.setattr(build, "open_log", open_log)
    monkeypatch.setattr(build, step, fail if step == "LocalExecutor" else half_made_core)
    with pytest.raises(Failure):
        make_engine(MODEL, decision_log=log)
    assert set(threading.enumerate()) <= before
    with pytest.raises(ValueError, match="closed file"):
        opened[0].actions([])


@pytest.mark.parametrize("bad", ["directory", "missing/run.log", "x" * 300])
def test_a_log_that_cannot_be_written_is_refused_before_any_device_is_asked_for(bad, tmp_path, monkeypatch):
    (tmp_path / "directory").mkdir()
    monkeypatch.setattr(build, "build_meshes", refuse)
    with pytest.raises(ValueError, match=r"^decision_log='.*' cannot be written: .*\.$"):
        make_engine(MODEL, decision_log=tmp_path / bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"prefill_buckets": (16, 8)},
        {"decode_buckets": (2,)},
        {"max_retries": -1},
        {"max_model_len": 4096},
        {"policy": object()},
    ],
)
def test_options_are_checked_before_the_process_is_changed(bad, monkeypatch):
    for step in ("build_meshes", "kept_or_compiled"):
        monkeypatch.setattr(build, step, refuse)
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_engine(MODEL, kv_cache_bytes=1 << 20, **bad)


def test_programs_are_compiled_once_it_is_known_that_the_weights_fit(monkeypatch):
    monkeypatch.setattr(build, "kept_or_compiled", refuse)
    with pytest.raises(ValueError, match="lower max_model_len, or raise kv_cache_bytes"):
        make_engine(MODEL, kv_cache_bytes=1)


def test_an_engine_that_starts_overwrites_an_earlier_log(log):
    with make_engine(MODEL, decision_log=log):
        assert EARLIER not in log.read_text()
    assert "twinmesh decision log" in log.read_text()
