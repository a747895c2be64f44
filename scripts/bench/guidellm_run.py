"""`twinmesh bench guidellm`: GuideLLM's own command, with the engine as its backend, in process and without HTTP.

It has another name than the command, since a module of GuideLLM's name would hide it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twinmesh.engine.errors import EngineError
from twinmesh.engine.host.extras import need
from twinmesh.engine.options import EngineOptions, documentation
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.scripts import arguments
from twinmesh.scripts.parser import Parser

_DESCRIPTION = """\
Hand over to GuideLLM's own command (the extra 'guidellm', in an environment of its own: it brings torch), with this
engine as its backend: what comes after the options below is GuideLLM's, and its figures are by its definitions. Prompts
are measured by the model's own tokenizer. Each strategy of a profile loads the engine anew.

example:
  twinmesh bench guidellm --model smollm2 --reports ours run --profile kind=concurrent,streams=4 \\
    --data kind=synthetic_text,prompt_tokens=256,output_tokens=64 --constraint kind=max_requests,count=50
"""
_OURS = ("--backend", "--tokenizer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run GuideLLM's command and return the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    words: list[str] = args.guidellm
    if not words:
        parser.error("GuideLLM's own command is missing, such as: run --profile kind=synchronous --data ...")
    for name in _OURS:
        if any(word.split("=")[0] == name for word in words):
            raise ValueError(f"{name} is what this command gives to GuideLLM: leave it out.")
    arguments.check_new(args.reports)
    need("guidellm", "guidellm", "The command 'bench guidellm'")
    EngineOptions(args.model, **_options(args))  # refuses what cannot be, before workers would
    resolve_model(args.model)
    if args.reports is not None:
        Path(args.reports).mkdir(parents=True)
    from twinmesh.engine.benchmark.guidellm_backend import KIND

    backend = {"kind": KIND, "model": args.model, "engine": _options(args), "reports": args.reports}
    given = [json.dumps(backend), json.dumps({"kind": KIND, "model": args.model})]
    if words[0] == "run":
        words = [*words, *(word for pair in zip(_OURS, given, strict=True) for word in pair)]
    return _hand_over(words)


def _hand_over(words: Sequence[str]) -> int:
    from guidellm.cli import cli

    try:
        cli.main(list(words), prog_name="twinmesh bench guidellm", standalone_mode=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except RuntimeError as error:  # as it reports what its worker has said
        raise EngineError(f"GuideLLM ended: {error}") from error
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the engine's options besides the model, as JSON can hold them."""
    names = (name for name, option in documentation().items() if option.flag is not None and name != "model")
    values = {name: getattr(args, name) for name in names}
    return values | {"topology": str(values["topology"])}


def _parser() -> Parser:
    parser = Parser(
        prog="twinmesh bench guidellm",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--reports",
        metavar="DIR",
        type=arguments.written_path,
        help="a new folder for our own report of each strategy: 1.json, 2.json and so on",
    )
    arguments.add_engine_arguments(parser)
    parser.add_argument("guidellm", metavar="...", nargs=argparse.REMAINDER, help="a command of GuideLLM's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
