"""Write the fixtures of tokenizers: what independent references say about the 500 texts of helpers/awkward_texts.py.

Run by a maintainer when a fixture has to change, with a Python that has gguf, numpy, regex, sentencepiece with
protobuf, tokenizers and transformers (it does not import twinmesh):

    python tests/make_tokenizer_fixtures.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf \
        --gemma3 gemma-3-270m-q4_k_m.gguf --gemma3-files DIR --qwen3 DIR

Each DIR holds the model's own tokenizer.json. What is written:

- `tokenizer_ids.npz`: token ids of the texts. `smollm2`: by the byte-level BPE written by hand below, over the GGUF
  file's tokens. `gemma3`: by the model's own tokenizer.json through `tokenizers`; where the text holds no "▁" and no
  control token, the sentencepiece library agrees, fed with the GGUF file's tokens, scores and types.
- `tokenizer_qwen3.json.xz`: the part of Qwen3's tokenizer (Apache 2.0) that these texts use, renumbered, and by each of
  llama.cpp's rules the ids of the texts over it, by hand. For Qwen's rule its whole tokenizer.json agrees.
- `tokenizer_spm.json.xz`: two models that sentencepiece trained, with and without a space put first, its ids of the
  texts, and its texts of random runs of tokens.
- `chat_qwen3.json`: Qwen3's chat template (Apache 2.0), and conversations with tools as transformers renders them.
"""
# Its packages are not in this project's environment.
# mypy: ignore-errors

import argparse
import io
import itertools
import json
import lzma
import random
import sys
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import regex
import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(ROOT / "tests"))

from helpers.awkward_texts import awkward_texts  # noqa: E402
from helpers.tiny_gguf import byte_characters  # noqa: E402

TEXTS = awkward_texts()

# As llama.cpp has them (src/llama-vocab.cpp): rewritten forms of the expressions in the models' own files, which are
# what Twinmesh has. Capitals and small letters are the files' here too: llama.cpp's stand-ins for them leave out marks.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
RULES = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
    "llama-bpe": [
        rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    ],
    "qwen2": [rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"],
    "qwen35": [
        rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",
    ],
    "tekken": [rf"{CASES[0]}|{CASES[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"],
    "gpt-4o": [
        rf"{CASES[0]}{ENDINGS}?|{CASES[1]}{ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
        rf"{SPACES}",
    ],
}
WHOLE_WORDS = {"llama-bpe", "tekken"}
NFC = {"qwen2", "qwen35"}


class HandBPE:
    """Byte-level BPE straight from its definition: split, then always the merge of the lowest rank. Slow and plain."""

    def __init__(self, tokens, kinds, merges, name):
        """GGUF's lists of tokens, token types and merges, and llama.cpp's name of a rule."""
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (2, 3, 4)]
        self.expressions = [regex.compile(expression) for expression in RULES[name]]
        self.name, self.characters, self.used = name, byte_characters(), set()

    def encode(self, text):
        """Text -> ids; special tokens written out become theirs."""
        pattern = "|".join(regex.escape(token) for token in sorted(self.special, key=len, reverse=True))
        out = []
        for part in regex.split(f"({pattern})", text) if pattern else [text]:
            out += [self.ids[part]] if part in self.special else self._plain(part)
        return out

    def _plain(self, text):
        pieces = [unicodedata.normalize("NFC", text) if self.name in NFC else text]
        for expression in self.expressions:
            pieces = [piece for whole in pieces for piece in cut(expression, whole)]
        out = []
        for word in ("".join(self.characters[b] for b in piece.encode()) for piece in pieces):
            whole = self.name in WHOLE_WORDS and word in self.ids
            out += [self.ids[part] for part in ([word] if whole else self._merge(list(word)))]
        return out

    def _merge(self, parts):
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            rank = {pair: self.ranks[pair] for pair in pairs if pair in self.ranks}
            if not rank:
                break
            left, right = best = min(rank, key=rank.__getitem__)
            self.used.add(best)
            merged, i = [], 0
            while i < len(parts):
                hit = parts[i : i + 2] == [left, right]
                merged.append(left + right if hit else parts[i])
                i += 2 if hit else 1
            parts = merged
        return parts


def cut(expression, text):
    """What the expression matches and what lies between, in order."""
    at = 0
    for match in expression.finditer(text):
        if match.end() == match.start():
            continue
        if match.start() > at:
            yield text[at : match.start()]
        yield match.group()
        at = match.end()
    if at < len(text):
        yield text[at:]


def gguf_tokenizer(path):
    """The `tokenizer.ggml.` keys of a GGUF file."""
    reader = gguf.GGUFReader(path)
    start = "tokenizer.ggml."
    return {key.removeprefix(start): f.contents() for key, f in reader.fields.items() if key.startswith(start)}


def packed(lists):
    """Lists of ids as two arrays: all of them in a row, and how many each list has."""
    return np.array([i for ids in lists for i in ids], np.uint32), np.array([len(ids) for ids in lists], np.uint16)


def write_xz(name, content):
    """JSON, compressed."""
    (FIXTURES / name).write_bytes(lzma.compress(json.dumps(content, ensure_ascii=False).encode(), preset=9))


def smollm2(path):
    """Ids over the GGUF file's vocabulary, by hand."""
    facts = gguf_tokenizer(path)
    bpe = HandBPE(facts["tokens"], facts["token_type"], facts["merges"], "smollm")
    return [bpe.encode(text) for text in TEXTS]


def gemma3(path, files):
    """Ids by the model's tokenizer.json, checked against sentencepiece over the GGUF file's vocabulary."""
    facts = gguf_tokenizer(path)
    reference = tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))
    ids = [reference.encode(text, add_special_tokens=False).ids for text in TEXTS]
    kinds = [2 if i == facts["unknown_token_id"] else kind for i, kind in enumerate(facts["token_type"])]
    pieces = [t.replace(" ", "▁") if kind == 4 else t for t, kind in zip(facts["tokens"], kinds, strict=True)]
    spm = sentencepiece_from(pieces, facts["scores"], kinds, prefix=False)
    control = [facts["tokens"][i] for i, kind in enumerate(kinds) if kind in (2, 3)]
    for text, found in zip(TEXTS, ids, strict=True):
        # sentencepiece gives no ids to control tokens that are written out, and takes "▁" for a space early.
        if "▁" not in text and not any(token in text for token in control) and spm.encode(text) != found:
            raise SystemExit(f"sentencepiece and tokenizer.json disagree about {text!r}.")
    return ids


def sentencepiece_from(pieces, scores, kinds, prefix):
    """A sentencepiece processor over a vocabulary."""
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def qwen3(files):
    """What of the tokenizer the texts use, as GGUF's lists, and ids over it by every rule."""
    path = files / "tokenizer.json"
    whole, reference = json.loads(path.read_text()), tokenizers.Tokenizer.from_file(str(path))
    added = {token["content"]: token["special"] for token in whole["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    vocab = whole["model"]["vocab"]
    tokens = [*sorted(vocab, key=vocab.get), *added]
    kinds = [1] * len(vocab) + [3 if special else 4 for special in added.values()]
    used = set()
    for name in RULES:
        bpe = HandBPE(tokens, kinds, merges, name)
        for text in TEXTS:
            bpe.encode(text)
        used |= bpe.used
    merges = [merge for merge in merges if tuple(merge.split(" ")) in used]
    made = {merge.replace(" ", "") for merge in merges}
    kept = [t for t in tokens if t in made or t in added or t in set(byte_characters().values())]
    # A word that no merge builds, which only a rule that takes words whole finds.
    kept.insert(256, "Ġwholeword")
    kinds = [3 if added.get(t) else 4 if t in added else 1 for t in kept]
    ids = {}
    for name in RULES:
        bpe = HandBPE(kept, kinds, merges, name)
        ids[name] = [bpe.encode(text) for text in [*TEXTS, "a wholeword"]]
    for text, found in zip(TEXTS, ids["qwen2"], strict=False):
        if [kept[i] for i in found] != reference.encode(text).tokens:
            raise SystemExit(f"The part of the tokenizer and the whole disagree about {text!r}.")
    write_xz("tokenizer_qwen3.json.xz", {"tokens": kept, "token_type": kinds, "merges": merges, "ids": ids})


def spm(prefix):
    """A small model that sentencepiece trains, its ids of the texts, and its texts of runs of tokens."""
    passages = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for passage in passages for line in passage.splitlines()] + TEXTS[:50]),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefix,
        # Texts that the 500 do not hold: sentencepiece takes a control token that is written out for plain text.
        unk_piece="<0-unk>",
        bos_piece="<1-bos>",
        eos_piece="<2-eos>",
        # Where there is a prefix, llama.cpp puts one behind each of these as well and sentencepiece does not.
        user_defined_symbols=[]
        if prefix
        else ["<think>", "<|end_header_id|>", "\n", "\n\n", "\n\n\n", "\u2581\u2581\u2581"],
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    draw = random.Random(1).random
    # Without the byte of a space, which `tokenizers` strips from the start like "▁" and sentencepiece does not.
    byte_ids = [i for i, piece in enumerate(proto.pieces) if piece.type == 6 and piece.piece != "<0x20>"]
    runs = []
    for _ in range(300):
        choices = [byte_ids, range(3, len(proto.pieces))]
        run = [choices[int(draw() * 2)] for _ in range(int(draw() * 12))]
        runs.append([ids[int(draw() * len(ids))] for ids in run])
    return {
        # llama.cpp's converter writes spaces for themselves where users defined the token.
        "tokens": [p.piece.replace("\u2581", " ") if p.type == 4 else p.piece for p in proto.pieces],
        "scores": [p.score for p in proto.pieces],
        "token_type": [p.type for p in proto.pieces],
        "ids": [processor.encode(text) for text in TEXTS],
        "decoded": [(run, processor.decode(run)) for run in runs],
    }


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name, « é »"}},
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now & <here>", "parameters": CITY}}
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Orléans"}}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain in Orléans?"}]
ANSWERED = [
    *ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}', "tool_call_id": "1"},
    {"role": "assistant", "content": "<think>\nwet\n</think>\n\nYes."},
    {"role": "user", "content": "Thanks."},
]
CHATS = [
    {"messages": ASKED[1:]},
    {"messages": ASKED},
    {"messages": ASKED, "tools": [TOOL]},
    {"messages": ANSWERED, "tools": [TOOL]},
    {"messages": ANSWERED, "tools": [TOOL, TOOL], "add_generation_prompt": False},
    {"messages": ANSWERED[:4]},
]


def chats(files):
    """Qwen3's chat template (Apache 2.0), and conversations as transformers renders them with it."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(files)
    cases = []
    for chat in CHATS:
        options = {"add_generation_prompt": True, **{key: value for key, value in chat.items() if key != "messages"}}
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False, **options)
        cases.append({"messages": chat["messages"], "options": options, "text": text})
    content = {"template": tokenizer.chat_template, "cases": cases}
    (FIXTURES / "chat_qwen3.json").write_text(json.dumps(content, indent=1) + "\n")


def main():
    """Write every fixture."""
    parser = argparse.ArgumentParser(description="Write the fixtures of tokenizers.")
    for name in ("smollm2", "gemma3", "gemma3-files", "qwen3"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    ids = {"smollm2": smollm2(args.smollm2), "gemma3": gemma3(args.gemma3, args.gemma3_files)}
    arrays = {}
    for name, lists in ids.items():
        arrays[f"{name}_ids"], arrays[f"{name}_counts"] = packed(lists)
    np.savez_compressed(FIXTURES / "tokenizer_ids.npz", **arrays)
    qwen3(args.qwen3)
    chats(args.qwen3)
    write_xz("tokenizer_spm.json.xz", {"prefix": spm(True), "no_prefix": spm(False)})


if __name__ == "__main__":
    main()
