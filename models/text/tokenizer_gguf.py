"""Builds a tokenizer from a GGUF file's metadata (the `tokenizer.ggml.*` keys), as llama.cpp does.

There are two kinds: "gpt2" is byte-level BPE, cut by one of the rules in `pretokenizers.py`; "llama" is SentencePiece's
BPE with byte fallback (Llama 2, Mistral, Phi-3, Gemma), which has scores instead of merges. Both become a BPE of the
`tokenizers` library with a decoder and a post-processor, so that other code need not know the tokenizer's origin. Other
kinds are refused by name. Source: llama.cpp's src/llama-vocab.cpp.

A text becomes the ids that llama.cpp gives it with special tokens parsed, with three exceptions: a rule may normalise
to NFC, a token that the metadata name as an end is special whatever its type, and where the spellings of two special
tokens overlap, the one that starts first counts and not the longer one. Where a byte-level file names neither BOS nor
EOS, it has none: llama.cpp takes token 11.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.models import BPE

from ..errors import CheckpointError
from .pretokenizers import Rule, pre_tokenizer, rule
from .tokenizer import SpecialTokens, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
_SPACE = "▁"
_LLAMA_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # of SentencePiece models whose metadata do not say
_END_KEYS = ("eos", "eot", "eom")  # tokenizer.ggml.<x>_token_id: each ends a generation
# tokenizer.ggml.<x>_token_id of the others (the format spells it so), and their names in templates.
_NAMES = {
    "bos": "bos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "seperator": "sep_token",
    "cls": "cls_token",
    "mask": "mask_token",
}
# Texts of special tokens that end a generation whatever the metadata say: llama.cpp's list without those of code infill
# (padding, repository, file), which would end other generations too.
_END_TEXTS = frozenset(
    [
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<end_of_utterance>",
        "<eos>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ]
)


# Texts that llama.cpp takes for control tokens of code infill whatever their type.
_INFILL_TEXTS = frozenset(
    [
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>"),
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    ]
)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file's metadata describe.

    Raises:
        CheckpointError: keys that are missing or damaged, or a kind of tokenizer that is not implemented.
    """
    tokens = _list(metadata, "tokens", str)
    has_types = "tokenizer.ggml.token_type" in metadata
    kinds = _list(metadata, "token_type", int, len(tokens)) if has_types else [_NORMAL] * len(tokens)
    used = next((n for n in range(len(kinds), 0, -1) if kinds[n - 1] != _UNUSED), 0)  # behind them: padding
    tokens, kinds = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens[:used])], kinds[:used]
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise CheckpointError(f"The tokenizer has the token {twice[:80]!r} more than once.")
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        how = rule(str(metadata.get("tokenizer.ggml.pre", "default")))
        backend, add_bos = _byte_level(tokens, _list(metadata, "merges", str), how), how.add_bos
    elif model == "llama":
        backend, add_bos = _sentencepiece(tokens, kinds, metadata), True
    else:
        raise CheckpointError(
            f"Tokenizer model {model!r} is not supported; supported: 'gpt2' (byte-level BPE), 'llama' (SentencePiece)."
        )
    special = _special_tokens(metadata, tokens, kinds, _LLAMA_IDS if model == "llama" else {})
    _add_tokens(backend, tokens, kinds, special.eos_token_ids, _strips_right(metadata))
    _add_post_processor(backend, special, metadata, add_bos)
    return Tokenizer(backend, special)


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """List the merges of a SentencePiece BPE: every way to cut a token into two others, the highest score first.

    SentencePiece always joins the neighbours whose union scores highest, so a union's score ranks all its cuts. The
    `tokenizers` library needs the cuts of one token in an order as well. SentencePiece breaks ties by the leftmost
    merge; where two cuts of a token compete, that is the one with the longest left side, so it comes first.
    """
    known = frozenset(tokens)
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
    return [
        (token[:cut], token[cut:])
        for token in map(tokens.__getitem__, ranked)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in known and token[cut:] in known
    ]


def _byte_level(tokens: Sequence[str], merges: Sequence[str], how: Rule) -> BackendTokenizer:
    pairs = [_pair(merge) for merge in dict.fromkeys(merges)]  # of one that is there twice, the first place counts
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = _backend(lambda: BPE(vocab, pairs, ignore_merges=how.whole_words))
    if how.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(how)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: Sequence[str], kinds: Sequence[int], metadata: Mapping[str, Any]) -> BackendTokenizer:
    scores = _list(metadata, "scores", float, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    missing = next((f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocab), None)
    if missing is not None:
        raise CheckpointError(f"The tokenizer has no token {missing}, which byte fallback needs.")
    pieces = [i for i, kind in enumerate(kinds) if kind in (_NORMAL, _UNUSED)]
    merges = merges_from_scores([tokens[i] for i in pieces], [scores[i] for i in pieces])
    backend = _backend(lambda: BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    unprefix = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *unprefix]
    )
    return backend


def _backend(build: Callable[[], BPE]) -> BackendTokenizer:
    try:
        return BackendTokenizer(build())
    except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
        raise CheckpointError(
            f"The tokenizer's merges do not fit its tokens: {' '.join(str(error).split())}."
        ) from None


def _special_tokens(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], defaults: Mapping[str, int]
) -> SpecialTokens:
    ids = {name: _special_id(metadata, name, len(tokens), defaults.get(name)) for name in (*_END_KEYS, *_NAMES)}
    texts = {name: None if i is None else tokens[i] for name, i in ids.items()}
    ends = {i for name in _END_KEYS if (i := ids[name]) is not None}
    ends |= {i for i, kind in enumerate(kinds) if _ends_generation(tokens[i], kind)}
    if {"<|return|>", "<|call|>", "<|end|>"} <= {tokens[i] for i in ends}:  # there <|end|> ends a message only
        ends = {i for i in ends if tokens[i] != "<|end|>"}
    others = {_NAMES[name]: text for name in ("seperator", "cls", "mask") if (text := texts[name]) is not None}
    return SpecialTokens(texts["bos"], texts["eos"], texts["unknown"], texts["padding"], frozenset(ends), others)


def _ends_generation(token: str, kind: int) -> bool:
    """Return whether a token's text makes it end a generation, whatever its type.

    Converters mark some of these tokens as user-defined or normal. In Gemma a user-defined `</s>` is HTML.
    """
    return token in _END_TEXTS and (kind != _USER_DEFINED or token != "</s>")


def _special_id(metadata: Mapping[str, Any], name: str, count: int, default: int | None) -> int | None:
    """Read a special token's id; one that is no token's, such as 4294967295, means that the file does not say."""
    found = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    if found is None or (isinstance(found, int) and not isinstance(found, bool)):
        known = (i for i in (found, default) if i is not None and 0 <= i < count)
        return next(known, None)
    raise CheckpointError(f"tokenizer.ggml.{name}_token_id = {found!r} is not a token id.")


def _strips_right(metadata: Mapping[str, Any]) -> bool:
    """Return whether special tokens consume the white space after them, as Phi-3's do.

    The metadata do not say so, therefore the model's name decides, as in llama.cpp.
    """
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _add_tokens(
    backend: BackendTokenizer, tokens: Sequence[str], kinds: Sequence[int], ends: Iterable[int], rstrip: bool
) -> None:
    """Add the tokens that are found in a text before it is cut: special and user-defined ones."""
    control = {i for i, kind in enumerate(kinds) if kind in (_CONTROL, _UNKNOWN) or tokens[i] in _INFILL_TEXTS}
    control |= set(ends)
    plain = {i for i, kind in enumerate(kinds) if kind == _USER_DEFINED} - control

    def added(i: int) -> AddedToken:
        strips = rstrip and tokens[i] not in ("<unk>", "<s>", "<|endoftext|>")
        return AddedToken(tokens[i], normalized=False, rstrip=strips)

    backend.add_special_tokens([added(i) for i in sorted(control)])
    backend.add_tokens([added(i) for i in sorted(plain)])


def _add_post_processor(
    backend: BackendTokenizer, special: SpecialTokens, metadata: Mapping[str, Any], add_bos: bool
) -> None:
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    adds_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    before = [special.bos] if adds_bos and special.bos is not None else []
    after = [special.eos] if adds_eos and special.eos is not None else []
    if before or after:
        ids = [(token, backend.token_to_id(token)) for token in {*before, *after}]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=ids
        )


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise CheckpointError(f"The tokenizer's merge {merge[:80]!r} is not two tokens.")
    return left, right


def _list[T](metadata: Mapping[str, Any], name: str, kind: type[T], count: int = 0) -> list[T]:
    """Read a list; `count`: of its first items, where it has to have as many."""
    found = metadata.get(f"tokenizer.ggml.{name}")
    kinds = (int, float) if kind is float else kind
    if not isinstance(found, list) or not found or not all(isinstance(item, kinds) for item in found):
        raise CheckpointError(
            f"The metadata has no list of {kind.__name__} under tokenizer.ggml.{name}, which the tokenizer needs."
        )
    if len(found) < count:
        raise CheckpointError(f"The tokenizer has {count} tokens but {len(found)} in tokenizer.ggml.{name}.")
    return found[: count or None]
