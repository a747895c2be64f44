"""How kernels get into a process: the cache across processes, every level, and each reason to do without."""

import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twinmesh.kernels_pallas.cpu import frames, loader, objects
from twinmesh.kernels_pallas.cpu.checks import CHECKS
from twinmesh.kernels_pallas.cpu.levels import LEVELS, MASK, level_named, read_level
from twinmesh.kernels_pallas.matmul import matmul

try:
    HERE = read_level()
except ImportError:
    HERE = None
needs_kernels = pytest.mark.skipif(HERE is None, reason="no CPU kernels here")
# As other tests have them, which so share the kernels of this CPU's level.
PARAMETERS = {name: ":16" for name in CHECKS if name.startswith(("decode", "prefill"))} | {
    "blocks": ":2:1",
    "stack_blocks": ":6:1",
}
# Keys and values are read by the same code, so that int8 and fp8 stand for both of them mixed.
KERNELS = [name + PARAMETERS.get(name, "") for name in CHECKS if "int8_fp8" not in name]
# What converts 8 bits is for all levels the same, and stacks are multiplied by the code of single matrices.
ELSEWHERE = [name for name in KERNELS if "_fp8" not in name and not name.startswith(("prefill_int8", "stack"))]
OF_LEVEL = {
    # The rest is compiled from the same source as for avx512_bf16, which has more instructions.
    "avx512": [name for name in KERNELS if name.startswith(("product_bf", "score_bf", "blocks"))],
    # Weights with mins, and with two scales to a block.
    "neon": [name for name in ELSEWHERE if name != "blocks:2:1"] + ["blocks:3:1", "blocks:4:1"],
}
PROGRAM = """
import sys, logging
logging.basicConfig(level=logging.WARNING, format="%(message)s")
import jax, jax.numpy as jnp, numpy as np
from twinmesh.kernels_pallas.cpu import loader
from twinmesh.kernels_pallas.matmul import matmul
compiled = []
inner = loader.compile_in_child
loader.compile_in_child = lambda *arguments: compiled.append(1) or inner(*arguments)
x, w = (np.random.default_rng(0).random(shape, np.float32) for shape in ((3, 50), (50, 70)))
out = jax.jit(matmul)(jnp.asarray(x), jnp.asarray(w))
print(len(compiled), np.asarray(out).tobytes().hex())
"""


def start(cache, program=PROGRAM, **environment):
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def run(cache, program=PROGRAM, **environment):
    """How many kernels a process compiled, what the product was, and what it logged."""
    out, log = start(cache, program, **environment).communicate()
    compiled, product = out.split()
    return int(compiled), product, log


@pytest.fixture
def anew(monkeypatch):
    """A loader that has not looked at anything yet; as it was, afterwards."""
    monkeypatch.delenv(MASK, raising=False)
    loader.forget()
    yield
    loader.forget()


@pytest.fixture
def fresh(anew, monkeypatch, tmp_path):
    """Such a loader over an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def kept(kernel):
    """The object file of a kernel of this CPU's level, which other tests may have compiled."""
    name, *parameters = kernel.split(":")
    assert loader.target(name, *map(int, parameters))
    file = f"{kernel.replace(':', '-')}-{loader.toolchain().identity}.o"
    return objects.read(objects.default_folder() / file)


@needs_kernels
def test_processes_that_start_at_once_or_later_share_a_cache_and_compute_the_same(tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    compiled, (product, other) = zip(*(process.communicate()[0].split() for process in both), strict=True)
    assert "1" in compiled
    assert product == other
    (file,) = (tmp_path / "twinmesh" / "kernels").iterdir()
    assert run(tmp_path) == (0, product, "")
    content = file.read_bytes()
    file.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    assert run(tmp_path) == (1, product, "")
    assert file.read_bytes() == content


@needs_kernels
def test_a_cache_that_is_a_file_costs_one_line(tmp_path):
    (tmp_path / "twinmesh").write_text("")
    compiled, _, log = run(tmp_path)
    assert compiled == 1
    assert log.count("\n") == 1
    assert "CPU kernels are compiled at every start, because they cannot be kept in" in log


@needs_kernels
@pytest.mark.parametrize("level", ["avx512_bf16", "avx512", "avx2", "neon"])
def test_every_level_is_compiled_and_right_where_this_cpu_has_it(level):
    """In processes of their own: what the CPU lacks is compiled too."""
    kernels, level = OF_LEVEL.get(level, ELSEWHERE), level_named(level)
    if level == HERE:
        kernels = KERNELS
        loader.compile_ahead(*kernels).join()
        compiled = [kept(kernel) for kernel in kernels]
    else:
        compiled = loader.compile_in_child(level, *kernels)
    for kernel, code in zip(kernels, compiled, strict=True):
        name, *parameters = kernel.split(":")
        assert code[:4] == b"\x7fELF"
        assert int.from_bytes(code[18:20], "little") == {"x86_64": 62, "aarch64": 183}[level.machine]
        if HERE in LEVELS[: LEVELS.index(level) + 1] and level.machine == HERE.machine:
            call = functools.partial(frames.call, loader.load_object(code))
            assert CHECKS[name](call, level, *map(int, parameters))


@needs_kernels
def test_compiling_twice_gives_the_same_code(monkeypatch):
    """No address of a process is in it, and nothing that this process has set for its own use of Python and numba."""
    before = kept("product_float32")
    monkeypatch.setattr(sys, "path", [*sys.path, Path("no string"), ""])
    for name, value in {"PYTHONWARNINGS": "error", "NUMBA_CPU_NAME": "generic", "NUMBA_DISABLE_JIT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert loader.compile_in_child(HERE, "product_float32") == [before]


@needs_kernels
@pytest.mark.parametrize("level", ["avx2"])
def test_a_masked_level_computes_nearly_the_same(level):
    if level_named(level).machine != HERE.machine:
        pytest.skip("not a level of this machine")
    cache = objects.default_folder().parents[1]
    found, want = (np.frombuffer(bytes.fromhex(run(cache, **env)[1]), np.float32) for env in ({MASK: level}, {}))
    np.testing.assert_allclose(found, want, rtol=1e-5)


def without(monkeypatch, caplog, expected):
    """No kernel, one line in the log, and XLA's product."""
    x = jnp.ones((2, 4))
    assert loader.target("product_float32") is None
    for _ in range(2):
        np.testing.assert_array_equal(jax.jit(lambda x: matmul(x, jnp.ones((4, 3))))(x), np.full((2, 3), 4.0))
    (line,) = caplog.messages
    assert expected in line
    assert "run in plain XLA, which is up to several times slower for few requests." in line


def test_without_numba_xla_computes_and_the_reason_is_said_once(fresh, monkeypatch, caplog):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    without(monkeypatch, caplog, "numba is not installed: `pip install numba`")


@pytest.mark.parametrize("version", ["0.67.2", "0.9", "unknown"])
def test_with_an_old_numba_too(fresh, monkeypatch, caplog, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    without(monkeypatch, caplog, f"numba {version} is too old: `pip install 'numba>=0.68'`")


@needs_kernels
def test_a_kernel_that_fails_its_self_test_is_not_used(anew, monkeypatch, caplog):
    monkeypatch.setitem(CHECKS, "product_float32", lambda *_: False)
    without(monkeypatch, caplog, "The CPU kernel product_float32 computes wrong results in its self-test.")


@needs_kernels
@pytest.mark.parametrize(
    ("python", "reason"),
    [("/nonexistent", "it cannot be compiled"), ("/bin/false", "its compilation failed with exit code 1: no message")],
)
def test_a_compilation_that_fails_is_a_reason(fresh, monkeypatch, caplog, python, reason):
    monkeypatch.setattr(sys, "executable", python)
    without(monkeypatch, caplog, f"The CPU kernel product_float32 cannot be used: {reason}")


@needs_kernels
@pytest.mark.parametrize(
    "written",
    ["Welcome to this host", r"\4\0\0\0\0\0\0\0Hi..", r"\100\0\0\0\0\0\0\0\177ELF and no end"],
    ids=["greeting", "no object", "cut short"],
)
def test_what_a_child_writes_besides_is_never_taken_for_code(fresh, monkeypatch, caplog, tmp_path, written):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '{written}'\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    without(monkeypatch, caplog, "its compilation wrote something else than object files, beginning b'")
    assert not (tmp_path / "twinmesh").exists()


@needs_kernels
def test_a_kernel_that_xla_refuses_is_not_used(anew, monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("API version 0.1 is not supported")

    monkeypatch.setattr(loader, "registered_names", set())
    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    without(monkeypatch, caplog, "The CPU kernel product_float32 cannot be used: API version 0.1 is not supported. ")


@needs_kernels
def test_a_mask_of_none_is_quiet(fresh, monkeypatch, caplog):
    monkeypatch.setenv(MASK, "none")
    assert loader.target("product_float32") is None
    assert caplog.messages == []


@needs_kernels
def test_a_call_returns_before_its_kernels_end():
    """A program that is nothing but calls would run on the calling thread; norms between them are as in a decoder."""
    x, w = jnp.ones((64, 2048)) / 2048, jnp.ones((2048, 2048))

    @jax.jit
    def program(x):
        for _ in range(30):
            x = matmul(x, w)
            x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))
        return x

    jax.block_until_ready(program(x))
    returned_early = []
    for _ in range(5):
        out = program(x)
        returned_early.append(not out.is_ready())
        jax.block_until_ready(out)
    assert any(returned_early)


@needs_kernels
def test_kernels_are_compiled_ahead_in_one_process(fresh, monkeypatch):
    """Also where they cannot be kept; who asks for one waits for it."""
    asked = []
    inner = loader.compile_in_child
    monkeypatch.setattr(loader, "compile_in_child", lambda level, *names: asked.append(names) or inner(level, *names))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loader.objects, "write", full)
    names = ("product_float32", "score_float32")
    loader.compile_ahead(*names)
    while not asked:
        pass
    assert all(loader.target(name) for name in names)
    loader.compile_ahead(*names).join()
    assert asked == [names]
