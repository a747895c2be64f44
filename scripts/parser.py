"""The parser of all commands: a bad argument is answered with one line."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from twinmesh.engine.api.vllm_tables import ENGINE
from twinmesh.engine.options import nearest


class Parser(argparse.ArgumentParser):
    """A parser that answers a bad argument with one line, not with the usage, and an unknown one with the nearest."""

    _unknown_as: str | None = None

    def keep_unknown_as(self, name: str) -> None:
        """Keep arguments that are unknown, in their order, as the attribute `name` of what is found: they are somebody
        else's. None is taken for the beginning of a known one."""
        self._unknown_as, self.allow_abbrev = name, False

    def parse_known_args(  # type: ignore[override]  # of argparse's overloads, the commands need one
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments, and refuse an unknown one here, as only this command's parser can name the nearest."""
        found, unknown = super().parse_known_args(args, namespace)
        if self._unknown_as is not None:
            setattr(found, self._unknown_as, unknown)
            return found, []
        for text in unknown:
            name = text.partition("=")[0]
            if name.startswith("--") and name != "--":
                instead = ENGINE.get(name[2:].replace("-", "_"))
                if instead is not None and any(flag == "--topology" for flag in self._option_string_actions):
                    self.error(f"there is no argument {name}, which vLLM has: {instead}")
                flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
                close = nearest(name, flags)
                self.error(f"there is no argument {name}" + (f": the nearest is {close}" if close else ""))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """End the program with one line."""
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. '{self.prog} --help' explains.\n")
