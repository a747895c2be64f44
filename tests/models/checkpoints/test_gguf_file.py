"""Values out of GGUF files: every quantisation that the `gguf` library dequantises, a few rows at a time."""

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from twinmesh.models.checkpoints.gguf_file import GGUFFile
from twinmesh.models.errors import CheckpointError

ROWS, COLUMNS = 7, 512


def can_be_dequantised(kind):
    block, size = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, COLUMNS // block * size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KINDS = [kind for kind in GGMLQuantizationType if can_be_dequantised(kind)]


def random_bytes(kind):
    """Any bytes are some values, though not always finite ones."""
    block, size = GGML_QUANT_SIZES[kind]
    return np.random.default_rng(kind.value).integers(0, 256, (ROWS, COLUMNS // block * size), np.uint8)


def write(path, kind, raw):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("before", np.ones(3, np.float32))  # so that the tensor does not lie at the start
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


def test_the_common_quantisations_are_among_those_tested():
    names = {kind.name for kind in KINDS}
    assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4"}
    assert names >= {f"Q{bits}_K" for bits in (2, 3, 4, 5, 6)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_read_in_blocks_are_those_of_the_whole_tensor(tmp_path, kind):
    raw = random_bytes(kind)
    file = write(tmp_path / "x.gguf", kind, raw)
    assert file.tensors["x"].shape == (ROWS, COLUMNS)
    with np.errstate(all="ignore"):
        expected = np.asarray(dequantize(raw, kind), np.float32)
        found = np.concatenate([file.read_rows("x", start, min(start + 3, ROWS)) for start in range(0, ROWS, 3)])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_what_cannot_be_dequantised_is_refused_by_name(tmp_path):
    file = write(tmp_path / "x.gguf", GGMLQuantizationType.I32, random_bytes(GGMLQuantizationType.I32))
    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor 'x' is of type I32, which cannot be dequantised"):
        file.check({"before": (3,), "x": (ROWS, COLUMNS)})


@pytest.fixture
def parts(tmp_path):
    """A file that was written in three parts, and its tensors."""
    tensors = {f"t{i}": np.full((2, 4), i, np.float32) for i in range(5)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 7)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("m-0000?-of-00003.gguf")), tensors


def test_a_split_file_is_read_by_naming_its_first_part(parts):
    paths, tensors = parts
    file = GGUFFile(paths[0])
    assert file.metadata["llama.block_count"] == 7
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read_rows(name, 0, 2), tensor)


def test_a_part_that_is_missing_or_not_the_first_is_named(parts):
    paths, _ = parts
    with pytest.raises(CheckpointError, match=r"one of 3 parts.*ends in -00001-of-00003\.gguf"):
        GGUFFile(paths[1])
    paths[0].rename(paths[0].with_name("renamed.gguf"))
    with pytest.raises(CheckpointError, match=r"renamed\.gguf is one of 3 parts"):
        GGUFFile(paths[0].with_name("renamed.gguf"))
    paths[0].with_name("renamed.gguf").rename(paths[0])
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"no model file at .*m-00003-of-00003\.gguf"):
        GGUFFile(paths[0])
