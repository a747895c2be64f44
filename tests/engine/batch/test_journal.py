"""The journal: what is whole stays, what is damaged goes, and one process has it at a time."""

import errno
import fcntl
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twinmesh.engine.batch.journal import SYNC_SECONDS, Journal


def line(number, error=None):
    fields = {"id": f"batch_req_{number}", "custom_id": f"line-{number}", "response": None, "error": error}
    return json.dumps(fields).encode() + b"\n"


def recover(path, last_line=9, retry_errors=False):
    journal = Journal(path)
    try:
        return journal.recover(last_line, retry_errors=retry_errors)
    finally:
        journal.close()


def answered(kept):
    return [number for number, done in enumerate(kept.done) if done]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def test_whole_lines_stay_as_they_are(path):
    path.write_bytes(content := line(2) + line(1, error={"code": "x"}))
    inode = path.stat().st_ino
    kept = recover(path)
    assert path.read_bytes() == content
    assert path.stat().st_ino == inode
    assert answered(kept) == [1, 2]
    assert (kept.succeeded, kept.failed, kept.mended) == (1, 1, 0)


@pytest.mark.parametrize("length", range(1, len(line(3)) - 1))
def test_a_torn_last_line_is_cut_wherever_it_tore(path, length):
    path.write_bytes(line(1) + line(2) + line(3)[:length])
    kept = recover(path)
    assert path.read_bytes() == line(1) + line(2)
    assert answered(kept) == [1, 2]
    assert kept.mended == 1


def test_a_last_line_that_only_lacks_its_end_gets_it(path):
    path.write_bytes(line(1) + line(2)[:-1])
    assert answered(recover(path)) == [1, 2]
    assert path.read_bytes() == line(1) + line(2)


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 5000, b"\0" * 10 + b"\n", line(2)[:30] + b"\0" * 20 + line(2)[50:], b"{}\n", b"\n", b"[1]\n", b"\xff\n",
     b'{"id": "batch_req_0", "custom_id": "a", "response": null, "error": null}\n', line(10), line(1), b"[" * 99_999],
)  # fmt: skip
def test_what_a_power_loss_left_in_the_middle_is_taken_out(path, damage):
    after = line(3) + line(4)
    path.write_bytes(line(1) + damage + (b"" if damage.endswith(b"\n") else b"\n") + after)
    kept = recover(path)
    assert path.read_bytes() == line(1) + after
    assert answered(kept) == [1, 3, 4]
    assert kept.mended == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 900), st.integers(0, 200), st.integers(0, 900))
def test_whatever_was_lost_every_line_stands_once_and_is_one_of_ours(tmp_path_factory, order, at, zeros, end):
    path = tmp_path_factory.mktemp("journal") / "out"
    whole = b"".join(map(line, order))
    path.write_bytes((whole[:at] + b"\0" * zeros + whole[at + zeros :])[:end])
    kept = recover(path)
    left = path.read_bytes().splitlines(keepends=True)
    assert sorted(left) == [line(number) for number in answered(kept)]
    assert answered(recover(path)) == answered(kept)


def test_errors_are_kept_or_taken_out_to_be_tried_again(path):
    path.write_bytes(content := line(1, error={"code": "x"}) + line(2) + line(3, error={"code": "y"}))
    assert answered(recover(path)) == [1, 2, 3]
    assert path.read_bytes() == content
    kept = recover(path, retry_errors=True)
    assert answered(kept) == [2]
    assert (kept.retried, kept.failed, kept.mended) == (2, 0, 0)
    assert path.read_bytes() == line(2)


def test_a_second_process_is_refused_while_the_first_has_it(path):
    first = Journal(path)
    with pytest.raises(ValueError, match="is being written by another process"):
        Journal(path)
    first.rewrite([line(1)])
    with pytest.raises(ValueError, match="is being written by another process"):
        Journal(path)
    first.close()
    Journal(path).close()
    assert path.read_bytes() == line(1)


def test_one_that_waited_for_a_file_that_was_replaced_meanwhile_gets_the_new_one(path, monkeypatch):
    path.write_bytes(line(1))
    lock, times = fcntl.flock, 0

    def replaced_meanwhile(fd, how):
        nonlocal times
        times += 1
        if times == 1:
            (path.parent / "new").write_bytes(line(2))
            (path.parent / "new").replace(path)
        lock(fd, how)

    monkeypatch.setattr("fcntl.flock", replaced_meanwhile)
    assert answered(recover(path)) == [2]
    assert times == 2


def test_a_file_system_without_locks_is_warned_about(path, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        Journal(path).close()


def test_a_write_that_fails_half_way_is_taken_back(path, monkeypatch):
    import os

    journal, write = Journal(path), os.write
    journal.append(line(1))

    def half(fd, data):
        if len(data) < len(line(2)):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:20])

    monkeypatch.setattr("os.write", half)
    with pytest.raises(OSError, match="No space"):
        journal.append(line(2))
    monkeypatch.undo()
    assert path.read_bytes() == line(1)
    journal.append(line(3))
    journal.close()
    assert path.read_bytes() == line(1) + line(3)


def test_a_file_that_cannot_be_written_anew_is_as_it_was(path, monkeypatch):
    path.write_bytes(content := line(1, error={"code": "x"}) + line(2))

    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="No space"):
        recover(path, retry_errors=True)
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_was_written_is_put_on_disk_every_few_seconds(path, monkeypatch):
    synced, now = [], 0.0
    journal = Journal(path, clock=lambda: now)
    monkeypatch.setattr("os.fsync", synced.append)
    journal.append(line(1))
    assert synced == []
    now = SYNC_SECONDS
    journal.append(line(2))
    journal.append(line(3))
    assert len(synced) == 1
    now = 2 * SYNC_SECONDS
    journal.append(line(4))
    assert len(synced) == 2
    journal.close()


def test_results_come_in_the_order_of_the_input(path):
    path.write_bytes(line(7) + line(2) + line(5))
    journal = Journal(path)
    assert [fields["custom_id"] for fields in journal.results()] == ["line-2", "line-5", "line-7"]
    journal.close()
