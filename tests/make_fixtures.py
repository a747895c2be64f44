"""Write tests/fixtures: what Hugging Face transformers and a tokenizer written by hand say about the test models.

Run by a maintainer when a fixture has to change, with a Python that has torch, transformers, gguf, numpy and regex (it
does not import twinmesh, so any version that torch supports will do):

    python tests/make_fixtures.py --model SmolLM2-135M-Instruct.Q4_1.gguf

The tiny models of every family, and Gemma 3, are `make_family_fixtures.py`'s, which also runs alone.

The weights go from the GGUF file through `gguf`'s dequantisation into `LlamaForCausalLM`, float32 on the CPU.
"""
# ruff: noqa: RUF001 (the look-alikes are what is tested)
# Its packages are not in this project's environment.
# mypy: ignore-errors

import argparse
import itertools
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import regex
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(ROOT / "tests"))

from helpers.tiny_gguf import TinyLlama, byte_characters, gguf_name  # noqa: E402
from make_family_fixtures import families  # noqa: E402

PASSAGE = (
    "The lighthouse keeper counted 1,027 steps every evening, and every evening he arrived at a different number. "
    "Some nights the sea was loud; some nights it only breathed. He wrote both down in a small blue book, because a "
    "number that changes is still a fact, and facts, he'd say, keep better than fish do."
)
QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "a   b    c\t\td\n\n\ne",
    "line one\r\nline two\r\n",
    "In 2024, 3.14159 is 1000000 times ½ of ٣ and ²³ or Ⅻ",
    "It's we'll I'd they've 'quoted' CAN'T",
    "日本語のテキストと中文文本，한국어도",
    "Здравствуйте, мир! Γειά σου Κόσμε",
    "👋🏽 family: 👨‍👩‍👧‍👦 flags 🇫🇷🇯🇵",
    "e\u0301 versus \u00e9, and \u200bzero\u200dwidth",
    "\x00\x01\x1b[0m control \x7f",
    "\u00a0no-break\u3000ideographic space",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start |> <|im_end <|endoftext| > not special",
    "<repo_name>x<file_sep>y<jupyter_code>z",
    "def f(x):\n    return x**2  # square\n\n\n        nested",
    "ﷺ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ｆｕｌｌ",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    PASSAGE,
    QUESTION,
]
# GPT-2's pre-tokenizer, from its published encoder; llama.cpp's "smollm" isolates every numeral first.
GPT2 = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
COLUMNS = 64
TOP = 20


class HandBPE:
    """Byte-level BPE straight from its definition: split, then always the merge of the lowest rank. Slow and plain."""

    def __init__(self, tokens, kinds, merges):
        """GGUF's lists of tokens, token types and merges."""
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (3, 4)]
        self.characters = byte_characters()

    def encode(self, text):
        """Text -> ids; special tokens written out become theirs."""
        pattern = "|".join(regex.escape(token) for token in sorted(self.special, key=len, reverse=True))
        out = []
        for part in regex.split(f"({pattern})", text):
            out += [self.ids[part]] if part in self.special else self._plain(part)
        return out

    def _plain(self, text):
        out = []
        for piece in regex.split(r"(\p{N})", text):
            for word in GPT2.findall(piece):
                out += [self.ids[part] for part in self._merge([self.characters[b] for b in word.encode()])]
        return out

    def _merge(self, parts):
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            rank = {pair: self.ranks[pair] for pair in pairs if pair in self.ranks}
            if not rank:
                break
            left, right = min(rank, key=rank.__getitem__)
            merged, i = [], 0
            while i < len(parts):
                hit = parts[i : i + 2] == [left, right]
                merged.append(left + right if hit else parts[i])
                i += 2 if hit else 1
            parts = merged
        return parts


def deinterleave_rotary(weight, heads):
    """Rows of Q or K from llama.cpp's neighbouring rotary pairs back to Hugging Face's halves."""
    rows = np.arange(weight.shape[0]).reshape(heads, -1, 2)  # [H, D / 2, half]
    return weight[rows.transpose(0, 2, 1).reshape(-1)]


def build(config, weights):
    """A float32 `LlamaForCausalLM` holding exactly these weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu").float().eval()
    state = {name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def llama_config(model, vocab):
    """The transformers configuration of sizes given as a `TinyLlama`, with a vocabulary of its own."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.context,
        rms_norm_eps=model.eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tied,
        attn_implementation="eager",
    )


@torch.no_grad()
def logits(model, ids):
    """[T, V] float32."""
    return model(torch.tensor([ids])).logits[0].numpy()


@torch.no_grad()
def greedy(model, ids, stop, limit=16):
    """Greedy continuation, recomputed from scratch at every token; `stop` included."""
    out = []
    while not out or (out[-1] != stop and len(out) < limit):
        out.append(int(logits(model, ids + out)[-1].argmax()))
    return out


def tiny():
    """Logits of the tiny models of tests/helpers/tiny_gguf.py, tied and untied."""
    out = {"ids": np.random.RandomState(1).randint(0, TinyLlama().vocab, 24).astype(np.int32)}
    for tied in (True, False):
        model = TinyLlama(tied=tied)
        out["tied" if tied else "untied"] = logits(
            build(llama_config(model, model.vocab), model.weights()), out["ids"].tolist()
        )
    np.savez_compressed(FIXTURES / "tiny_llama_logits.npz", **out)


def smollm2(path):
    """Logits of the passage, the greedy answer, and token ids of awkward texts."""
    reader = gguf.GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    model = TinyLlama(
        layers=facts["llama.block_count"],
        hidden=facts["llama.embedding_length"],
        inner=facts["llama.feed_forward_length"],
        heads=facts["llama.attention.head_count"],
        kv_heads=facts["llama.attention.head_count_kv"],
        head_dim=facts["llama.rope.dimension_count"],
        context=facts["llama.context_length"],
        rope_theta=facts["llama.rope.freq_base"],
        eps=facts["llama.attention.layer_norm_rms_epsilon"],
    )
    config = llama_config(model, facts["llama.vocab_size"])
    llama = build(config, smollm2_weights(reader, model))
    names = ("tokens", "token_type", "merges")
    bpe = HandBPE(*(facts[f"tokenizer.ggml.{name}"] for name in names))
    cases = [{"text": text, "ids": bpe.encode(text)} for text in TEXTS]
    (FIXTURES / "smollm2_token_ids.json").write_text(json.dumps(cases, indent=0) + "\n")
    ids, question = bpe.encode(PASSAGE), bpe.encode(QUESTION)
    scores = logits(llama, ids)
    columns = np.sort(np.random.RandomState(0).choice(config.vocab_size, COLUMNS, replace=False)).astype(np.int32)
    top = np.argsort(-scores, axis=-1, kind="stable")[:, :TOP].astype(np.int32)
    np.savez_compressed(
        FIXTURES / "smollm2_logits.npz",
        ids=np.array(ids, np.int32),
        columns=columns,
        column_logits=scores[:, columns],
        top_ids=top,
        top_logits=np.take_along_axis(scores, top, axis=-1),
        question_ids=np.array(question, np.int32),
        answer_ids=np.array(greedy(llama, question, stop=2), np.int32),
    )


def smollm2_weights(reader, model):
    """Hugging Face name -> dequantised float32 weight."""
    arrays = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    out = {}
    for name in TinyLlama(layers=model.layers).weights():
        heads = {"q_proj": model.heads, "k_proj": model.kv_heads}.get(name.split(".")[-2])
        weight = arrays.pop(gguf_name(name))
        out[name] = deinterleave_rotary(weight, heads) if heads else weight
    if arrays:
        raise SystemExit(f"Not used: {sorted(arrays)}")
    return out


def main():
    """Write every fixture."""
    parser = argparse.ArgumentParser(description="Write tests/fixtures.")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    FIXTURES.mkdir(parents=True, exist_ok=True)
    tiny()
    families()
    smollm2(parser.parse_args().model)


if __name__ == "__main__":
    main()
