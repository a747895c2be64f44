"""How a benchmark measures another checkout of Twinmesh: in a process to which that checkout is the package.

Such a process may run an old checkout, which has no such file: import this only where the processes are started.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def environment_of(checkout: Path) -> Iterator[dict[str, str]]:
    """Yield an environment in which a checkout, whose folder may have any name, is the package `twinmesh`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "twinmesh").symlink_to(checkout)
        yield os.environ | {"PYTHONPATH": folder}


def report_of(checkout: Path, script: str, options: Sequence[str], **variables: str) -> Any:
    """Run a script on a checkout, with these environment variables besides; return the JSON of its last line."""
    with environment_of(checkout) as environment:
        command = [sys.executable, script, *options]
        done = subprocess.run(command, env=environment | variables, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])
