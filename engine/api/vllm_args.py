"""vLLM's `EngineArgs` and its command line, for programs that make an engine of them.

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    llm = LLM(**vars(parser.parse_args()))

`EngineArgs` holds what was given and checks nothing: `LLM` takes it as its own options and vLLM's (`vllm_options.py`).
None means that nothing was asked for. No JAX here.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any, Self

from ..options import EngineOptions
from .vllm_tables import ENGINE

# vLLM's defaults, where programs read or compute with them.
_DEFAULTS = {
    "model": "Qwen/Qwen3-0.6B",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
}
_OF_PYTHON = ("slo", "devices", "progress", "profile_dir")  # a script's own arguments may have these names
_SHORT = {
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "quantization": "-q",
}


class FlexibleArgumentParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose long arguments may be written with underscores as with dashes, as vLLM's is."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as `argparse` does."""
        if args is None:
            import sys

            args = sys.argv[1:]
        return super().parse_known_args([_dashes(arg) for arg in args], namespace)


def _dashes(arg: str) -> str:
    name, equals, value = arg.partition("=")
    is_long = re.fullmatch(r"--[A-Za-z]\w*[\w-]*", name) is not None
    return name.replace("_", "-") + equals + value if is_long else arg


class _Args:
    """What the dataclasses below have besides their fields."""

    @staticmethod
    def add_cli_args(parser: Any) -> Any:
        """Declare an argument for every field but what is Python's alone, and return the parser."""
        group = parser.add_argument_group("engine")
        for one in [one for one in fields(EngineArgs) if one.name not in _OF_PYTHON]:
            names = [f"--{one.name.replace('_', '-')}", *([_SHORT[one.name]] if one.name in _SHORT else [])]
            group.add_argument(*names, dest=one.name, default=one.default, type=_read, nargs="?", const=True)
            group.add_argument(f"--no-{names[0][2:]}", dest=one.name, action="store_false", help=argparse.SUPPRESS)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Take the fields from what a parser of `add_cli_args` has read."""
        return cls(**{one.name: getattr(args, one.name) for one in fields(cls) if hasattr(args, one.name)})  # type: ignore[arg-type]


def _read(text: str) -> Any:
    """Read a value: a number, true, false, a list or an object of JSON, `1,2` as whole numbers, or a text."""
    if re.fullmatch(r"\d+(,\d+)+", text):
        return tuple(map(int, text.split(",")))
    try:
        return json.loads(text)
    except ValueError:
        return text


def _fields() -> Sequence[Any]:
    own = [one.name for one in fields(EngineOptions)]
    names = [*own, *(name for name in ENGINE if name not in own)]
    return [(name, Any, field(default=_DEFAULTS.get(name))) for name in names]


EngineArgs: Any = make_dataclass("EngineArgs", _fields(), bases=(_Args,), module=__name__)
EngineArgs.__doc__ = "The options of `LLM`, and vLLM's, by name; None: not asked for. `LLM(**vars(args))` takes them."


class AsyncEngineArgs(EngineArgs):  # type: ignore[misc]
    """The same for `AsyncLLM`."""
