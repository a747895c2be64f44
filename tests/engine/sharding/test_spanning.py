"""Of a mesh over two processes each has its own shards of the weights, and reads little else."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import pytest
from helpers.mesh_member import read_weights
from helpers.tiny_directory import write_tiny_llama_directory
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from twinmesh.engine.protocol.worker import Member
from twinmesh.engine.sharding.spanning import join, spanned_devices
from twinmesh.engine.topology import TopologyError

MEMBER = Path(helpers.__path__[0]) / "mesh_member.py"


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def start_members(count, *paths):
    address = free_address()
    return [
        subprocess.Popen(
            [sys.executable, MEMBER, str(index), str(count), address, *map(str, paths)],
            stdout=subprocess.PIPE, text=True, process_group=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        for index in range(count)
    ]  # fmt: skip


def outputs(processes):
    found = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return [json.loads(text.splitlines()[-1]) for text in found]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a mesh of this process gives, and what two processes give of one between them."""
    directory, model = tmp_path_factory.mktemp("spanning"), TinyLlama(heads=8, kv_heads=2, tied=False)
    paths = [
        write_tiny_gguf(directory / "tiny.gguf", model),
        write_tiny_llama_directory(directory / "hf", model, shards=2),
        write_tiny_llama_directory(directory / "repeated", TinyLlama(heads=8, kv_heads=1, tied=True)),
    ]
    processes, devices = start_members(2, *paths), jax.devices()[:2]
    try:
        return json.loads(json.dumps([read_weights(path, devices) for path in paths])), *outputs(processes)
    finally:
        for process in processes:
            process.kill()


def test_each_process_holds_its_own_shards_and_reads_little_else(found):
    one, *two = found
    for whole, *members in zip(one, *two, strict=True):
        (expected, all_read), (shards, read) = whole, zip(*members, strict=True)
        for array, *parts in zip(expected, *shards, strict=True):
            assert {index: total for part in parts for index, total in part.items()} == array
            assert all(len(part) == 1 for part in parts)
        # Of what is divided along its inputs each process needs a part of every row, and of norms all.
        assert all(0.5 < count / all_read < 0.8 for count in read), (read, all_read)


def test_a_mesh_that_does_not_divide_over_its_processes_is_refused():
    with pytest.raises(TopologyError, match="tp 3 cannot span 2 processes: use a number that divides its tp"):
        spanned_devices(3, 2)
    with pytest.raises(TopologyError, match="tp 4 over 2 processes needs 2 devices in each: process 1 has 0"):
        spanned_devices(4, 2)


def test_a_process_that_uses_jax_already_cannot_join():
    assert jax.devices()
    with pytest.raises(TopologyError, match=r"process 1 of the 2 of one mesh could not join the others at 127.0.0.1"):
        join(Member(1, 2, free_address()), timeout=1)
