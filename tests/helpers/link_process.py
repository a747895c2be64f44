"""Another process at the other end of links, for tests: it fetches what it is told to, and offers too.

    python link_process.py        # pickled calls on stdin, pickled answers on stdout; it ends with its input

`LinkProcess` is the end that a test holds.
"""

import os
import pickle
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


class LinkProcess:
    """A process with eight CPU devices and a link of each kind."""

    def __init__(self):
        tests = Path(__file__).parents[1]
        paths = os.pathsep.join([str(tests), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        env, pipe = os.environ | {"PYTHONPATH": paths}, subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, env=env)

    def call(self, name, *args):
        """Call a method of `Other` there; raise the error that it raised."""
        self.begin(name, *args)
        return self.answer()

    def begin(self, name, *args):
        pickle.dump((name, args), self.process.stdin)
        self.process.stdin.flush()

    def answer(self):
        result = pickle.load(self.process.stdout)
        if isinstance(result, Exception):
            raise result
        return result

    def stop(self):
        """Stop it as a shell does, and wait until it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def close(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Other:
    """What the process can do; `kept` holds what it fetched until it is told to drop it."""

    def __init__(self):
        from twinmesh.engine.worker.links.shared_memory import SharedMemoryLink
        from twinmesh.engine.worker.links.transfer_server import TransferServerLink

        self.links = {"shared_memory": SharedMemoryLink(), "transfer_server": TransferServerLink("127.0.0.1")}
        if find_spec("nixl") is not None:
            from twinmesh.engine.worker.links.nixl import NixlLink

            self.links["nixl"] = NixlLink()
        self.kept = []

    def fetch(self, offer, kv_heads, source_tp, tp, dtype, timeout=60.0):
        """Fetch a staging; say what of it is wrong, and where its first array lies."""
        from helpers.staged import difference, expected, mesh_on
        from twinmesh.engine.worker.kv_transfer import plan
        from twinmesh.engine.worker.links.parcels import fetch_staging

        mesh, route = mesh_on(0, tp), plan(kv_heads, source_tp, tp)
        like = expected(kv_heads, mesh, route, dtype)
        staging = fetch_staging(self.links[offer.link], offer, like, mesh, route, timeout)
        self.kept.append(staging)
        return difference(staging, mesh, route)

    def take(self, offer):
        """Fetch the arrays of an offer as it describes them, and drop them."""
        import jax
        import jax.numpy as jnp

        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = [jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=place) for x in offer.parcels]
        jax.block_until_ready(self.links[offer.link].fetch(offer, wanted, 60.0))

    def drop(self):
        self.kept.clear()

    def offer(self, kind, value, size):
        import jax.numpy as jnp

        return self.links[kind].offer([jnp.full(size, value, jnp.float32)])

    def let_go(self, kind, uuid, was_fetched):
        link = self.links[kind]
        (link.release if was_fetched else link.withdraw)(uuid)

    def held(self, kind):
        return self.links[kind].held_bytes


def main():
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    other = Other()
    while True:
        try:
            name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = getattr(other, name)(*args)
        except Exception as error:
            result = error
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    main()
