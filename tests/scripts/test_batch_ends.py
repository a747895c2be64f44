"""`twinmesh batch` as a process that is killed, stopped or runs out of room, and is then started again."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import pytest
from helpers import batch_process
from helpers.batch_files import BatchFiles, prompts

LINES = 300
LOOKS = 30_000


@pytest.fixture
def files(tmp_path):
    files = BatchFiles(tmp_path)
    files.write(prompts(LINES))
    return files


def command(files, *args, seconds="0.002", limit=0):
    """What starts the run; `limit`: the most bytes that a file of it may have, 0: any."""
    parts = [sys.executable, batch_process.__file__, seconds, limit, "--model", files.model]
    return [str(part) for part in (*parts, "--input", files.source, "--output", files.target, *args)]


def start(files, *args, **options):
    """The run as a process."""
    return subprocess.Popen(command(files, *args, **options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def size(files):
    return files.target.stat().st_size if files.target.exists() else 0


def wait_until(process, is_so):
    """Until something is so, or the process has ended."""
    for _ in range(LOOKS):
        if is_so() or process.poll() is not None:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.002)
    process.kill()
    pytest.fail("What was waited for never came, and the process did not end.")


def wait_until_it_writes(process, files, more):
    """Until the output has grown by `more` bytes, or the process has ended."""
    before = size(files)
    wait_until(process, lambda: size(files) >= before + more)


def computed(files):
    return (files.folder / f"{files.output_name}.computed").stat().st_size


def test_twenty_kills_lose_nothing_and_repeat_nothing(files):
    draw = random.Random(1)
    for kill in range(20):
        process = start(files, seconds="0.01")
        if kill % 2:
            wait_until_it_writes(process, files, draw.randrange(1, 4000))
        else:
            with pytest.raises(subprocess.TimeoutExpired):  # while it starts, or soon after
                process.wait(draw.uniform(0.1, 0.4))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(files)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert Counter(files.ids()) == Counter(f"id{i}" for i in range(LINES))
    assert all(line["response"]["body"]["choices"][0]["text"] == line["custom_id"][2:] for line in files.read())
    # A result that was computed and not yet written is lost with the process.
    assert LINES <= computed(files) <= LINES + 20


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_order_and_says_how_to_go_on(files, number, code):
    process = start(files)
    wait_until_it_writes(process, files, 2000)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    written = len(files.read())
    place = f"{written} of {LINES} results are in {files.target}"
    assert err.splitlines()[-1] == f"twinmesh: Stopped. {place}; the same command goes on from there."
    assert "Traceback" not in err
    process = start(files, seconds="0")
    process.communicate()
    assert process.returncode == 0
    assert Counter(files.ids()) == Counter(f"id{i}" for i in range(LINES))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_also_while_stdin_is_silent(files, number, code):
    parts = command(files)
    parts[parts.index("--input") + 1] = "-"
    process = subprocess.Popen(parts, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdin.write('{"prompt": "a"}\n{"prompt": "b"}\n')
    process.stdin.flush()
    wait_until(process, lambda: size(files) and len(files.read()) == 2)
    process.send_signal(number)
    process.wait()
    err = process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    assert process.returncode == code
    said = f"twinmesh: Stopped. 2 results are in {files.target}; a run from stdin cannot be resumed."
    assert err.splitlines()[-1] == said
    assert len(files.read()) == 2


def test_a_file_that_may_not_grow_stops_the_run_which_goes_on_later(files):
    process = start(files, limit=20_000)
    _, err = process.communicate()
    assert process.returncode == 3
    written = files.read()  # whole lines only
    assert 0 < len(written) < LINES
    assert size(files) <= 20_000
    assert f"There is no room for more of {files.target} (File too large): make some. {len(written)} of {LINES}" in err
    assert "Traceback" not in err
    process = start(files, seconds="0")
    process.communicate()
    assert process.returncode == 0
    assert Counter(files.ids()) == Counter(f"id{i}" for i in range(LINES))


def test_closed_standard_streams_neither_stop_it_nor_lend_their_numbers_to_the_output(files):
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    process = subprocess.Popen([*closing, *command(files, seconds="0.01")])
    wait_until_it_writes(process, files, 1)
    opened = {number: os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)}
    assert set(opened.values()) == {os.devnull}
    process.wait()
    assert process.returncode == 0
    assert len(files.ids()) == LINES


def test_a_second_process_is_refused_and_the_first_goes_on(files):
    first = start(files)
    wait_until_it_writes(first, files, 1)
    first.send_signal(signal.SIGSTOP)  # so that it has not ended before the second has started, however slow that is
    second = start(files)
    _, err = second.communicate()
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert err.startswith(f"twinmesh: {files.target} is being written by another process: ")
    assert err.count("\n") == 1
    first.communicate()
    assert first.returncode == 0
    assert len(files.ids()) == LINES


def usage(files, lines):
    """What a run over so many lines needed: the most memory, in KiB, and the bytes that it read and wrote."""
    with files.source.open("w") as file:
        file.writelines(f'{{"prompt": "{i}", "custom_id": "id{i}"}}\n' for i in range(lines))
    files.target.unlink(missing_ok=True)
    process = start(files, seconds="0")
    out, err = process.communicate()
    assert process.returncode == 0, err
    with files.target.open("rb") as file:
        assert sum(1 for _ in file) == lines
    return map(int, out.split())


def test_memory_and_what_is_read_and_written_for_a_line_do_not_grow_with_the_lines(files):
    lines = 1_000, 5_000, 30_000  # at the second all buffers are full
    (_, first), (memory, second), (most_memory, third) = (usage(files, count) for count in lines)
    # As much for a line as lets a million run in 128 MiB.
    assert (most_memory - memory) * 1024 < 80 * (lines[2] - lines[1])
    early, late = (second - first) / (lines[1] - lines[0]), (third - second) / (lines[2] - lines[1])
    assert late < 1.1 * early


@pytest.mark.long
def test_a_million_lines_take_no_more_memory_than_a_few(files):
    memory, _ = usage(files, 1_000_000)
    assert memory < 128 * 1024  # KiB, of which Python and numpy take about a third
