"""Checks that a checkpoint of any kind holds exactly the tensors that its model needs."""

from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import CheckpointError

type Shape = tuple[int, ...]


def check_tensors(
    path: Path,
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    is_harmless: Callable[[str], bool] = lambda name: False,
) -> None:
    """Check that a file or directory holds exactly these tensors with these shapes (numpy order).

    Args:
        path: the file or directory, for messages.
        found: shape of every tensor in it.
        expected: shape of every tensor that the model reads.
        is_harmless: whether a tensor of that name may exist although the model does not read it.

    Raises:
        CheckpointError: a tensor that is missing, of another shape, or not expected: one that the decoder would leave
            out changes what the model computes.
    """
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{path} has no tensor {name!r}, which its architecture needs.")
        if found[name] != shape:
            raise CheckpointError(f"{path}: tensor {name!r} has shape {found[name]}, expected {shape}.")
    if unexpected := sorted(name for name in found.keys() - expected.keys() if not is_harmless(name)):
        raise CheckpointError(
            f"{path} has tensor {unexpected[0]!r} ({len(unexpected)} such), which is not implemented."
        )
