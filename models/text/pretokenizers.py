r"""How byte-level BPE tokenizers cut text before they merge: the rules that llama.cpp names in `tokenizer.ggml.pre`.

A rule is a list of regular expressions. Each cuts the pieces that the one before it left, and both what it matches and
what lies between its matches become pieces of their own. Names and aliases are those of llama.cpp (src/llama-vocab.cpp,
`llama_vocab::impl::load`); the expressions are those of the models' own tokenizer.json, of which llama.cpp's are
rewritten forms (`(?i:'s)` as `'[sS]`, `\p{Lu}` by lookahead), so that the same engine, Oniguruma, cuts the same text
either way. NFC is part of a rule where the model's own tokenizer normalises so, which llama.cpp leaves out.

Facts only: nothing is built here but the `tokenizers` components.
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
# A word by case: capitals first and small letters after them, either of which may be missing but not both.
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
    """One rule, and what goes with it.

    `expressions` are applied in order. `nfc`: the model's tokenizer normalises to NFC first. `whole_words`: a piece
    that is a token stays whole even where the merges would not build it (`ignore_merges`). `add_bos`: BOS comes first
    where the metadata do not say.
    """

    expressions: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    # llama.cpp's own, where a file names none.
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
    """The rule of that name.

    Raises:
        CheckpointError: no rule is called so; names those that are.
    """
    for names, found in _RULES:
        if name in names:
            return found
    known = ", ".join(repr(name) for names, _ in _RULES for name in names)
    raise CheckpointError(f"Pre-tokenizer {name!r} is not supported; supported: {known}.")


def pre_tokenizer(of: Rule) -> pre_tokenizers.PreTokenizer:
    """The rule as a component of the `tokenizers` library, bytes turned into their stand-ins at the end."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in of.expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
