"""The folder of kept programs: what is read is what was written, by this user; anything else is as good as nothing."""

import errno
import os
import threading
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.startup.program_folder import ProgramFolder

CONTENT = bytes(range(256)) * 3


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "executables"


@pytest.fixture
def folder(path):
    made = ProgramFolder(path)
    made.write("decode-1", CONTENT)
    return made


def test_a_program_is_read_as_it_was_written_by_this_start_or_a_later_one(folder, path):
    assert folder.read("decode-1") == ProgramFolder(path).read("decode-1") == CONTENT
    assert folder.read("decode-2") is None
    folder.write("empty", b"")
    assert folder.read("empty") == b""


def test_the_folder_and_its_files_are_the_users_alone(folder, path):
    assert path.stat().st_mode & 0o777 == 0o700
    assert (path / "decode-1").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.iterdir()] == ["decode-1"]


@given(st.data())
def test_any_other_byte_or_length_is_a_miss(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("folder") / "own"
    kept = ProgramFolder(folder)
    kept.write("p", CONTENT)
    written = bytearray((folder / "p").read_bytes())
    if data.draw(st.booleans()):
        written[data.draw(st.integers(0, len(written) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        written = written[: data.draw(st.integers(0, len(written) - 1))]
    (folder / "p").write_bytes(written)
    assert kept.read("p") is None


@pytest.mark.parametrize("change", ["appended", "under another name", "empty", "text", "a folder", "a link"])
def test_what_is_not_as_it_was_written_is_a_miss(folder, path, tmp_path, change):
    file = path / "decode-1"
    written = file.read_bytes()
    file.unlink()
    match change:
        case "appended":
            file.write_bytes(written + b"\0")
        case "under another name":
            folder.write("decode-8", CONTENT)
            (path / "decode-8").rename(file)
        case "empty" | "text":
            file.write_text("" if change == "empty" else "a program")
        case "a folder":
            file.mkdir()
        case "a link":
            (tmp_path / "elsewhere").write_bytes(written)
            file.symlink_to(tmp_path / "elsewhere")
    assert folder.read("decode-1") is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_a_miss(folder, path, mode):
    (path / "decode-1").chmod(mode)
    assert folder.read("decode-1") is None


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_is_neither_read_nor_written(folder, path, mode):
    path.chmod(mode)
    with pytest.warns(UserWarning, match=r"cannot be kept in .* \(others may write to it\): every start compiles"):
        open_to_all = ProgramFolder(path)
    assert open_to_all.read("decode-1") is None
    open_to_all.write("decode-2", CONTENT)
    path.chmod(0o700)
    assert not (path / "decode-2").exists()


def test_what_belongs_to_another_user_is_neither_read_nor_written(folder, path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="it belongs to another user"):
        assert ProgramFolder(path).read("decode-1") is None
    with pytest.warns(UserWarning, match="it belongs to another user"):
        folder.write("decode-2", CONTENT)
    assert not (path / "decode-2").exists()


def test_a_link_to_a_folder_is_not_followed(folder, path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    with pytest.warns(UserWarning, match="cannot be kept in"):
        assert ProgramFolder(tmp_path / "link").read("decode-1") is None


def writes_and_reads(folder, *names):
    """Write two programs, and read these."""
    folder.write("p", CONTENT)
    folder.write("q", CONTENT)
    return [folder.read(name) for name in names or ("p",)]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_can_hold_no_folder_costs_one_line(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept in") as said:
        assert writes_and_reads(ProgramFolder(tmp_path / place)) == [None]
    assert len(said) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["open", "replace"])
def test_a_folder_that_takes_no_more_is_still_read_and_costs_one_line(folder, path, monkeypatch, call, number):
    real = os.open

    def refusing(*args, **kwargs):
        if call == "open" and not args[1] & os.O_CREAT:
            return real(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refusing)
    with pytest.warns(UserWarning, match=os.strerror(number)) as said:
        assert writes_and_reads(folder, "decode-1") == [CONTENT]
    assert len(said) == 1
    assert [file.name for file in path.iterdir()] == ["decode-1"]


def test_starts_at_the_same_time_leave_whole_programs(path):
    folders = [ProgramFolder(path) for _ in range(4)]
    contents = [bytes([index]) * 100_000 for index in range(len(folders))]
    seen = set()

    def work(index):
        for _ in range(30):
            folders[index].write("p", contents[index])
            seen.add(folders[index].read("p"))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen <= set(contents)
    assert [file.name for file in path.iterdir()] == ["p"]


def test_what_was_not_read_for_longest_goes_where_all_is_too_much(path):
    folder = ProgramFolder(path)
    for age, name in enumerate("dcba"):
        folder.write(name, bytes(1000))
        os.utime(path / name, (1e9 - 10 * age, 1e9 - 10 * age))
    assert folder.read("b") is not None  # and so it was read now
    ProgramFolder(path, most_bytes=3 * 1100).write("new", bytes(1000))
    assert {file.name for file in path.iterdir()} == {"b", "new", "d"}


def test_what_a_killed_start_left_half_written_is_removed_in_time(folder, path):
    for name, age in (("old", 7200), ("new", 60)):
        (path / f".{name}.1.2").write_bytes(b"half")
        then = (path / "decode-1").stat().st_mtime - age
        os.utime(path / f".{name}.1.2", (then, then))
    folder.write("decode-2", CONTENT)
    assert {file.name for file in path.iterdir()} == {".new.1.2", "decode-1", "decode-2"}


def test_a_folder_that_is_well_says_nothing(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProgramFolder(path).write("p", CONTENT)
