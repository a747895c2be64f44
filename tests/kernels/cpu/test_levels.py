"""Which level of kernels a CPU gets, from LLVM's names of what it has."""

import pytest
from twinmesh.kernels_pallas.cpu.levels import LEVELS, find_level, level_named

AVX2 = dict.fromkeys(["avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt"], True)
AVX512 = AVX2 | dict.fromkeys(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"], True)
VNNI = AVX512 | {"avx512vnni": True}
BF16 = VNNI | {"avx512bf16": True}


@pytest.mark.parametrize(
    ("features", "name"),
    [(AVX2, "avx2"), (AVX512, "avx512"), (VNNI, "avx512_vnni"), (BF16, "avx512_bf16")],
)
def test_the_best_level_that_a_cpu_has_all_of_is_taken(features, name):
    assert find_level(features, "x86_64").name == name


@pytest.mark.parametrize("name", sorted(AVX512))
def test_a_level_of_which_one_instruction_set_lacks_is_not_taken(name):
    found = find_level(BF16 | {name: False}, "x86_64")
    assert (found.name if found else None) == ("avx2" if name.startswith("avx512") else None)


@pytest.mark.parametrize("features", [{}, {"neon": True}, {"avx512bf16": True}])
def test_a_cpu_without_any_has_no_level(features):
    assert find_level(features, "x86_64") is None


def test_arm_has_a_level_of_its_own():
    assert find_level({"neon": True}, "aarch64").name == "neon"
    assert find_level(BF16, "aarch64") is None


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_a_mask_lowers_the_level_and_never_raises_it(level):
    if level.machine == "x86_64":
        assert find_level(BF16, "x86_64", level.name) is level
        assert find_level(AVX2, "x86_64", level.name).name == "avx2"
    assert find_level(BF16, "x86_64", "none") is None


def test_a_mask_of_no_level_is_refused_by_name():
    with pytest.raises(ValueError, match="TWINMESH_CPU_LEVEL='avx3' names no level of CPU kernels: use one of avx512_"):
        level_named("avx3")
