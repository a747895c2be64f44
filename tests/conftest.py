"""What holds for every test: eight CPU devices, set before anything can initialise a JAX backend, and Ctrl-C as it is
in the foreground; no programs that another process has kept; and the tiny model on disk.

`pytest --executor=bytes` runs every engine that a test starts behind bytes (`helpers/bytes_executor.py`).
"""

import json
import lzma
import signal
from pathlib import Path

import jax
import pytest
from helpers.bytes_executor import Relay, bytes_executor
from helpers.shared_programs import Counter, SharedPrograms
from helpers.tiny_gguf import write_tiny_gguf
from hypothesis import settings
from twinmesh.engine.startup import build
from twinmesh.engine.startup.kept_programs import use_cache
from twinmesh.models.checkpoints.catalog import cache_directory

jax.config.update("jax_num_cpu_devices", 8)
# A shell has what it runs in the background ignore Ctrl-C, children included; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes depends on what else the machine does. The same examples every time: a commit is not to fail
# for what another broke. `pytest --hypothesis-profile=new` looks for others.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile("same")


def pytest_addoption(parser):
    parser.addoption("--executor", choices=["local", "bytes"], default="local", help="what engines run on")


@pytest.fixture(scope="session", autouse=True)
def _executor(request):
    """With --executor=bytes, no message reaches an executor or a core but through another process."""
    if request.config.getoption("--executor") == "local":
        yield
        return
    relay = Relay()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "LocalExecutor", bytes_executor(relay))
        yield
    relay.close()


@pytest.fixture(scope="session", autouse=True)
def _no_kept_programs():
    """Programs are compiled, since tests change what they are traced from, and must not leave any for others.

    Engines of this process share them. JAX's cache, which finds programs by what they were lowered to, takes most of
    the time out of compiling what another process has compiled.
    """
    use_cache(cache_directory() / "compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "kept_or_compiled", lambda directory, platform: SharedPrograms())
        patch.setattr(build, "CompileCounter", Counter)
        yield


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def fixtures():
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def tiny_spm(fixtures):
    """A small SentencePiece model as GGUF's metadata; id 0 is unknown, 1 BOS, 2 EOS (make_tokenizer_fixtures.py)."""
    parts = json.loads(lzma.decompress((fixtures / "tokenizer_spm.json.xz").read_bytes()))["prefix"]
    keys = {f"tokenizer.ggml.{key}": parts[key] for key in ("tokens", "token_type", "scores")}
    return keys | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.unknown_token_id": 0}
