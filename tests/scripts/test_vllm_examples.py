"""vLLM's examples with another import and model: what is changed, what runs, and why not."""

import json
import tarfile

import pytest
from twinmesh.scripts.vllm_examples import main
from twinmesh.scripts.vllm_imports import makes_text_engine, rewrite, takes_model_argument

SOURCE = """
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind as Kind
from vllm.config import KVTransferConfig
from vllm.lora.request import LoRARequest

model_name = "facebook/opt-125m"


def main():
    import vllm
    llm = LLM(model="org/name", revision="a/b")
    parser.add_argument("--model", default="org/other")
"""


def test_imports_and_models_are_changed_and_nothing_else():
    changed, lacking = rewrite(SOURCE, "smollm2", {"LLM", "SamplingParams", "RequestOutputKind"})
    assert lacking == ["vllm.lora.request.LoRARequest"]
    for line in (
        "from twinmesh import LLM as LLM", "from twinmesh import RequestOutputKind as Kind", "KVTransferConfig = dict",
        "raise ImportError('twinmesh has no vllm.lora.request.LoRARequest')", "model_name = 'smollm2'",
        "import twinmesh as vllm", "llm = LLM(model='smollm2', revision='a/b')",
        "parser.add_argument('--model', default='smollm2')",
    ):  # fmt: skip
        assert line in changed
    assert compile(changed, "changed", "exec")


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("from vllm import LLM\nLLM()", True),
        ("import vllm\nengine = vllm.AsyncLLMEngine()", True),
        ("from vllm import LLM\nLLM().generate({'multi_modal_data': 1})", False),
        ("from openai import OpenAI\nimport vllm\nLLM", False),
        ("LLM()", False),
    ],
)
def test_what_is_an_offline_example_for_text(source, is_one):
    assert makes_text_engine(source) is is_one


def test_whether_the_model_has_to_be_said():
    assert takes_model_argument("EngineArgs.add_cli_args(parser)")
    assert not takes_model_argument('EngineArgs.add_cli_args(parser)\nparser.set_defaults(\n  model="a/b")')
    assert takes_model_argument('parser.add_argument(\n  "--model",\n  type=str,\n  required=True)')


def test_each_runs_in_a_process_and_is_counted_with_its_reason(tmp_path, capsys):
    folder = tmp_path / "vllm-9" / "examples"
    folder.mkdir(parents=True)
    head = "from vllm import LLM, SamplingParams\n"
    (folder / "good.py").write_text(head + "print(LLM.__name__, SamplingParams(n=2).n)")
    (folder / "bad.py").write_text(head + "SamplingParams(best_of=2)")
    (folder / "slow.py").write_text(head + "import threading\nthreading.Event().wait()")
    (folder / "server.py").write_text("print('no engine')")
    with tarfile.open(tmp_path / "vllm-9.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "vllm-9", "vllm-9")
    found = tmp_path / "found.json"
    assert main(["--sdist", str(tmp_path / "vllm-9.tar.gz"), "--json", str(found), "--only", "d.py"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 of 2 run.\n")
    assert "| `bad.py` | TypeError: SamplingParams has no argument best_of, which vLLM has: use n" in said
    good = json.loads(found.read_text())[1]
    assert (good["example"], good["ran"], good["output"]) == ("good.py", True, "LLM 2\n")
    assert main(["--sdist", str(tmp_path / "vllm-9"), "--only", "slow", "--limit", "0.2"]) == 0
    assert "| `slow.py` | not within 0.2 s |" in capsys.readouterr().out


def test_a_folder_without_examples_is_refused(tmp_path, capsys):
    assert main(["--sdist", str(tmp_path)]) == 1
    assert "has no examples: give the source distribution of a vLLM." in capsys.readouterr().err
