"""Memory that CPU devices share with the host, files that are mapped into it, and what is said of one that changes."""

import gc
import os

import jax
import numpy as np
import pytest
from helpers.loading import load_on_one_device
from helpers.tiny_directory import write_tiny_llama_directory
from helpers.tiny_gguf import TinyLlama, write_aligned_gguf
from twinmesh.models.checkpoints import streaming
from twinmesh.models.checkpoints.host_memory import ALIGNMENT, FileMaps, Stamp, aligned_empty, check_unchanged
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.checkpoints.safetensors import SafetensorsFiles
from twinmesh.models.errors import CheckpointError

VALUES = np.arange(256, dtype=np.float32)
EMBEDDING = "embedding.weight"


def address(array):
    return array.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (64, 5), (2, 3, 4), (1000,)])
def test_every_cpu_device_uses_an_aligned_array_where_it_is(shape, dtype):
    array = aligned_empty(shape, jax.numpy.dtype(dtype))
    array[...] = 1
    assert (array.shape, array.dtype) == (shape, dtype)
    for device in jax.devices()[:3]:
        assert address(jax.device_put(array, device)) == array.ctypes.data


def test_an_array_that_is_not_aligned_is_copied():
    array = aligned_empty((65,), np.dtype(np.float32))[1:]
    array[...] = 1
    assert address(jax.device_put(array, jax.devices()[0])) != array.ctypes.data


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(ALIGNMENT) + VALUES.tobytes())
    return path


def map_values(maps, path):
    return maps.array(path, Stamp.of(path), ALIGNMENT, (16, 16), VALUES.dtype)


def test_a_mapped_array_is_the_file_read_only_and_shared_with_devices(path):
    maps = FileMaps()
    array = map_values(maps, path)
    np.testing.assert_array_equal(array, VALUES.reshape(16, 16))
    assert not array.flags.writeable
    one, other = (jax.device_put(array, device) for device in jax.devices()[:2])
    assert address(one) == address(other) == array.ctypes.data
    assert maps.holds(address(one))
    assert not maps.holds(VALUES.ctypes.data)
    assert maps.names == ["weights"]
    maps.check()


def test_a_file_that_nobody_may_write_to_is_mapped_too(path):
    path.chmod(0o444)
    np.testing.assert_array_equal(map_values(FileMaps(), path).ravel(), VALUES)


def cut_short(path):
    os.truncate(path, ALIGNMENT)


def cut_by_a_byte(path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path):
    with path.open("ab") as file:
        file.write(b"more")


def write_over(path):
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # the clock of a file system may stand still that long


def write_anew(path):
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut_short, "it had 1,088 bytes and has 64"),
        (cut_by_a_byte, "has 1,087"),
        (lengthen, "has 1,092"),
        (write_over, "it was written to"),
        (write_anew, "it was written to"),
    ],
)
def test_a_file_that_changes_while_it_is_mapped_is_refused_in_a_sentence(path, change, said):
    maps = FileMaps()
    array = map_values(maps, path)
    change(path)
    with pytest.raises(CheckpointError, match="was changed while weights lay in it") as caught:
        maps.check()
    assert said in str(caught.value)
    assert "mmap=False" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert array is not None  # the mapping lived until here


def test_a_file_that_is_replaced_renamed_or_deleted_stays_mapped(path):
    maps = FileMaps()
    array = map_values(maps, path)
    new = path.with_name("new")
    new.write_bytes(b"another model")
    new.replace(path)
    maps.check()
    path.rename(path.with_name("elsewhere"))
    maps.check()
    np.testing.assert_array_equal(array.ravel(), VALUES)


def test_a_mapping_ends_with_the_last_array_and_then_the_file_may_change(path):
    maps = FileMaps()
    array = jax.device_put(map_values(maps, path), jax.devices()[0])
    gc.collect()
    assert maps.names == ["weights"]
    del array
    gc.collect()
    assert maps.names == []
    cut_short(path)
    maps.check()


@pytest.mark.parametrize("change", [cut_short, lengthen, write_over])
def test_a_file_that_has_changed_since_its_header_was_read_is_not_mapped(path, change):
    stamp = Stamp.of(path)
    change(path)
    with pytest.raises(CheckpointError, match="was changed while it was loaded"):
        FileMaps().array(path, stamp, ALIGNMENT, (16, 16), VALUES.dtype)


def test_another_file_under_the_same_name_is_not_the_one_that_was_opened(path):
    stamp = Stamp.of(path)
    path.rename(path.with_name("old"))
    path.write_bytes(bytes(stamp.size))
    os.utime(path, ns=(0, stamp.mtime_ns))
    with pytest.raises(CheckpointError, match="another file has its name"):
        check_unchanged(path, stamp)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_unchanged(path, stamp)


# ---- which parameters are mapped


@pytest.fixture
def small(monkeypatch):
    """Tensors of any size are mapped."""
    monkeypatch.setattr(streaming, "FEWEST_MAPPED_BYTES", 0)


def directory(path, offset, **options):
    """Write a model whose tensors begin at `offset` from a multiple of 64."""
    write_tiny_llama_directory(path, **options)
    file = path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    padded = header + b" " * ((offset - 8 - len(header)) % ALIGNMENT)
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + length :])
    return path


def gguf(path, offset, **options):
    return write_aligned_gguf(path, beyond=offset, **options)


def mapped_paths(checkpoint, dtype="float32"):
    maps = FileMaps()
    loaded = load_on_one_device(checkpoint, dtype, maps=maps)
    for path, array in load_on_one_device(checkpoint, dtype).items():
        np.testing.assert_array_equal(loaded[path], array)
        assert not maps.holds(address(array))
    return {path for path, array in loaded.items() if maps.holds(address(array))}


def test_what_lies_in_the_file_as_it_is_needed_is_mapped_and_the_rest_read(small, tmp_path):
    paths = mapped_paths(open_checkpoint(gguf(tmp_path / "tiny.gguf", 0)))
    assert EMBEDDING in paths
    assert all(path == EMBEDDING or path.endswith("norm.weight") for path in paths)  # all others are transposed


@pytest.mark.parametrize("write", [gguf, directory])
def test_a_tensor_that_is_not_aligned_is_read(small, tmp_path, write):
    assert EMBEDDING not in mapped_paths(open_checkpoint(write(tmp_path / "tiny", 32)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tensor_of_another_dtype_is_read(small, tmp_path, dtype):
    checkpoint = open_checkpoint(directory(tmp_path / "tiny", 0, dtype=dtype))
    table = SafetensorsFiles([tmp_path / "tiny" / "model.safetensors"]).plain("model.embed_tokens.weight")
    assert (EMBEDDING in mapped_paths(checkpoint, dtype)) == (table.offset % ALIGNMENT == 0)
    assert EMBEDDING not in mapped_paths(checkpoint, "bfloat16")


def test_a_small_tensor_is_read(tmp_path):
    assert mapped_paths(open_checkpoint(gguf(tmp_path / "tiny.gguf", 0))) == set()


def test_a_mapped_tensor_is_checked_as_well(small, tmp_path):
    table = TinyLlama().weights()["model.embed_tokens.weight"]
    table[200, 5] = np.nan
    checkpoint = open_checkpoint(gguf(tmp_path / "tiny.gguf", 0, tensors={"token_embd.weight": table}))
    with pytest.raises(CheckpointError, match="holds nan in row 200,"):
        load_on_one_device(checkpoint, "float32", maps=FileMaps())
    assert EMBEDDING in load_on_one_device(checkpoint, "float32", maps=FileMaps(), allow_nonfinite=True)


# ---- progress, and files that change while they are read


@pytest.mark.parametrize("maps", [None, FileMaps()])
@pytest.mark.parametrize("write", [gguf, directory])
def test_the_bytes_that_are_reported_are_those_that_the_parameters_take(small, tmp_path, write, maps):
    reported = []
    checkpoint = open_checkpoint(write(tmp_path / "tiny", 0))
    load_on_one_device(checkpoint, "bfloat16", report=reported.append, maps=maps)
    expected = sum(weight.nbytes for weight in TinyLlama().weights().values())
    assert checkpoint.stored_bytes == sum(reported) == expected


@pytest.mark.parametrize("change", [cut_by_a_byte, lengthen, write_over])
@pytest.mark.parametrize("write", [gguf, directory])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, write, change):
    path = write(tmp_path / "tiny", 0)
    checkpoint = open_checkpoint(path)
    change(path / "model.safetensors" if path.is_dir() else path)
    with pytest.raises(CheckpointError, match=r"was changed while it was loaded|cannot be read"):
        load_on_one_device(checkpoint, "float32")
