"""The benchmark of a mixture of experts: the models that it writes, and what it makes of turns."""

import pytest
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.scripts.bench import moe, moe_model


@pytest.mark.parametrize("kind", moe_model.KINDS)
def test_models_are_written_once_and_read(tmp_path, kind):
    size = moe_model.Size(1, 32, 32, 1, 1, 32, 4, 2)
    checkpoint = open_checkpoint(moe_model.write_model(tmp_path / kind, kind, size))
    assert (checkpoint.config.experts.count, checkpoint.config.intermediate_size) == (4, 32)
    assert set(checkpoint.formats.values()) == ({"MXFP4"} if kind == "gpt-oss" else set())
    assert len(checkpoint.tokenizer().encode("ab")) == 2
    before = (tmp_path / kind / "model.safetensors").stat().st_mtime_ns
    moe_model.write_model(tmp_path / kind, kind, size)
    assert (tmp_path / kind / "model.safetensors").stat().st_mtime_ns == before
    sizes = moe.bytes_in_files(tmp_path / kind)
    assert sizes["file_bytes"] == checkpoint.stored_bytes


def test_a_ratio_is_that_of_a_pair_with_the_best_of_the_peers_dtypes():
    def turn(rate, **more):
        return {"8": {"tokens_per_second": rate}} | more

    own = dict(peak_bytes=260, weight_bytes=120, kept_bytes=80, file_bytes=100, packed_bytes=80, kv_bytes=50)
    pairs = [
        {"twinmesh": turn(rate, **own), "float32": turn(slow), "bfloat16": turn(fast)}
        for rate, slow, fast in ((30, 10, 5), (40, 5, 10), (20, 10, 1))
    ]
    found = moe.summarise(pairs, {"peak_bytes": 80}, [8])
    assert found["speed"]["8"]["ratio"] == {"median": 3, "least": 2, "most": 4}
    assert found["speed"]["8"]["transformers"]["most"] == 10
    assert found["memory"]["added_peak_over_file_and_kv"] == pytest.approx(180 / 150)
    assert (found["memory"]["weights_over_file"], found["memory"]["kept_over_packed"]) == (1.2, 1.0)
