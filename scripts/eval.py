"""`twinmesh eval`: lm-evaluation-harness's own command, with this engine as its model.

The harness finds no models by itself: this registers ours, and hands over.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from twinmesh.engine.host.extras import need
from twinmesh.engine.options import EngineOptions, documentation, signature
from twinmesh.models.checkpoints.catalog import resolve_model
from twinmesh.scripts import arguments
from twinmesh.scripts.parser import Parser

SUMMARY = "evaluate a model on tasks, by lm-evaluation-harness"
DESCRIPTION = """\
Evaluate a model on tasks, by lm-evaluation-harness (the extra 'eval'). The arguments below are the engine's; all others
are the harness's own, as 'lm-eval run' takes them: --tasks, --include_path, --num_fewshot, --limit, --gen_kwargs,
--apply_chat_template, --use_cache, --output_path, --log_samples and so on ('lm-eval run --help' explains them).
--model_args takes what the model class takes besides: max_gen_toks, max_length, add_bos_token, prefix_token_id,
think_end_token, chat_template_args. --batch_size means nothing: the engine batches by itself.

example:
  twinmesh eval --model smollm2 --dtype float32 --tasks arc_easy --num_fewshot 5 --limit 100
"""
# What the harness would take another model or device by.
_REFUSED = {"--device": "JAX_PLATFORMS chooses, or --topology", "-M": "--model names it"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the engine's arguments; the rest is kept for the harness."""
    arguments.add_engine_arguments(parser)
    assert isinstance(parser, Parser)
    parser.keep_unknown_as("harness")


def run(args: argparse.Namespace) -> int:
    """Run the harness's command and return the exit code."""
    words: Sequence[str] = args.harness
    for word in words:
        if word.partition("=")[0] in _REFUSED:
            raise ValueError(f"{word.partition('=')[0]} is not usable here: {_REFUSED[word.partition('=')[0]]}.")
    need("lm_eval", "eval", "The command 'eval'")
    EngineOptions(args.model, **_options(args))  # refuses what cannot be, before anything is read
    resolve_model(args.model)
    from twinmesh.engine.evaluation.harness import NAME

    given = json.dumps({"model": str(args.model), **_options(args), "progress": True})
    return _hand_over(["run", "--model", NAME, "--model_args", given, *words])


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the engine's options that are not as they would be anyway, as JSON can hold them."""
    names = (name for name, option in documentation().items() if option.flag is not None and name != "model")
    defaults = signature().parameters
    given = {name: getattr(args, name) for name in names}
    changed = {name: value for name, value in given.items() if value != defaults[name].default}
    if "topology" in changed:
        changed["topology"] = str(changed["topology"])
    return changed


def _hand_over(words: Sequence[str]) -> int:
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *words]
    try:
        cli_evaluate()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = before
    return 0
