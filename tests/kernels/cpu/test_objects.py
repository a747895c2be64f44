"""Kernels on disk: what was written is read, and whatever else lies there is not."""

import os

import pytest
from twinmesh.kernels_pallas.cpu import objects
from twinmesh.models.checkpoints.catalog import cache_directory

CODE = bytes(range(256)) * 8


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kernels" / "kernel.o"


def test_what_was_written_is_read(path):
    assert objects.read(path) is None
    objects.write(path, CODE)
    assert objects.read(path) == CODE
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["kernel.o"]


@pytest.mark.parametrize("place", [0, 5, 17, 18, 30, 49, 50, 51, 1000, -1])
def test_a_file_with_a_flipped_bit_is_not_read(path, place):
    objects.write(path, CODE)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    assert objects.read(path) is None
    objects.write(path, CODE)
    assert objects.read(path) == CODE


@pytest.mark.parametrize("length", [0, 1, 18, 49, 50, 51, -1])
def test_a_file_that_is_cut_short_is_not_read(path, length):
    objects.write(path, CODE)
    path.write_bytes(path.read_bytes()[:length])
    assert objects.read(path) is None


def test_a_longer_file_is_not_read(path):
    objects.write(path, CODE)
    path.write_bytes(path.read_bytes() + b"\0")
    assert objects.read(path) is None


def test_a_file_under_anothers_name_is_not_read(path):
    objects.write(path, CODE)
    path.rename(path.with_name("other.o"))
    assert objects.read(path.with_name("other.o")) is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_not_read(path, mode):
    objects.write(path, CODE)
    path.chmod(mode)
    assert objects.read(path) is None


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_neither_read_nor_written(path, mode):
    objects.write(path, CODE)
    path.parent.chmod(mode)
    assert objects.read(path) is None
    with pytest.raises(PermissionError, match="others may write to it"):
        objects.write(path, CODE)


def test_a_folder_of_another_user_is_neither_read_nor_written(path, monkeypatch):
    objects.write(path, CODE)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert objects.read(path) is None
    with pytest.raises(PermissionError, match="belongs to another user"):
        objects.write(path, CODE)


def test_a_write_that_fails_leaves_nothing_behind(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    objects.write(path, CODE)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        objects.write(path.with_name("other.o"), CODE)
    assert [file.name for file in path.parent.iterdir()] == ["kernel.o"]


def test_the_folder_lies_in_the_cache(monkeypatch, tmp_path):
    for value in (str(tmp_path), "relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert objects.default_folder() == cache_directory() / "kernels"
