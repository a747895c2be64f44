"""Which meshes a command is for, which both ends of a worker need to know."""

from ...protocol.actions import (
    AllowTokens,
    AssignPages,
    Command,
    CopyPage,
    Decode,
    Fused,
    Prefill,
    ResetMesh,
    Scatter,
    StartTransfer,
)

_ON_ONE = (AllowTokens, AssignPages, CopyPage, Prefill, Decode, Fused, ResetMesh)


def mesh_of(command: Command) -> int | None:
    """Return the mesh that performs a command, of a transfer its source; None: it names none."""
    if isinstance(command, _ON_ONE):
        return command.mesh
    if isinstance(command, StartTransfer):
        return command.source
    return command.destination if isinstance(command, Scatter) else None
