"""`twinmesh plan --memory`: a table and its JSON from config.json alone, and what cannot be planned in a sentence."""

import json
import re
from pathlib import Path

import pytest
from helpers.tiny_files import tiny_config
from twinmesh.scripts.cli import main

GPT_OSS = str(Path(__file__).parents[1] / "fixtures" / "gpt-oss-120b.json")
H100 = ("--device", "h100", "--no-compile")


def planned(*arguments):
    return main(["plan", "--memory", *arguments])


def test_a_config_alone_becomes_a_table_and_json(tmp_path, capsys):
    out = tmp_path / "memory.json"
    topology = ("--topology", "prefill=1xtp2,decode=2xtp2", "--quantization", "keep", "--max-model-len", "32768")
    assert planned("--model", GPT_OSS, *H100, *topology, "--json", str(out)) == 0
    text = capsys.readouterr().out
    for part in (
        "gpt-oss-120b on h100: prefill=1xtp2,decode=2xtp2, bfloat16, planned and not measured",
        "1 prefill mesh, tp 2", "2 decode meshes, tp 2", "window 128", "Nothing was compiled",
    ):  # fmt: skip
        assert part in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())
    data = json.loads(out.read_text())
    assert (data["format"], data["version"], len(data["meshes"])) == ("twinmesh plan --memory", 1, 3)
    for mesh in data["meshes"]:
        parts = sum(part["bytes"] for part in (*mesh["weights"], *mesh["kv"]))
        others = mesh["request_state"] + mesh["temporaries"] + mesh["staging"] + mesh["left"]
        assert parts + others == data["usable_bytes"]
        assert 0 <= mesh["left"] < 64 << 20
        assert mesh["staging"] > 0


def test_an_absent_gpu_keeps_the_formats_that_it_would_keep(capsys):
    assert planned("--model", GPT_OSS, *H100) == 0
    assert "experts MXFP4 56.73" in " ".join(capsys.readouterr().out.split())
    assert planned("--model", GPT_OSS, "--device", "b200", "--no-compile") == 2  # no kernel: 217 GiB of floats
    assert "with quantization='keep'" in capsys.readouterr().err


def config(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config("llama3") | changes))
    return ("--model", str(path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", GPT_OSS, *H100, "--quantization", "none"), "gpt-oss-120b does not fit at tp 1: .*: with quantiz"),
        (("--model", "gpt-oss-120b", *H100, "--topology", "both=1xtp3"), "64 query heads do not divide by 3"),
        (("--model", "gpt-oss-120b", *H100, "--topology", "auto"), "name the meshes"),
        (("--model", "gpt-oss-120b", "--device", "h10"), "the nearest is 'h100'"),
        (("--model", "gpt-oss-120b", *H100, "--slo", "ttft=1s"), "--slo is for the search"),
        (("--model", "gpt-120b", *H100), "nearest is 'gpt-oss-120b'"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(arguments, words, capsys):
    assert planned(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("twinmesh: ")
    assert re.search(words, line)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_config": {"depth": 2}}, "has a vision tower"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method = 'bitsandbytes'"),
        ({"num_hidden_layers": None}, "no 'num_hidden_layers'"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_its_file(changes, words, tmp_path, capsys):
    assert planned(*config(tmp_path, **changes), *H100) == 2
    said = capsys.readouterr().err
    assert "config.json: " in said
    assert words in said


def test_packed_weights_are_planned_in_their_format(tmp_path, capsys):
    packing = {"quant_method": "awq", "bits": 4, "group_size": 32}
    assert planned(*config(tmp_path, quantization_config=packing), *H100, "--quantization", "keep") == 0
    assert "UINT4-32-float16" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--topology", "both=2"), ("--no-compile",), ("--dtype", "float32")])
def test_the_search_refuses_what_only_memory_heeds(arguments, capsys):
    needed = ("--devices", "1", "--slo", "ttft=1s", "--trace", "poisson:rate=1,input=8,output=2,requests=2")
    assert main(["plan", "--model", "llama-3.1-8b", "--device", "h100", *needed, *arguments]) == 2
    assert f"{arguments[0]} goes with --memory" in capsys.readouterr().err


def test_the_search_says_what_it_needs(capsys):
    assert main(["plan", "--model", "llama-3.1-8b", "--device", "h100"]) == 2
    assert "--trace, --devices, --slo must be given, or --memory" in capsys.readouterr().err
