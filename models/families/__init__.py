"""Model families. Adding a model is adding one file here and its name to `_FAMILIES`."""

from collections.abc import Mapping

from ..errors import CheckpointError
from . import gemma3, gpt_oss, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe
from .family import Family, Format
from .from_gguf import GGUFHeader
from .raw_config import Settings

_FAMILIES: tuple[Family, ...] = tuple(
    module.FAMILY for module in (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe, gemma3, phi3, gpt_oss)
)
HUGGING_FACE: Mapping[str, Format[Settings]] = {
    name: family.hugging_face for family in _FAMILIES for name in family.hugging_face.names
}
GGUF: Mapping[str, Format[GGUFHeader]] = {
    name: family.gguf for family in _FAMILIES if family.gguf is not None for name in family.gguf.names
}


def format_named[Header](formats: Mapping[str, Format[Header]], name: object, what: str) -> Format[Header]:
    """Find the format called `name` in `HUGGING_FACE` or `GGUF`.

    Args:
        formats: one of the two.
        name: as the checkpoint spells it.
        what: what kind of name it is, for the message.

    Raises:
        CheckpointError: a name that is not implemented.
    """
    found = formats.get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(f"{what} {name!r} is not supported; supported: {', '.join(formats)}.")
    return found
