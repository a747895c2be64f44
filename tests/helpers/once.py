"""What the workers of a run of tests make once for all of them: the first that needs it, while others wait for it."""

import fcntl
import hashlib
import json


def once(tmp_path_factory, name, make):
    """Return what `make()` returns, which JSON can hold, from whichever worker has called it for this name.

    A worker that fails leaves the work to the next one.
    """
    folder = tmp_path_factory.getbasetemp()
    if folder.name.startswith("popen-"):  # a worker's, inside that of all
        folder = folder.parent
    kept = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(make()))
        return json.loads(kept.read_text())
