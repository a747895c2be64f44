"""Model names and the cache."""

from pathlib import Path

import pytest
from twinmesh.models.checkpoints.catalog import SMOLLM2, cache_directory, resolve_model
from twinmesh.models.errors import CheckpointError


def test_a_path_is_returned_as_it_is(tmp_path):
    for path in ("./smollm2", "dir/model.gguf", "model.gguf", tmp_path, Path("smollm2")):
        assert resolve_model(path) == Path(path)


def test_a_name_that_was_not_fetched_says_what_to_run(tmp_path):
    with pytest.raises(CheckpointError, match="run: twinmesh fetch smollm2"):
        resolve_model("smollm2", tmp_path)


def test_a_damaged_file_says_what_to_run(tmp_path):
    path = SMOLLM2.cached(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is damaged; run: twinmesh fetch smollm2"):
        resolve_model("smollm2", tmp_path)


def test_a_file_of_the_right_size_is_found(tmp_path):
    path = SMOLLM2.cached(tmp_path)
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(SMOLLM2.size)
    assert resolve_model("smollm2", tmp_path) == path


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(CheckpointError, match=r"no model named 'gpt5'.*names: smollm2"):
        resolve_model("gpt5")


@pytest.mark.parametrize("name", ["x" * 300, f"./{'x' * 300}.gguf"])
def test_a_name_that_no_file_can_have_is_refused_in_a_sentence(name):
    with pytest.raises(CheckpointError, match=rf"^The model {name} cannot be used: File name too long\.$"):
        resolve_model(name)


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "twinmesh"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_directory() == Path.home() / ".cache" / "twinmesh"
