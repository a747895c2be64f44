"""The process that compiles for an absent H100: its answers come one by one, and it ends with whoever asked."""

import os
import stat
import sys

import msgspec
import pytest
from twinmesh.engine.config import EngineConfig
from twinmesh.engine.errors import EngineError
from twinmesh.engine.startup import step_temporaries as steps
from twinmesh.engine.topology import MeshSpec, Role, Topology
from twinmesh.models.checkpoints.known_models import known_model

ANSWER = '["decode 8", 5]'


@pytest.fixture
def asked():
    spec = MeshSpec(Role.BOTH)
    config = EngineConfig(Topology((spec,)), 64, max_num_seqs=8, prefill_buckets=(16,), decode_buckets=(2, 8))
    return steps.Asked(known_model("llama-3.2-1b"), config, spec, (4,), {}, "int16")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Puts a shell script in the compiler's place."""

    def use(script):
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\ncat > {tmp_path}/asked\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(path))
        return tmp_path

    return use


def test_answers_are_told_as_they_come_and_the_compiler_ends_with_who_asked(compiler, asked):
    folder = compiler(f"echo $$ > $0.pid; echo '{ANSWER}'; exec sleep 60")
    found = steps.temporaries_on_h100(asked)
    assert next(found) == ("decode 8", 5)
    found.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "compiler.pid").read_text()), 0)
    assert msgspec.json.decode((folder / "asked").read_bytes(), type=steps.Asked) == asked


def test_a_compiler_that_fails_has_its_last_words_in_a_sentence(compiler, asked):
    compiler(f"echo '{ANSWER}'; echo first >&2; echo it is too large >&2; exit 3")
    found = steps.temporaries_on_h100(asked)
    assert next(found).bytes == 5
    with pytest.raises(EngineError, match=r"^the compiler for H100s failed, it is too large: .*--no-compile\.$"):
        next(found)


def test_the_largest_programs_are_named_in_the_order_of_compilation(asked):
    names = steps.programs(asked.config, asked.spec)
    assert names[:3] == ["prefill 16", "score 16", "decode 8"]
    assert all(name.startswith("sample ") for name in names[3:])
