"""Finds the special tokens of a Hugging Face directory: which tokens, by which names, and which end a generation.

Places and precedence are those of transformers 5.19. tokenizer_config.json names tokens (`eos_token`, or any name that
ends in `_token`), lists more (`additional_special_tokens`, `extra_special_tokens`), and in `added_tokens_decoder` gives
tokens flags, which count before those in tokenizer.json. Only where it has no `added_tokens_decoder`, the older files
count too: special_tokens_map.json before it, and added_tokens.json behind tokenizer.json.

One deviation: transformers gives a named token that is not in the vocabulary an id of its own, for which no model has
an embedding. Here it is a name for templates and no token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer

from ..errors import CheckpointError
from ..json_file import read_json

_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip")


@dataclass
class _Found:
    """What the files say; later ones change it."""

    named: dict[str, AddedToken] = field(default_factory=dict)  # by name; special
    listed: list[AddedToken] | None = None  # without a name; None: no file has a list
    flagged: dict[int, AddedToken] = field(default_factory=dict)  # by id


def mark_special(backend: BackendTokenizer, path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Make special in `backend` what the directory `path` calls special, and add the tokens that its files add.

    Args:
        backend: as tokenizer.json, or a vocabulary and merges, made it.
        path: the directory.
        config: the contents of its tokenizer_config.json.

    Returns:
        Text by name of every special token that has one; some are not in the vocabulary.

    Raises:
        CheckpointError: a file that is damaged, or gives a token another id than the vocabulary does.
    """
    own = backend.get_added_tokens_decoder()
    found = _from_config(path / _CONFIG, config)
    has_table = config.get("added_tokens_decoder") is not None
    if not has_table:
        _add_map(path / _MAP, found)
        found.flagged = _from_added(path / _ADDED, found) | own
    _flag(backend, path / (_CONFIG if has_table else _ADDED), found)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = [*found.named.values(), *(found.listed or ())]
    backend.add_tokens([t for t in named if t.content not in known and backend.token_to_id(t.content) is not None])
    return {name: token.content for name, token in found.named.items()}


def _flag(backend: BackendTokenizer, path: Path, found: _Found) -> None:
    """Give tokens their flags, and add those that are new, all at once: each time the library sorts all of them anew.

    What tokenizer.json or a name makes special stays special.
    """
    own = backend.get_added_tokens_decoder()
    known = {token.content: repr(token) for token in own.values()}
    special = {token.content for token in [*found.named.values(), *(t for t in own.values() if t.special)]}
    for token in found.flagged.values():
        token.special = token.special or token.content in special
    changed = [item for item in sorted(found.flagged.items()) if known.get(item[1].content) != repr(item[1])]
    backend.add_tokens([token for _, token in changed])
    for index, token in changed:
        if token.content not in known and backend.token_to_id(token.content) != index:
            raise CheckpointError(f"{path}: token {token.content!r} does not get the id {index}.")


def end_ids(path: Path, eos: int | None) -> frozenset[int]:
    """Collect the ids that end a generation, as vLLM does.

    They are the tokenizer's EOS and those in generation_config.json. config.json, which may still have those of an
    older tokenizer, counts only where neither names one.

    Raises:
        CheckpointError: a file that is damaged, or names something else than ids.
    """
    ends = _ids(path / "generation_config.json") | ({eos} if eos is not None else set())
    return frozenset(ends or _ids(path / "config.json"))


def _ids(path: Path) -> set[int]:
    config = _optional(path)
    text = config.get("text_config")
    ends: set[int] = set()
    for section in (config, text if isinstance(text, dict) else {}):
        found = section.get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if not all(i is None or (isinstance(i, int) and not isinstance(i, bool) and i >= 0) for i in ids):
            raise CheckpointError(f"{path}: eos_token_id is {found!r}, neither an id nor a list of ids.")
        ends.update(i for i in ids if i is not None)
    return ends


def _from_config(path: Path, config: Mapping[str, Any]) -> _Found:
    found = _Found()
    for name in (*_STANDARD, *(key for key in config if key.endswith("_token") and key not in _STANDARD)):
        is_switch = isinstance(config.get(name), bool) and name not in _STANDARD  # add_bos_token
        if config.get(name) is not None and not is_switch:
            found.named[name] = _token(path, name, config[name])
    lists = (config.get("extra_special_tokens"), config.get("additional_special_tokens"))
    _take_listed(path, found, next(filter(None, lists), next((x for x in lists if x is not None), None)))
    found.flagged = _decoder(path, config.get("added_tokens_decoder") or {})
    by_content = {token.content: token for token in found.flagged.values()}
    found.named |= {name: by_content.get(found.named[name].content, found.named[name]) for name in found.named}
    return found


def _take_listed(path: Path, found: _Found, listed: object) -> None:
    """Take in special tokens that are a list, or a dict by the model's own names for them."""
    if isinstance(listed, Mapping):
        found.named |= {str(name): _token(path, str(name), value) for name, value in listed.items()}
    elif isinstance(listed, list):
        found.listed = [*(found.listed or ()), *(_token(path, "a special token", value) for value in listed)]
    elif listed is not None:
        raise CheckpointError(f"{path}: its further special tokens are neither a list nor names with texts.")


def _decoder(path: Path, decoder: object) -> dict[int, AddedToken]:
    try:
        if not isinstance(decoder, Mapping):
            raise TypeError("it is not an object")
        return {
            int(index): _added(fields, special=fields.get("special", False), normalized=fields.get("normalized", True))
            for index, fields in decoder.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: added_tokens_decoder is damaged: {error}.") from None


def _add_map(path: Path, found: _Found) -> None:
    """Let special_tokens_map.json change what tokenizer_config.json says."""
    names = _optional(path)
    for name, value in names.items():
        if name == "extra_special_tokens" or (name == "additional_special_tokens" and found.listed is None):
            _take_listed(path, found, value)
        elif name in _STANDARD and value is None:
            found.named.pop(name, None)
        elif name in _STANDARD or (name.endswith("_token") and name not in found.named):
            found.named[name] = _token(path, name, value)


def _from_added(path: Path, found: _Found) -> dict[int, AddedToken]:
    """Read added_tokens.json, which has no flags: what is special elsewhere is special."""
    special = {token.content for token in [*found.named.values(), *(found.listed or ())]}
    added = {}
    for text, index in _optional(path).items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise CheckpointError(f"{path}: the id of token {text[:80]!r} is {str(index)[:80]}.")
        try:
            added[index] = AddedToken(text, special=text in special, normalized=text not in special)
        except UnicodeEncodeError:  # half of a surrogate pair
            raise CheckpointError(f"{path}: token {text[:80]!r} is no text.") from None
    return added


def _token(path: Path, name: str, value: object) -> AddedToken:
    """Read a special token, which is a text or an object of AddedToken's fields."""
    try:
        if isinstance(value, str):
            return AddedToken(value, special=True, normalized=False)
        if isinstance(value, Mapping):
            return _added(value, special=True, normalized=value.get("normalized", False))
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"{path}: {name[:80]!r} is neither a text nor an added token.")


def _added(fields: Mapping[str, Any], *, special: bool, normalized: bool) -> AddedToken:
    flags = {name: fields.get(name, False) for name in _FLAGS}
    return AddedToken(fields["content"], special=special, normalized=normalized, **flags)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
