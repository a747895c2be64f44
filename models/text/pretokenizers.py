r"""How byte-level BPE tokenizers cut text before they merge: the rules that llama.cpp names in `tokenizer.ggml.pre`.

A rule is a list of regular expressions. Each one cuts the pieces that the one before it left; its matches and the text
between them become pieces of their own. Names and aliases are those of llama.cpp (src/llama-vocab.cpp,
`llama_vocab::impl::load`). The expressions are those of the models' own tokenizer.json, run by the same engine,
Oniguruma, so that a text is cut alike from either kind of file; llama.cpp has rewritten forms of them (`(?i:'s)` as
`'[sS]`, `\p{Lu}` by lookahead). NFC is part of a rule if the model's own tokenizer normalises to it, which llama.cpp
leaves out.

This file holds data and builds `tokenizers` components from it.
"""

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from ..errors import CheckpointError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
# A word by case: capital letters, then small letters; at least one of the two parts.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_MARKS}|{_SPACES}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDINGS}?|"
    rf"\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    rf"{_SPACES}"
)


@dataclass(frozen=True)
class Rule:
    """One rule, and the settings of the tokenizers that use it."""

    expressions: tuple[str, ...]  # applied in order
    nfc: bool = False  # whether text is normalised to NFC first
    whole_words: bool = False  # whether a piece that is a token stays whole though no merges build it (`ignore_merges`)
    add_bos: bool = False  # default for whether BOS comes first, if the metadata do not say


_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    # llama.cpp's own, used if a file names none.
    (("default",), Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    (
        (
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "exaone4",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
        ),
        Rule((_GPT2,)),
    ),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        Rule((r"\p{N}", _GPT2)),
    ),
    (("falcon",), Rule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        Rule((_LLAMA3,), whole_words=True, add_bos=True),
    ),
    (("dbrx", "smaug-bpe", "glm4", "chatglm-bpe", "grok-2"), Rule((_LLAMA3,))),
    (("qwen2",), Rule((_QWEN2,), nfc=True)),
    (("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "kormo", "f2llmv2"), Rule((_QWEN2,))),
    (("qwen35",), Rule((_QWEN35,), nfc=True)),
    (("tekken",), Rule((_TEKKEN,), whole_words=True, add_bos=True)),
    (("gpt-4o", "llama4", "kanana2"), Rule((_GPT4O,))),
    (
        ("deepseek-coder",),
        Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")),
    ),
    (("deepseek-v3", "hunyuan-dense"), Rule((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3))),
)


def rule(name: str) -> Rule:
    """Find the rule called `name`.

    Raises:
        CheckpointError: no rule has that name; lists the names.
    """
    for names, found in _RULES:
        if name in names:
            return found
    known = ", ".join(repr(name) for names, _ in _RULES for name in names)
    raise CheckpointError(f"Pre-tokenizer {name!r} is not supported; supported: {known}.")


def pre_tokenizer(of: Rule) -> pre_tokenizers.PreTokenizer:
    """Build the rule as a component of the `tokenizers` library, which finally replaces bytes by their stand-ins."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in of.expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
