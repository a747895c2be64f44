"""Reads a tokenizer from the files of a Hugging Face directory, and writes such files.

tokenizer.json holds the tokenizer; `special_files.py` finds its special tokens and those that end a generation. Files
written by `save_tokenizer` give the same behaviour when they are read, here and in transformers. SentencePiece's
tokenizer.model is not read. Chat templates are in `chat_files.py`.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, normalizers, processors
from tokenizers.models import BPE

from ..errors import CheckpointError
from ..json_file import read_json
from .chat import ChatTemplate
from .chat_files import save_chat_template
from .pretokenizers import pre_tokenizer, rule
from .special_files import end_ids, mark_special
from .tokenizer import SpecialTokens, Tokenizer

# Without tokenizer.json, only the class says how text is cut.
_RULES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}


def tokenizer_from_directory(path: str | Path, rows: int | None = None) -> Tokenizer:
    """Read the tokenizer in the directory `path`, for a model whose embedding has `rows` rows (None: enough).

    Raises:
        CheckpointError: no tokenizer, one that is not supported, a damaged file, or ordinary tokens past the last row;
            names the file.
    """
    path = Path(path)
    try:
        return _read(path, _optional(path / "tokenizer_config.json"), rows)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library, which pyo3 raises as a BaseException
        raise CheckpointError(f"{path / 'tokenizer.json'} is damaged: {' '.join(str(error).split())}.") from None


def save_tokenizer(tokenizer: Tokenizer, chat_template: ChatTemplate, directory: str | Path) -> None:
    """Write `tokenizer` and `chat_template` as `tokenizer_from_directory` and `chat_template_from_directory` read them.

    The files are tokenizer.json, tokenizer_config.json, generation_config.json (the ids that end a generation), and
    chat_template.jinja if there is a template.
    """
    directory = Path(directory)
    special = tokenizer.special
    tokenizer.backend.save(str(directory / "tokenizer.json"), pretty=False)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special.standard}
    if special.others:
        config["extra_special_tokens"] = dict(special.others)
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "generation_config.json", {"eos_token_id": sorted(special.eos_token_ids)})
    save_chat_template(chat_template, directory)


def _read(path: Path, config: dict[str, Any], rows: int | None) -> Tokenizer:
    backend = _backend(path, config)
    named = mark_special(backend, path, config)
    bos, eos = named.pop("bos_token", None), named.pop("eos_token", None)
    unk, pad = named.pop("unk_token", None), named.pop("pad_token", None)
    _set_post_processor(backend, config, bos, eos)
    ends = end_ids(path, None if eos is None else backend.token_to_id(eos))
    try:
        tokenizer = Tokenizer(backend, SpecialTokens(bos, eos, unk, pad, ends, named))
        if rows is not None:
            tokenizer.limit(rows)
        return tokenizer
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _backend(path: Path, config: dict[str, Any]) -> BackendTokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return BackendTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for any file it cannot read
            raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())}.") from None
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _from_merges(path, str(config.get("tokenizer_class", "")).removesuffix("Fast"))
    if (path / "tokenizer.model").is_file():
        raise CheckpointError(
            f"{path} has its tokenizer only as tokenizer.model, which is not read: save it as tokenizer.json with "
            "transformers' AutoTokenizer.from_pretrained and save_pretrained."
        )
    raise CheckpointError(f"{path} has no tokenizer: tokenizer.json is missing.")


def _from_merges(path: Path, kind: str) -> BackendTokenizer:
    if kind not in _RULES:
        raise CheckpointError(
            f"{path} has no tokenizer.json, and vocab.json with merges.txt is read for a tokenizer_class "
            f"{' or '.join(_RULES)} only, not {kind or 'none'}."
        )
    how = rule(_RULES[kind])
    try:
        model = BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"), ignore_merges=how.whole_words)
    except Exception as error:  # as above
        raise CheckpointError(f"{path / 'vocab.json'} with merges.txt cannot be read: {error}.") from None
    backend = BackendTokenizer(model)
    if how.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizer(how), decoders.ByteLevel()
    return backend


def _set_post_processor(backend: BackendTokenizer, config: dict[str, Any], bos: str | None, eos: str | None) -> None:
    """Add BOS and EOS as tokenizer_config.json asks, unless a post-processor in tokenizer.json adds special tokens."""
    if backend.post_processor is not None and backend.num_special_tokens_to_add(False):
        return
    before = [bos] if config.get("add_bos_token") is True and bos is not None else []
    after = [eos] if config.get("add_eos_token") is True and eos is not None else []
    ids = [(text, backend.token_to_id(text)) for text in {*before, *after}]
    if ids and all(i is not None for _, i in ids):
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=ids
        )
