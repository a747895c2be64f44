"""The host's memory while a model loads, as the operating system counts it: each load in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from twinmesh.scripts.bench import load as bench_load

pytestmark = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts peaks")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """91 MB, of which the tables take 33 MB each."""
    return bench_load.write_llama(tmp_path_factory.mktemp("llama"), 0.09, hidden=512)


@pytest.mark.parametrize(
    ("topology", "dtype"),
    [
        ("both=1", "bfloat16"),
        ("both=1", "float32"),
        ("both=1xtp2", "bfloat16"),
        ("both=1xtp4", "float32"),
        ("prefill=1,decode=2", "bfloat16"),  # one copy for the three
    ],
)
def test_the_peak_is_the_shards_and_at_most_one_and_a_half_times_the_largest_parameter(directory, topology, dtype):
    command = [sys.executable, bench_load.__file__, "--worker", str(directory), topology, dtype]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["peak_bytes"] > row["shard_bytes"] / 2  # it was counted at all
    assert row["largest_above_shards"] <= 1.5
    assert row["file_bytes"] > sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def test_what_was_freed_goes_back_to_the_system():
    """Many small pieces stay in the heap when they are freed, unless it is trimmed."""
    code = (
        "from pathlib import Path\n"
        "from twinmesh.engine.startup.memory import give_back_freed\n"
        "def held(): return int(Path('/proc/self/status').read_text().split('RssAnon:')[1].split()[0]) // 1024\n"
        "import ctypes; libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "pieces = [libc.malloc(60_000) for _ in range(3000)]\n"
        "for piece in pieces: ctypes.memset(ctypes.c_void_p(piece), 1, 60_000)\n"
        "last = libc.malloc(60_000)  # the heap's end is in use\n"
        "for piece in pieces: libc.free(piece)\n"
        "before = held(); give_back_freed(); print(before - held())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100
