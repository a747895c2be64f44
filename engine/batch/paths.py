"""Where a batch run writes: the output and the files beside it, and which files they must not be.

Beside OUTPUT are `OUTPUT.run`, which remembers the run; of a Parquet file `OUTPUT.jsonl`, where the results are until
all are there; and `.tmp` behind each while it is replaced. Nothing is written here.
"""

import os
from pathlib import Path

from . import parquet
from .files import is_inside, is_same, real_path, scratch_of


class Output:
    """The output of a run. `path` is where it is, with links followed; `str()` gives the name that the caller wrote."""

    def __init__(self, target: str | Path) -> None:
        self._shown, self.path = Path(target), real_path(target)
        # A link's own name says what it is, not that of its target.
        self.is_parquet = parquet.is_parquet(target)
        self.sidecar = _beside(self.path, ".run")
        self.journal = self._journal(self.path)

    def __str__(self) -> str:
        """Return the name that the caller wrote, for messages."""
        return str(self._shown)

    @property
    def shown_journal(self) -> Path:
        """Return where the results are while the run lasts, for messages."""
        return self._journal(self._shown)

    @property
    def files(self) -> list[Path]:
        """Return every file that a run may write."""
        lasting = list(dict.fromkeys((self.path, self.sidecar, self.journal)))
        return [*lasting, *(scratch_of(path) for path in lasting)]

    def check(self) -> None:
        """Refuse an output that no run can write to.

        Raises:
            ValueError: it is not a regular file, its directory does not exist, it cannot be written, or pyarrow is
                missing.
        """
        if self.is_parquet:
            parquet.require_pyarrow(self._shown)
        target = self._shown
        try:
            is_directory = target.is_dir()
        except OSError as error:  # as a name that is too long
            raise ValueError(f"The output {target} cannot be used: {error.strerror}.") from None
        if is_directory:
            raise ValueError(f"The output {target} is a directory: give a file name.")
        if target.exists() and not target.is_file():
            raise ValueError(f"The output {target} is not a regular file: a run could not be resumed from it.")
        if not target.parent.is_dir():
            raise ValueError(f"The output's directory {target.parent} does not exist: make it first.")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise ValueError(f"The output {target} cannot be written: permission denied.")

    def refuse_to_overwrite(self, source: Path | None, checkpoint: Path) -> None:
        """Refuse an output that would overwrite the input or the model, itself or by one of the files beside it.

        Args:
            source: the input; None: stdin.
            checkpoint: the model's file or directory.

        Raises:
            ValueError: it would, or it is in the model's directory.
        """
        if is_inside(self.path, checkpoint):
            raise ValueError(
                f"The output {self} is in the model's directory, whose content tells models apart: give another place."
            )
        for read, what in ((source, "input"), (checkpoint, "model")):
            for path in self.files:
                if read is not None and is_same(path, read):
                    is_beside = f" would overwrite {path.name}, which" if path != self.path else ""
                    raise ValueError(f"The output {self}{is_beside} is the {what} file: give another name.")

    def _journal(self, target: Path) -> Path:
        return _beside(target, ".jsonl") if self.is_parquet else target


def _beside(path: Path, ending: str) -> Path:
    """Return the path with `ending` added to its name."""
    return path.with_name(path.name + ending)
