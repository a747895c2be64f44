"""The files of a GGUF model that llama.cpp's gguf-split has cut, by their names. It opens none of them."""

import re
from pathlib import Path

_FIRST = re.compile(r"(?P<stem>.+)-00001-of-(?P<count>\d{5})\.gguf")


def gguf_parts(path: Path) -> list[Path]:
    """`path`, and behind it the other parts where its name is that of the first: NAME-00001-of-0000N.gguf."""
    name = _FIRST.fullmatch(path.name)
    if name is None:
        return [path]
    others = range(2, int(name["count"]) + 1)
    return [path, *(path.with_name(f"{name['stem']}-{part:05}-of-{name['count']}.gguf") for part in others)]
