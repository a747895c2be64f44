"""The commands over a real engine and a tiny model on disk."""

import json
from pathlib import Path

import pytest
from helpers.tiny_gguf import write_tiny_gguf
from twinmesh.scripts.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_tiny_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")
    sampling = ["--temperature", "0", "--max-tokens", "8"]
    return ["--model", str(path), "--max-model-len", "64", *sampling, "--topology", "prefill=1,decode=1"]


def test_a_batch_answers_what_generate_answers(model, tmp_path, capsys):
    assert main(["generate", *model, "--chat", "--prompt", "the sea"]) == 0
    answer = capsys.readouterr().out.removesuffix("\n")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"messages": [{"role": "user", "content": "the sea"}]}, {"prompt": "x" * 64}, {"prompt": "the cat"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = main(["batch", *model, "--input", str(source), "--output", str(target)])
    assert code == 1
    written = {line["custom_id"]: line for line in map(json.loads, target.read_text(encoding="utf-8").splitlines())}
    assert written["line-1"]["response"]["body"]["choices"][0]["message"]["content"] == answer
    assert written["line-2"]["error"]["message"].startswith("line 2: The prompt has 64 tokens")
    assert written["line-3"]["response"]["body"]["choices"][0]["text"]


def test_a_resumed_batch_answers_what_a_whole_one_does(model, tmp_path):
    source, whole, resumed = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "resumed.jsonl"))
    lines = [{"prompt": f"the sea {i}", "temperature": 1, "n": 1 + i % 2} for i in range(12)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = ["batch", *model, "--deterministic", "--input", str(source), "--output"]
    assert main([*start, str(whole)]) == 0
    kept = whole.read_bytes().splitlines(keepends=True)[:5]
    resumed.write_bytes(b"".join(kept) + b'{"id": "batch_req_')
    (tmp_path / "resumed.jsonl.run").write_bytes((tmp_path / "whole.jsonl.run").read_bytes())
    assert main([*start, str(resumed)]) == 0
    assert resumed.read_bytes().startswith(b"".join(kept))
    assert _texts(resumed) == _texts(whole)


def _texts(path):
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return sorted((line["id"], [choice["text"] for choice in line["response"]["body"]["choices"]]) for line in lines)


def test_a_deterministic_run_leaves_a_decision_log_that_replays(model, tmp_path, capsys):
    log = tmp_path / "run.log"
    args = [*model, "--prompt", "the sea", "--deterministic", "--no-prefix-caching", "--decision-log", str(log)]
    assert main(["generate", *args]) == 0
    capsys.readouterr()
    assert main(["replay", str(log)]) == 0
    out = capsys.readouterr().out
    assert "all the same" in out
    assert "1 request ended" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "nomodel"], "nomodel"),
        (["--model", "missing.gguf"], "missing.gguf"),
        (["--topology", "prefill=8,decode=8"], "devices"),
        (["--max-model-len", "100000"], "max_model_len=100000"),
        (["--prompt", "x" * 64], "64 tokens"),
        (["--decode-steps", "2", "--deterministic"], "deterministic=True does not go with decode_steps=2"),
        (["--decision-log", "no/such/directory/log"], "directory no/such/directory does not exist"),
    ],
)
def test_what_the_engine_refuses_is_one_line_and_exit_code_2(model, args, says, capsys):
    assert main(["generate", *model, "--prompt", "x", *args]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twinmesh: ")]
    assert len(said) == 1
    assert says in said[0]


def test_a_truncated_model_is_one_line_and_exit_code_2(model, tmp_path, capsys):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(Path(model[1]).read_bytes()[:20_000])
    assert main(["generate", "--model", str(damaged), "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("twinmesh: ")
    assert err.count("\n") == 1
