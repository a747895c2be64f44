"""Packages that only some use, and that an extra of the package installs: imported when they are needed.

A module that has one at its head says so in `pyproject.toml`'s extra of that name, and nothing imports it but what has
called `need` before.
"""

from importlib import import_module
from typing import Any


def need(module: str, extra: str, what: str) -> Any:
    """Import a module of a package that the extra `extra` installs; `what` it is for, in the message.

    Raises:
        ValueError: it is not installed; says how to.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is there, and something that it needs itself is not
        raise ValueError(f"{what} needs the package of the extra {extra!r}: pip install 'twinmesh[{extra}]'.") from None
