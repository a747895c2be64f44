"""Orbax checkpoints: round trips from every source, other meshes than they were written from, and damage."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.loading import load_on_one_device
from helpers.tiny_directory import write_tiny_llama_directory
from helpers.tiny_gguf import TinyLlama, write_tiny_gguf
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.orbax_writer import write
from twinmesh.models.errors import CheckpointError

MESSAGES = [{"role": "user", "content": "the land of rain"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_checkpoint(write_tiny_llama_directory(tmp_path_factory.mktemp("hf") / "tiny"))


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """A checkpoint that no test changes."""
    path = tmp_path_factory.mktemp("orbax") / "tiny"
    write(source, path)
    return path


@pytest.fixture
def copy(source, tmp_path):
    write(source, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_from_hugging_face_the_logits_are_the_same_bit_for_bit(source, written, dense_forward):
    restored = open_checkpoint(written)
    assert (restored.config, restored.name, restored.dtype) == (source.config, source.name, source.dtype)
    ids = source.tokenizer().encode("the rain and the land of iron")
    np.testing.assert_array_equal(dense_forward(restored)(ids), dense_forward(source)(ids))
    assert restored.tokenizer().encode("the rain") == source.tokenizer().encode("the rain")
    assert restored.chat_template().render(MESSAGES) == source.chat_template().render(MESSAGES)


def test_from_gguf_and_from_orbax_itself(tmp_path):
    gguf = open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", TinyLlama(tied=False)))
    write(gguf, tmp_path / "first", "bfloat16")
    write(open_checkpoint(tmp_path / "first"), tmp_path / "second", "float32")
    again = open_checkpoint(tmp_path / "second")
    assert again.config == gguf.config
    expected = load_on_one_device(gguf, "bfloat16")
    for path, array in load_on_one_device(again, "float32").items():
        np.testing.assert_array_equal(array, expected[path].astype("float32"), err_msg=path)
    assert again.chat_template().encode(MESSAGES) == gguf.chat_template().encode(MESSAGES)


def test_every_device_gets_its_shard_in_the_dtype_asked_for(source, written):
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",))
    other = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    columns = NamedSharding(mesh, PartitionSpec(None, "tp"))
    shape = (72, 80)
    wanted = {
        f"layers.{i}.mlp.up_proj": tuple(
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=s) for s in (columns, other)
        )
        for i in (1, 0)
    }
    expected = load_on_one_device(source, "bfloat16")
    loaded = dict(open_checkpoint(written).load(wanted))
    assert loaded.keys() == wanted.keys()
    for path, arrays in loaded.items():
        assert [array.sharding for array in arrays] == [columns, other]
        assert arrays[0].addressable_shards[1].data.shape == (72, 20)
        for array in arrays:
            assert array.dtype == jnp.bfloat16
            np.testing.assert_array_equal(array, expected[path])


def test_arrays_lie_in_chunks_so_that_a_shard_is_read_alone(written, tmp_path, source):
    write(source, tmp_path / "small", chunk_bytes=4096)
    params = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).metadata(tmp_path / "small" / "params")
    assert max(np.prod(a.storage.chunk_shape) * 4 for a in params.item_metadata.tree.values()) <= 4096
    found, expected = (load_on_one_device(open_checkpoint(p), "float32") for p in (tmp_path / "small", written))
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


def test_one_parameter_is_read_at_a_time(source, tmp_path):
    """Each is written before the next is read: progress and reads alternate."""
    events = []

    class Watched(type(source)):
        def load(self, wanted, **options):
            for path, arrays in super().load(wanted, **options):
                events.append("read")
                yield path, arrays

    write(Watched(source.path), tmp_path / "out", progress=lambda nbytes: events.append(nbytes))
    assert events[::2] == ["read"] * (len(events) // 2)
    assert sum(events[1::2]) == sum(weight.nbytes for weight in TinyLlama().weights().values())


def refused(call, *words):
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_is_there_is_not_overwritten(source, tmp_path, what):
    target = tmp_path / "out"
    if what == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").write_text("mine")
    refused(lambda: write(source, target), str(target), "exists and is not an empty directory")


def test_what_another_run_writes_meanwhile_is_not_overwritten(source, tmp_path):
    other = tmp_path / "out" / "of-another-run"

    def meanwhile(nbytes):
        other.mkdir(parents=True, exist_ok=True)

    refused(lambda: write(source, tmp_path / "out", progress=meanwhile), "/out cannot be made, ", "Give another.")
    assert list(tmp_path.rglob("*")) == [tmp_path / "out", other]


def test_an_empty_directory_is_filled(source, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(source, tmp_path / "a" / "b")
    assert open_checkpoint(tmp_path / "a" / "b").config == source.config
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_source_that_fails_leaves_nothing_and_keeps_its_own_sentence(tmp_path):
    path = write_tiny_llama_directory(tmp_path / "tiny")
    source = open_checkpoint(path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    refused(lambda: write(source, tmp_path / "out"), str(weights), "cannot be read")
    assert os.listdir(tmp_path) == ["tiny"]


def test_a_disk_that_fails_is_one_sentence(source, tmp_path, monkeypatch):
    def fail(self, directory, args):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing\n  many lines [os_error_code='28']")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(OSError, match="No space left on device") as failure:
        write(source, tmp_path / "out")
    assert failure.value.filename == str(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_waits_for_the_write_and_leaves_nothing(tmp_path):
    """Also when it is pressed again while it waits."""
    path = write_tiny_llama_directory(tmp_path / "tiny")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from twinmesh.models.checkpoints.open import open_checkpoint\n"
        "from twinmesh.models.checkpoints.orbax_writer import write\n"
        "stop = lambda nbytes: [os.kill(os.getpid(), signal.SIGINT) for _ in range(1000)]\n"
        f"write(open_checkpoint({str(path)!r}), Path({str(tmp_path / 'out')!r}), None, stop)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert os.listdir(tmp_path) == ["tiny"]


def test_opening_one_leaves_jax_to_the_engine(written, tmp_path):
    program = (
        "from twinmesh.engine.config import Topology; from twinmesh.engine.sharding.mesh import build_meshes\n"
        "from twinmesh.models.checkpoints.open import open_checkpoint\n"
        f"open_checkpoint({str(written)!r}).chat_template()\n"
        "print(len(build_meshes(Topology.parse('prefill=1,decode=1'))))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr


def data_files(path):
    return sorted((path / "params").rglob("d/*"), key=lambda file: file.stat().st_size)


def test_a_truncated_file_is_named_with_its_length(copy):
    file = data_files(copy)[-1]
    size = file.stat().st_size
    os.truncate(file, size - 1)
    refused(lambda: open_checkpoint(copy), "is incomplete", file.name, f"has {size - 1} bytes and should have {size}")


@pytest.mark.parametrize("name", ["params/manifest.ocdbt", "params/_METADATA", "tokenizer.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    refused(lambda: open_checkpoint(copy), "is incomplete", f"{name} is missing")


def test_damage_found_while_restoring_names_the_parameters(copy):
    checkpoint = open_checkpoint(copy)
    for file in data_files(copy)[-3:]:
        os.truncate(file, 10)
    refused(lambda: load_on_one_device(checkpoint, "float32"), str(copy), "cannot be restored")


def edit(copy, change):
    file = copy / "twinmesh.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=4), ["is of format 4, and this version reads up to 3"]),
        (lambda d: d.pop("config"), ["does not describe a model"]),
        (lambda d: d["config"].update(surprise=1), ["does not describe a model"]),
        (lambda d: d["config"].update(num_heads=5), ["does not describe a model"]),
        (lambda d: d["config"].update(activation="relu"), ["does not describe a model"]),
        (lambda d: d.update(dtype="float9"), ["does not describe a model"]),
    ],
)
def test_a_description_that_is_none(copy, change, words):
    edit(copy, change)
    refused(lambda: open_checkpoint(copy), str(copy), *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["config"].update(tie_embeddings=False), ["no tensor 'head.weight'"]),
        (lambda d: d["config"].update(intermediate_size=81), ["mlp", "has shape", "expected"]),
        (lambda d: d["config"]["layers"].pop(), ["has tensor 'layers.1."]),
    ],
)
def test_parameters_that_do_not_fit_are_named_before_any_is_restored(copy, change, words):
    edit(copy, change)
    refused(lambda: next(open_checkpoint(copy).load({})), str(copy), *words)


def test_a_description_that_is_no_json(copy):
    (copy / "twinmesh.json").write_text("{")
    refused(lambda: open_checkpoint(copy), "twinmesh.json is not readable JSON")


def test_params_that_are_no_orbax_checkpoint(copy):
    (copy / "params" / "_METADATA").write_text("{}")
    edit(copy, lambda d: d.update(files={}))
    refused(lambda: next(open_checkpoint(copy).load({})), "params cannot be read")


def test_an_orbax_checkpoint_of_another_tool(written):
    refused(lambda: open_checkpoint(written / "params"), "is an Orbax checkpoint without twinmesh.json")
