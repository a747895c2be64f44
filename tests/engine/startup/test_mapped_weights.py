"""Engines whose weights lie in a mapped file: the same tokens, and a clear end when the file changes."""

import os

import numpy as np
import pytest
from helpers.tiny_gguf import TinyLlama, write_aligned_gguf
from twinmesh import LLM, EngineError, SamplingParams
from twinmesh.models.checkpoints import streaming
from twinmesh.models.checkpoints.open import open_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = "The cat"
SAID = "was changed while weights lay in it"


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A GGUF file whose embedding is aligned, which is mapped although it is small."""
    monkeypatch.setattr(streaming, "FEWEST_MAPPED_BYTES", 4096)
    return write_aligned_gguf(tmp_path / "tiny.gguf")


def start(path, topology="both=1", **options):
    small = dict(max_model_len=64, page_size=16, max_num_seqs=4, prefill_buckets=(32,), decode_buckets=(4,))
    return LLM(path, topology=topology, dtype="float32", **small, **options)


def generate(llm):
    (output,) = llm.generate(PROMPT, GREEDY)
    return output


def change(path):
    """Write to the file without changing its length; the mapped values stay what they are."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def test_tokens_are_the_same_mapped_and_read(path):
    with start(path) as mapped, start(path, mmap=False) as read:
        assert generate(mapped).outputs[0].token_ids == generate(read).outputs[0].token_ids


@pytest.mark.parametrize("topology", ["both=1", "prefill=1,decode=1"])
def test_a_file_that_changes_ends_the_engine_with_a_sentence(path, topology):
    with start(path, topology) as llm:
        assert generate(llm).error is None
        change(path)
        assert SAID in generate(llm).error
        with pytest.raises(EngineError, match=SAID) as caught:
            llm.generate(PROMPT, GREEDY)
        assert str(path) in str(caught.value)
        assert "--no-mmap" in str(caught.value)


def test_a_file_that_was_cut_short_while_nothing_ran_is_not_read_any_more(path):
    with start(path) as llm:
        generate(llm)
        os.truncate(path, 4096)
        assert SAID in generate(llm).error


def test_new_parameters_are_refused_once_the_file_has_changed(path):
    with start(path) as llm:
        change(path)
        with pytest.raises(EngineError, match=SAID):
            llm.update_params({"norm.weight": np.ones(TinyLlama().hidden, np.float32)})


def test_once_what_was_mapped_is_replaced_the_file_may_change(path):
    table = np.ones((TinyLlama().vocab, TinyLlama().hidden), np.float32)
    with start(path, "prefill=1,decode=1") as llm:
        llm.update_params({"norm.weight": np.ones(TinyLlama().hidden, np.float32)})
        llm.update_params({"embedding.weight": table})
        os.truncate(path, 4096)
        assert generate(llm).error is None


def test_a_model_that_was_read_may_change(path):
    with start(path, mmap=False) as llm:
        before = generate(llm).outputs[0].token_ids
        os.truncate(path, 4096)
        assert generate(llm).outputs[0].token_ids == before


def test_a_file_that_changes_after_it_was_opened_is_refused_at_the_start(path, monkeypatch):
    opened = open_checkpoint(path)
    change(path)
    monkeypatch.setattr("twinmesh.engine.startup.build.open_checkpoint", lambda path, overrides: opened)
    with pytest.raises(ValueError, match="was changed while it was loaded"):
        start(path)


def test_the_start_says_what_is_mapped_copied_and_shared(path, capsys):
    start(path, "prefill=1,decode=1", progress=True).close()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("memory of weights: "))
    assert "MB mapped from the file and " in line
    assert "shared between meshes" in line


def test_a_quiet_start_says_nothing(path, capsys):
    start(path).close()
    assert capsys.readouterr().err == ""
