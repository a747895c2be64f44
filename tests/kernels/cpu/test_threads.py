"""Shares of the cores: how many there are, who gets how many, that bits do not hang on it, and who goes first."""

import ctypes
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.kernels_pallas.attention import paged_decode_attention
from twinmesh.kernels_pallas.block_tiles import Tiles, shapes
from twinmesh.kernels_pallas.cpu import blocks, loader
from twinmesh.kernels_pallas.cpu.threads import (
    POOL,
    Cores,
    StepsUnderWay,
    count_cores,
    lower_pool_priority,
    process_cores,
)
from twinmesh.kernels_pallas.matmul import matmul, score

PRIORITIES = """
import os, jax
from twinmesh.kernels_pallas.cpu.threads import lower_pool_priority
assert lower_pool_priority() == 0, "before JAX has started there is no pool"
jax.config.update("jax_num_cpu_devices", 2)
jax.devices()
before = os.getpriority(os.PRIO_PROCESS, 0)
found = lower_pool_priority()
assert lower_pool_priority() == found
at = [os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")]
print(found, at.count(before + 5), os.getpriority(os.PRIO_PROCESS, 0) == before)
"""


@pytest.fixture
def usable(monkeypatch):
    """A process that may run on four cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/\n"}, 4),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "900000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "what is this\n"}, 4),
        ({"proc/self/cgroup": "nothing\n\n0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "3:cpuset:/x\n2:cpu,cpuacct:/y\n",
                "sys/fs/cgroup/cpu/y/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/y/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_cores_are_those_of_the_process_within_its_cgroups_quota(tmp_path, usable, files, cores):
    write(tmp_path, files)
    assert count_cores(tmp_path) == cores


def test_where_no_affinity_is_known_all_cores_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores(tmp_path) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert count_cores(tmp_path) == 6


@pytest.mark.parametrize(("cores", "shares"), [(1, [1, 1, 1, 1]), (2, [2, 2, 1, 1]), (16, [16, 16, 8, 5])])
def test_devices_at_work_have_equal_shares_and_each_has_a_thread(cores, shares):
    one = Cores(cores)
    for devices, share in enumerate(shares):
        assert words(one) == [one.threads, cores] == [share, cores], devices
        one.add(1)
    one.add(-len(shares))
    assert words(one) == [cores, cores]


def words(cores):
    """What a kernel reads: threads of a call over few rows, and of one over many."""
    return list((ctypes.c_int64 * 2).from_address(cores.address))


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans())))
def test_a_mesh_is_at_work_while_it_has_steps_under_way(changes):
    cores = Cores(60)
    meshes, steps = [StepsUnderWay(devices, cores) for devices in (1, 1, 4)], [0, 0, 0]
    for mesh, begins in changes:
        if begins or steps[mesh]:
            steps[mesh] += 1 if begins else -1
            meshes[mesh].begin() if begins else meshes[mesh].end()
        at_work = sum(devices for devices, count in zip((1, 1, 4), steps, strict=True) if count)
        assert cores.threads == 60 // max(1, at_work)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def attention():
    table = jnp.asarray(np.random.default_rng(0).permutation(60).reshape(5, 12), jnp.int32)
    arguments = (draw(5, 6, 64), draw(60, 16, 3, 64), draw(60, 16, 3, 64) + 1, table, jnp.asarray([1, 190, 33, 0, 128]))
    return jax.jit(partial(paged_decode_attention, scale=0.125)), arguments


def _quantised(x):
    """Multiply by the kernel that takes any number of rows."""
    random, parts = np.random.default_rng(0), shapes("Q8_0", 96, 64)
    drawn = {
        part: random.integers(0, 256, shape, np.uint8) if dtype == np.uint8 else random.random(shape).astype(dtype)
        for part, (shape, dtype) in parts.items()
    }
    weights = Tiles(*(jnp.asarray(drawn[part]) if part in drawn else None for part in Tiles._fields))
    return blocks.product(x, weights, "Q8_0", 96, dtype="float32", activations="float")


CALLS = {
    "attention": attention,
    "one row": lambda: (jax.jit(matmul), (draw(1, 192), draw(192, 1536))),
    "a prompt's rows": lambda: (jax.jit(_quantised), (draw(70, 64),)),
    "rows": lambda: (jax.jit(matmul), (draw(9, 100), draw(100, 700))),
    "head": lambda: (jax.jit(score), (draw(3, 64), draw(1000, 64))),
}


@pytest.mark.skipif(loader.toolchain() is None, reason="no CPU kernels here")
@pytest.mark.parametrize("call", CALLS)
def test_bits_are_equal_with_any_number_of_threads(monkeypatch, call):
    """Also while the number changes between calls, and with other devices at work on the same pool."""
    function, arguments = CALLS[call]()
    placed = [jax.device_put(arguments, device) for device in jax.devices()[:4]]
    cores, want = process_cores(), None
    try:
        for count in (1, 2, 3, 8, 64, 1):
            monkeypatch.setattr(cores, "count", count)
            cores.add(0)
            assert cores.threads == count
            for result in [function(*on_device) for on_device in placed for _ in range(5)]:
                want = np.asarray(result) if want is None else want
                np.testing.assert_array_equal(result, want)
    finally:
        monkeypatch.undo()
        cores.add(0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="priorities are of Linux's threads")
@pytest.mark.parametrize("own", [0, 6])
def test_the_pools_threads_let_all_others_go_first(own):
    """Also those of a process that lets others go first itself."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    code = f"import os; os.nice({own}){PRIORITIES}"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, at_five, is_usual = done.stdout.split()
    assert int(found) >= 2
    assert (at_five, is_usual) == (found, "True")


def test_no_pool_is_no_matter(tmp_path):
    assert lower_pool_priority(tmp_path / "absent") == 0
    write(tmp_path, {"1/comm": "python\n", "99999999/comm": f"{POOL}\n"})
    assert lower_pool_priority(tmp_path) == 0  # no thread has that number any more
