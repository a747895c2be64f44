"""Turn a script that was written for vLLM into one for Twinmesh: another import and another model, nothing else.

What is no engine (a free port, a logger, configurations that vLLM takes as dicts as well) becomes lines of the standard
library. A name that Twinmesh lacks becomes an ImportError that says so where the script would import it.
"""

import ast
import re
from collections.abc import Mapping, Set

_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Stand-ins for names of vLLM's that are no engine's; `{name}` is what the script calls it.
_STAND_INS: Mapping[str, str] = {
    "cleanup_dist_env_and_memory": "from gc import collect as {name}",
    "init_logger": "from logging import getLogger as {name}",
    "random_uuid": "from uuid import uuid4 as {name}",
    "get_ip": "def {name}():\n    return '127.0.0.1'",
    "get_open_port": (
        "def {name}():\n"
        "    import socket\n"
        "    with socket.socket() as one:\n"
        "        one.bind(('127.0.0.1', 0))\n"
        "        return one.getsockname()[1]"
    ),
    "current_platform": (
        "import types\n"
        "{name} = types.SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: False, is_xpu=lambda: False)"
    ),
    "print_embeddings": "def {name}(embeds, indent=''):\n    print(f'{{indent}}{{embeds[:4]}} (size={{len(embeds)}})')",
    "KVTransferConfig": "{name} = dict",
    "ProfilerConfig": "{name} = dict",
    "PoolerConfig": "{name} = dict",
    "TextPrompt": "{name} = dict",
    "TokensPrompt": "{name} = dict",
    "PromptType": "{name} = object",
}


def makes_text_engine(source: str) -> bool:
    """Whether a script imports vLLM and runs an engine of its own, and takes neither images nor sounds."""
    imported = re.search(r"^\s*(?:from|import) vllm\b", source, re.MULTILINE)
    makes = re.search(r"\b(LLM|LLMEngine|AsyncLLM|AsyncLLMEngine|EngineArgs|AsyncEngineArgs)\b", source)
    other = re.search(r"multi_modal_data|vllm\.multimodal|import OpenAI|serve_http|IOProcessor", source)
    return bool(imported) and bool(makes) and not other


def rewrite(source: str, model: str, known: Set[str]) -> tuple[str, list[str]]:
    """Return the script with `model` in place of its models and imports of `known` names from Twinmesh, and the names
    that are not known, as vLLM's modules have them."""
    changes = _Changes(model, known)
    tree = ast.fix_missing_locations(changes.visit(ast.parse(source)))
    return ast.unparse(tree) + "\n", changes.lacking


def takes_model_argument(source: str) -> bool:
    """Whether a script's model has to be said on its command line, or has no default of the script's own."""
    is_engines = "add_cli_args" in source and not re.search(r"set_defaults\(\s*[^)]*model=", source)
    return is_engines or re.search(r"add_argument\(\s*\"--model\",[^)]*required=True", source) is not None


class _Changes(ast.NodeTransformer):
    def __init__(self, model: str, known: Set[str]) -> None:
        self._model, self._known, self.lacking = model, known, list[str]()

    def visit_Import(self, node: ast.Import) -> ast.AST:
        for alias in node.names:
            if alias.name == "vllm":
                alias.asname, alias.name = alias.asname or "vllm", "twinmesh"
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        if node.level or not node.module or node.module.split(".")[0] != "vllm":
            return node
        return [line for alias in node.names for line in self._imported(node.module, alias)]

    def _imported(self, module: str, alias: ast.alias) -> list[ast.stmt]:
        name = alias.asname or alias.name
        if alias.name in self._known:
            return ast.parse(f"from twinmesh import {alias.name} as {name}").body
        if alias.name in _STAND_INS:
            return ast.parse(_STAND_INS[alias.name].format(name=name)).body
        self.lacking.append(f"{module}.{alias.name}")
        return ast.parse(f"raise ImportError('twinmesh has no {module}.{alias.name}')").body

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node  # nothing of it runs
        return self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg in ("model", "model_name", "model_id"):
            node.value = self._named(node.value)
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if any("model" in name.lower() for name in names):
            node.value = self._named(node.value)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if any(isinstance(arg, ast.Constant) and arg.value == "--model" for arg in node.args):
            for keyword in node.keywords:
                if keyword.arg == "default":
                    keyword.value = self._named(keyword.value)
        return self.generic_visit(node)

    def _named(self, value: ast.expr) -> ast.expr:
        is_model = isinstance(value, ast.Constant) and isinstance(value.value, str) and _MODEL_ID.fullmatch(value.value)
        return ast.copy_location(ast.Constant(self._model), value) if is_model else value
