"""Which dtype an engine runs in: the same at every start."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import twinmesh
from helpers.core_engine import model_with_windows
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.config import DTYPES
from twinmesh.engine.startup import dtype as dtypes
from twinmesh.engine.startup.dtype import CPU_TABLE, choose_dtype, fastest_on_cpu, parse_dtype, read_cpu_flags

MODEL = model_with_windows(None)
GEMMA = model_with_windows(None, fits_float16=False)
ZEN4 = frozenset({"fpu", "avx", "avx2", "avx512f", "avx512_bf16", "avx512_vnni"})
SAPPHIRE_RAPIDS = ZEN4 | {"avx512_fp16", "amx_bf16", "amx_tile"}
SKYLAKE = frozenset({"fpu", "avx", "avx2", "avx512f"})
GUIDE = Path(twinmesh.__file__).parent / "docs" / "guides" / "reproducibility.md"


def choose(
    asked="auto", model=MODEL, stored="float32", platform="cuda", flags=ZEN4, max_num_seqs=32, deterministic=False
):
    options = dict(platform=platform, cpu_flags=flags, max_num_seqs=max_num_seqs, deterministic=deterministic)
    return choose_dtype(asked, model, stored, **options).name


@pytest.mark.parametrize("asked", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_what_was_asked_for_is_taken(asked):
    assert choose(asked, platform="cpu", flags=SKYLAKE, max_num_seqs=1) == "bfloat16"


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_dtype_that_is_named_wins_over_every_rule(stored, platform):
    assert choose("float32", stored=stored, platform=platform) == "float32"


@pytest.mark.parametrize("platform", ["cuda", "gpu", "rocm"])
@pytest.mark.parametrize(
    ("stored", "model", "chosen"),
    [
        ("float32", MODEL, "bfloat16"),
        ("bfloat16", MODEL, "bfloat16"),
        ("float16", MODEL, "float16"),
        ("float16", GEMMA, "bfloat16"),
    ],
)
def test_a_gpu_runs_what_the_checkpoint_holds_in_sixteen_bits(stored, model, chosen, platform):
    for more in (dict(max_num_seqs=1), dict(deterministic=True), dict(flags=frozenset())):
        assert choose(model=model, stored=stored, platform=platform, **more) == chosen


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("model", [MODEL, GEMMA])
@pytest.mark.parametrize(
    ("flags", "max_num_seqs", "deterministic", "chosen"),
    [
        (ZEN4, 8, False, "bfloat16"),
        (ZEN4, 512, False, "bfloat16"),
        (ZEN4, 7, False, "float32"),
        (ZEN4, 32, True, "float32"),
        (SAPPHIRE_RAPIDS, 32, False, "float32"),
        (SKYLAKE, 32, False, "float32"),
        (frozenset({"fp", "asimd", "bf16", "sve"}), 32, False, "float32"),
        (frozenset(), 32, False, "float32"),
    ],
)
def test_a_cpu_runs_what_its_instruction_set_makes_fast(flags, max_num_seqs, deterministic, chosen, stored, model):
    options = dict(flags=flags, max_num_seqs=max_num_seqs, deterministic=deterministic)
    assert choose(platform="cpu", stored=stored, model=model, **options) == chosen


@given(flags=st.frozensets(st.sampled_from(sorted(SAPPHIRE_RAPIDS | {"sve"}))), rows=st.integers(1, 600))
def test_every_cpu_has_a_dtype_and_few_rows_have_float32(flags, rows):
    chosen = choose(platform="cpu", flags=flags, max_num_seqs=rows)
    assert chosen == (fastest_on_cpu(flags) if rows >= 8 else "float32")


def test_the_rule_reads_no_clock():
    source = inspect.getsource(dtypes)
    assert "import time" not in source
    assert "jit" not in source


def test_another_process_chooses_the_same(tmp_path):
    code = (
        "import sys, helpers.core_engine as h; from twinmesh.engine.startup.dtype import *\n"
        "options = dict(platform='cpu', cpu_flags=read_cpu_flags(), max_num_seqs=32, deterministic=False)\n"
        "print(choose_dtype('auto', h.model_with_windows(None), 'bfloat16', **options).name)"
    )
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{code}"], cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == choose(platform="cpu", flags=read_cpu_flags())


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            "processor : 0\nflags\t\t: fpu avx avx512_bf16\nbugs : x\n\nprocessor : 1\nflags : none\n",
            "fpu avx avx512_bf16",
        ),
        ("Features\t: fp asimd bf16\n", "fp asimd bf16"),
        ("flags\t:\n", ""),
        ("vmx flags\t: vnmi ept\n", ""),
        ("", ""),
    ],
)
def test_the_flags_of_the_first_processor_are_read(tmp_path, text, flags):
    (tmp_path / "cpuinfo").write_text(text)
    assert read_cpu_flags(tmp_path / "cpuinfo") == frozenset(flags.split())


def test_a_system_that_does_not_say_has_no_flags(tmp_path):
    (tmp_path / "cpuinfo").write_bytes(b"\xff\xfe")
    assert read_cpu_flags(tmp_path / "missing") == read_cpu_flags(tmp_path / "cpuinfo") == frozenset()


def test_the_table_of_the_guide_is_the_rule():
    text = GUIDE.read_text().split("| instruction set |")[1].split("\n\n")[0]
    rows = [
        [*re.findall(r"`([\w ]+)`", row.split("|")[1]), row.split("|")[2].strip(" `")] for row in text.splitlines()[2:]
    ]
    expected = [[*sorted(has), *sorted(lacks), dtype] for has, lacks, dtype in CPU_TABLE]
    assert rows == expected


def test_float16_is_refused_where_the_model_overflows_in_it():
    with pytest.raises(ValueError, match=r"float16.*llama: use bfloat16 or float32"):
        choose("float16", model=GEMMA)


@pytest.mark.parametrize("asked", ["int8", "int4x", "float64", object()])
def test_other_types_are_refused_by_name(asked):
    with pytest.raises(ValueError, match=r"dtype=.* is not supported: use one of auto, float32, bfloat16, float16\."):
        parse_dtype(asked)
