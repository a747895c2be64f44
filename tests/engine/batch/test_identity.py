"""What tells one batch run from another."""

import pytest
from twinmesh.engine.api.sampling_params import SamplingParams
from twinmesh.engine.batch.identity import Identity, model_digest

MIB = 1 << 20


def test_a_models_content_counts_and_not_its_name(tmp_path):
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    assert model_digest(one) == model_digest(two)
    two.write_bytes(b"weighty")
    assert model_digest(one) != model_digest(two)


@pytest.mark.parametrize("place", [0, MIB - 1, MIB, 3 * MIB, 6 * MIB - 40_000])
def test_a_large_model_is_sampled_from_end_to_end(tmp_path, place):
    path = tmp_path / "model"
    content = bytearray(6 * MIB)
    path.write_bytes(content)
    before = model_digest(path)
    content[place : place + 40_000] = b"\1" * 40_000  # more than lies between two samples
    path.write_bytes(content)
    assert model_digest(path) != before


def test_of_a_directory_every_file_counts_but_those_about_the_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "0").write_bytes(b"0")
    before = model_digest(tmp_path)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").touch()
    assert model_digest(tmp_path) == before
    (tmp_path / "weights" / "0").rename(tmp_path / "weights" / "1")
    assert model_digest(tmp_path) != before


def test_what_differs_is_named(tmp_path):
    path = tmp_path / "run"
    first = Identity("m", "i", {"temperature": 1.0, "stop": ("a",)}, {"dtype": "float32"})
    first.save(path)
    assert first.differences(path) == []
    other = Identity("n", "i", {"temperature": 1.0, "stop": ("b",)}, {"dtype": "float16"})
    assert other.differences(path) == [
        "another model",
        "stop=['a'] instead of ['b']",
        "dtype='float32' instead of 'float16'",
    ]


def test_every_sampling_parameter_counts(tmp_path):
    model = tmp_path / "model"
    model.write_bytes(b"weights")
    params = SamplingParams(logit_bias={3: float("-inf")}, stop=["x"], allowed_token_ids=[1, 2])
    path = tmp_path / "run"
    Identity.of(model, "i", params, {}).save(path)
    assert Identity.of(model, "i", params, {}).differences(path) == []
    changed = Identity.of(model, "i", SamplingParams(logit_bias={3: 1.0}, stop=["x"], allowed_token_ids=[1]), {})
    assert [text.split("=")[0] for text in changed.differences(path)] == ["logit_bias", "allowed_token_ids"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"format": 99}', b"\xff"])
def test_a_file_of_another_kind_is_told(tmp_path, content):
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(ValueError, match="missing or unreadable"):
        Identity("m", "i", {}, {}).differences(tmp_path / "run")


def test_of_a_split_file_every_part_counts(tmp_path):
    parts = [tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    for part in parts:
        part.write_bytes(b"weights")
    before = model_digest(parts[0])
    parts[1].write_bytes(b"weighty")
    assert model_digest(parts[0]) != before
