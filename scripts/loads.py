"""Loads that commands name: those of `simulation/load_spec.py`, and batch files by the tokenizer of a model at hand."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from twinmesh.engine.simulation.load_spec import read_workload
from twinmesh.engine.simulation.workload import Workload
from twinmesh.models.checkpoints.catalog import CATALOG, resolve_model

if TYPE_CHECKING:
    from twinmesh.engine.batch.request_lines import BatchRequest


def read_load(text: str, model: str) -> Workload:
    """Return the workload that a text stands for; prompts of batch files are counted in tokens of `model`.

    Raises:
        OSError: a file cannot be read.
        ValueError: the text means nothing, a file is no load, or it is a batch file and the model is not here.
    """
    return read_workload(text, lambda path: _batch_file(path, model))


def _batch_file(path: str, model: str) -> Workload:
    """Read a batch file. The tokenizer is in the model's files, which are not fetched for that."""
    if model not in CATALOG and not Path(os.path.expanduser(model)).exists():
        raise ValueError(
            f"{path} is a batch file, and {model} is not here to count its tokens: name the model by its own files."
        )
    # What reads batch files and checkpoints imports JAX, which other loads do without.
    from twinmesh.engine.batch.workload import batch_workload
    from twinmesh.models.checkpoints.open import open_checkpoint

    checkpoint = open_checkpoint(resolve_model(model))
    tokenizer, template = checkpoint.tokenizer(), checkpoint.chat_template()

    def tokens_of(request: "BatchRequest") -> Sequence[int]:
        if request.messages is not None:
            return template.encode(request.messages, tools=request.tools, **request.rendering)
        return tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt or []

    return batch_workload(path, tokens_of)
