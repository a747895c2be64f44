"""A batch run as a process of its own, against an engine that repeats the prompt: `python batch_process.py` with the
arguments of `twinmesh batch`, after how long a result takes, in seconds, and the most bytes that a file may have (0:
any).

Prints the most memory it had, in KiB, and the bytes that it read and wrote. Each request that a slow engine finishes
adds a byte to OUTPUT.computed, before its line is written.
"""

import os
import re
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.fake_llm import FakeLLM
from twinmesh.scripts import arguments
from twinmesh.scripts.cli import main


class SlowLLM(FakeLLM):
    """A slow engine, which counts its results in a file, so that a kill does not lose the count."""

    def __init__(self, seconds, count):
        super().__init__()
        self._seconds, self._count = seconds, os.open(count, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def output(self, index, ids, n=1):
        time.sleep(self._seconds)
        os.write(self._count, b".")
        return super().output(index, ids, n)


class InstantLLM(FakeLLM):
    """An engine that always gives the same result, so that all time spent is the batch run's."""

    def __init__(self):
        super().__init__()
        self._output = super().output(0, [97])

    def output(self, index, ids, n=1):
        self.sampling.clear()
        return self._output


if __name__ == "__main__":
    seconds, limit, argv = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    count = argv[argv.index("--output") + 1] + ".computed"
    arguments.load_llm = lambda args: SlowLLM(seconds, count) if seconds else InstantLLM()
    code = main(["batch", *argv])
    # Not getrusage: it counts what the process that forked this one had.
    status, transferred = (Path(f"/proc/self/{name}").read_text() for name in ("status", "io"))
    print(re.search(r"VmHWM:\s*(\d+) kB", status)[1], sum(map(int, re.findall(r"char: (\d+)", transferred))))
    sys.exit(code)
