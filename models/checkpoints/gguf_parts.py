"""Names the files of a GGUF model that llama.cpp's gguf-split has cut. It opens none of them."""

import re
from pathlib import Path

_FIRST = re.compile(r"(?P<stem>.+)-00001-of-(?P<count>\d{5})\.gguf")


def gguf_parts(path: Path) -> list[Path]:
    """List `path` and, if its name is that of a first part, NAME-00001-of-0000N.gguf, the other parts after it."""
    name = _FIRST.fullmatch(path.name)
    if name is None:
        return [path]
    others = range(2, int(name["count"]) + 1)
    return [path, *(path.with_name(f"{name['stem']}-{part:05}-of-{name['count']}.gguf") for part in others)]
