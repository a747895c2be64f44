"""Safetensors files against the `safetensors` package's own writer, and every way in which they can be wrong."""

import contextlib
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from twinmesh.models.checkpoints.safetensors import INDEX, SafetensorsFiles, open_sharded
from twinmesh.models.errors import CheckpointError

TENSORS = {
    "table": np.arange(35, dtype=np.float32).reshape(7, 5),
    "half": np.linspace(-2, 2, 12, dtype=np.float16).reshape(3, 4),
    "brain": np.linspace(-9, 9, 60, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(10, 6),
    "norm": np.ones(9, np.float32),
}


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_rows_come_in_their_own_dtype(path):
    file = SafetensorsFiles([path])
    assert file.shapes == {name: array.shape for name, array in TENSORS.items()}
    for name, array in TENSORS.items():
        matrix = array.reshape(len(array), -1)
        for start, stop in ((0, len(array)), (1, 3), (2, 2)):
            rows = file.read_rows(name, start, stop)
            assert rows.dtype == array.dtype
            np.testing.assert_array_equal(rows, matrix[start:stop])


def test_the_dtype_is_that_of_most_numbers(path):
    assert SafetensorsFiles([path]).dtype() == ml_dtypes.bfloat16
    assert SafetensorsFiles([]).dtype() == np.float32


def test_a_type_that_cannot_be_read_is_refused_by_name_when_it_is_wanted(tmp_path):
    save_file({"counts": np.arange(3)}, tmp_path / "model.safetensors")
    file = SafetensorsFiles([tmp_path / "model.safetensors"])
    with pytest.raises(CheckpointError, match=r"tensor 'counts' is of type I64, which is not implemented"):
        file.check_readable(["counts"])


def refused(call, *words):
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        (b"", b"", 10**12, ["is truncated or not a safetensors file", str(10**12)]),
        (b"{}", b"", 2**64 - 1, ["is truncated or not a safetensors file"]),
        (b"\xff\xff", b"", None, ["its header is not valid"]),
        (b"[" * 5000, b"", None, ["its header is not valid"]),
        (b"[1]", b"", None, ["not a JSON object"]),
        (b'{"a": 1, "a": 2}', b"", None, ["a name appears twice"]),
        ({"a": 3}, b"", None, ["entry of tensor 'a' is not valid"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", None, ["entry of tensor 'a' is not valid"]),
        ({"a": entry([-1], 0, 4)}, bytes(4), None, ["entry of tensor 'a' is not valid"]),
        ({"a": entry([1.0], 0, 4)}, bytes(4), None, ["entry of tensor 'a' is not valid"]),
        ({"a": entry([1], 0, 4, "Q99")}, bytes(4), None, ["tensor 'a' has the unknown type 'Q99'"]),
        ({"a": entry([1], 0, 4, ["F32"])}, bytes(4), None, ["tensor 'a' has the unknown type"]),
        ({"a": entry([2], 0, 4)}, bytes(4), None, ["tensor 'a', F32[2], does not take the 4 bytes"]),
        ({"a": entry([2], 8, 0)}, bytes(8), None, ["does not take the -8 bytes"]),
        ({"a": entry([2], 0, 8)}, bytes(7), None, ["is truncated: tensor 'a' ends at byte", "fetch it again"]),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, bytes(8), None, ["tensor 'b' overlaps the one before"]),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), None, ["'b' does not follow the one before"]),
        ({"a": entry([1], 0, 4)}, bytes(5), None, ["its tensors end at byte"]),
    ],
)
def test_a_damaged_file_is_a_sentence_that_names_file_and_tensor(tmp_path, header, data, length, words):
    path = raw(tmp_path / "model.safetensors", header, data, length)
    refused(lambda: SafetensorsFiles([path]), str(path), *words)


def test_files_that_are_not_there_or_too_short(tmp_path):
    refused(lambda: SafetensorsFiles([tmp_path / "no.safetensors"]), "There is no model file at", "no.safetensors")
    (tmp_path / "short").write_bytes(b"abc")
    refused(lambda: SafetensorsFiles([tmp_path / "short"]), "is truncated")
    refused(lambda: SafetensorsFiles([tmp_path]), "cannot be read")


def test_a_file_that_shrinks_after_it_was_opened(path):
    file = SafetensorsFiles([path])
    path.write_bytes(path.read_bytes()[:-40])
    name = max(file.tensors, key=lambda name: file.tensors[name].offset)
    refused(lambda: file.read_rows(name, 0, file.shapes[name][0]), str(path), name, "cannot be read")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damage_is_a_sentence_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 330))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, 100, -1]))])
    with contextlib.suppress(CheckpointError):
        file = SafetensorsFiles([path])
        for name in file.tensors:
            file.read_rows(name, 0, 1)


def shards(directory, weight_map=None):
    save_file({"table": TENSORS["table"], "norm": TENSORS["norm"]}, directory / "one.safetensors")
    save_file({"half": TENSORS["half"]}, directory / "two.safetensors")
    places = {"table": "one.safetensors", "norm": "one.safetensors", "half": "two.safetensors"}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places | (weight_map or {})}))
    return directory / INDEX


def test_an_index_joins_its_shards(tmp_path):
    file = open_sharded(shards(tmp_path))
    assert set(file.tensors) == {"table", "norm", "half"}
    np.testing.assert_array_equal(file.read_rows("half", 0, 3), TENSORS["half"])


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"more": "three.safetensors"}, ["'more' in 'three.safetensors', which is not there"]),
        ({"more": "../one.safetensors"}, ["'more' in '../one.safetensors', which is not there"]),
        ({"more": "one.safetensors"}, ["'more' in 'one.safetensors', which does not hold it"]),
        ({"half": "one.safetensors", "norm": "two.safetensors"}, ["which does not hold it"]),
    ],
)
def test_an_index_that_is_wrong_names_tensor_and_shard(tmp_path, weight_map, words):
    refused(lambda: open_sharded(shards(tmp_path, weight_map)), INDEX, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", ["no 'weight_map'"]),
        ('{"weight_map": [1]}', ["no 'weight_map'"]),
        ('{"weight_map": {"a": 1}}', ["no 'weight_map'"]),
        ('{"weight_map": {}}', ["index of no tensors"]),
        ("[]", ["not a JSON object"]),
        ("{", ["not readable JSON"]),
        ("\x00", ["not readable JSON"]),
    ],
)
def test_an_index_that_is_none(tmp_path, content, words):
    (tmp_path / INDEX).write_text(content)
    refused(lambda: open_sharded(tmp_path / INDEX), INDEX, *words)


def test_a_tensor_in_two_shards(tmp_path):
    index = shards(tmp_path)
    save_file({"half": TENSORS["half"], "norm": TENSORS["norm"]}, tmp_path / "two.safetensors")
    refused(lambda: open_sharded(index), "Tensor 'norm' is in", "one.safetensors", "two.safetensors")
