"""The defaults by platform: what each kind of device gets where the options do not say, and what options change."""

from dataclasses import replace
from itertools import pairwise

import pytest
from helpers.core_engine import model_with_windows
from twinmesh.engine.options import EngineOptions
from twinmesh.engine.sizing.defaults import TABLE, as_table, compile_threads, defaults_for, engine_config

MODEL = model_with_windows(None, 6)
H100, H200, A100, CPU = (
    ("gpu", "NVIDIA H100 80GB HBM3"), ("gpu", "NVIDIA H200"), ("gpu", "NVIDIA A100-SXM4-80GB"), ("cpu", "cpu"),
)  # fmt: skip


def config(device, dtype="bfloat16", **options):
    return engine_config(EngineOptions("", **options), MODEL, defaults_for(*device), dtype)


@pytest.mark.parametrize(("dtype", "fewest"), [("float32", 1), ("bfloat16", 1), ("float16", 8)])
def test_with_kernels_for_them_one_16_bit_row_has_a_bucket(dtype, fewest):
    defaults = replace(defaults_for(*CPU), has_kernels=True)
    assert engine_config(EngineOptions(""), MODEL, defaults, dtype).decode_buckets[0] == fewest


@pytest.mark.parametrize("device", [H100, H200])
def test_a_large_gpu_gets_large_chunks_and_many_slots(device):
    found = config(device)
    assert (found.chunk_size, found.max_num_seqs, found.prefill_rows) == (8192, 256, 64)
    assert found.decode_buckets == (8, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        ("NVIDIA H100 PCIe", 256), ("NVIDIA GH200 480GB", 256), ("NVIDIA H20", 256), ("NVIDIA H800", 256),
        ("NVIDIA B200", 256), ("NVIDIA GB200", 256), ("NVIDIA A100-SXM4-40GB", 128), ("NVIDIA L4", 128),
        ("Tesla V100-SXM2-16GB", 128), ("NVIDIA GeForce RTX 4090", 128), ("AMD Instinct MI300X", 128), ("", 128),
    ],
)  # fmt: skip
def test_gpus_are_told_apart_by_their_kind(kind, slots):
    assert config(("gpu", kind)).max_num_seqs == slots


def test_a_cpu_keeps_small_steps():
    found = config(CPU, "float32")
    assert (found.prefill_buckets, found.prefill_rows, found.max_num_seqs) == ((64, 256, 512), 8, 32)
    assert found.decode_buckets == (1, 8, 32)
    assert config(CPU).decode_buckets == (8, 32)
    assert config(CPU, "float32", max_num_seqs=200).decode_buckets == (1, 8, 32, 128, 200)


@pytest.mark.parametrize("device", [H100, A100, CPU])
def test_whatever_is_asked_for_wins(device):
    asked = dict(max_num_seqs=5, prefill_buckets=(7, 2048), decode_buckets=(2, 6))
    found = config(device, **asked)
    assert {name: getattr(found, name) for name in asked} == asked
    assert found.prefill_rows == 16


@pytest.mark.parametrize(
    ("device", "buckets", "slots"),
    [(CPU, (8,), 8), (CPU, (64,), 32), (H100, (64,), 64), (H100, (16, 512), 256), (A100, (1,), 1)],
)
def test_slots_that_nobody_asked_for_fit_the_decode_buckets(device, buckets, slots):
    assert config(device, decode_buckets=buckets).max_num_seqs == slots


@pytest.mark.parametrize(("asked", "found"), [(20, 20), (-1, MODEL.vocab_size), (10**9, MODEL.vocab_size)])
def test_there_are_no_more_most_likely_tokens_than_tokens(asked, found):
    assert config(CPU, max_logprobs=asked).max_logprobs == found


@pytest.mark.parametrize("buckets", [(), (0,), (8, 4), "8", (True,), (2.0,), [8]])
@pytest.mark.parametrize("name", ["decode_buckets", "prefill_buckets"])
def test_buckets_that_are_not_usable_are_refused_by_name(name, buckets):
    with pytest.raises(ValueError, match=rf"^{name}=.* is not usable"):
        config(CPU, **{name: buckets})


@pytest.mark.parametrize(("device", "chunk", "slots"), [(H100, 2048, 256), (A100, 2048, 128), (CPU, 512, 32)])
def test_deterministic_has_one_size_of_each_step(device, chunk, slots):
    found = config(device, deterministic=True)
    assert (found.prefill_buckets, found.decode_buckets) == ((chunk,), (slots,))


@pytest.mark.parametrize("defaults", TABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("slots", [None, 1, 7, 8, 9, 33, 300, 1000])
def test_every_row_makes_a_config_whose_steps_are_at_most_half_padding_on_gpus(defaults, slots):
    found = engine_config(EngineOptions("", max_num_seqs=slots), MODEL, defaults, "bfloat16")
    assert found.decode_buckets[-1] == found.max_num_seqs == (slots or defaults.max_num_seqs)
    if defaults.name != "CPUs":
        for buckets in (found.prefill_buckets, found.decode_buckets[1:]):
            assert all(after <= 2 * before for before, after in pairwise(buckets))


@pytest.mark.parametrize(("cores", "threads"), [(1, 2), (2, 2), (4, 2), (16, 8), (26, 13), (32, 16), (200, 16)])
def test_half_of_the_cores_compile(cores, threads):
    assert compile_threads(cores) == threads


def test_the_table_has_a_column_for_every_kind_of_device():
    lines = as_table().splitlines()
    assert lines[0] == f"| | {' | '.join(row.name for row in TABLE)} |"
    assert {line.count("|") for line in lines} == {len(TABLE) + 2}
    assert "| `max_num_seqs` | 32 | 256 | 128 |" in lines
