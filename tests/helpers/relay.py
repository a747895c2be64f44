"""A process between core and executor that knows messages and nothing else: it decodes each, and encodes it again.

    python relay.py        # frames on stdin, frames on stdout: what it is, its length, its bytes

It ends with its input, and with status 1 if JAX was imported meanwhile.
"""

import sys
from struct import Struct

from twinmesh.engine.protocol import wire

HEAD = Struct("<cI")
DECODERS = {b"c": wire.decode_command, b"r": wire.decode_completion}


def main():
    while head := sys.stdin.buffer.read(HEAD.size):
        kind, size = HEAD.unpack(head)
        data = wire.encode(DECODERS[kind](sys.stdin.buffer.read(size)))
        sys.stdout.buffer.write(HEAD.pack(kind, len(data)) + data)
        sys.stdout.buffer.flush()
    return int(not {"jax", "jaxlib", "flax"}.isdisjoint(sys.modules))


if __name__ == "__main__":
    sys.exit(main())
