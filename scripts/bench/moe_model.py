"""Writes a small mixture of experts with random weights as a Hugging Face directory, for `moe.py`.

Two kinds: "gpt-oss", experts in MXFP4 as its publisher packs them, all else bfloat16; and "qwen3-moe" in bfloat16.
About 100 million of 600 million parameters are active for a token. Written tensor by tensor; no model is ever whole in
memory but in the file's own format.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

KINDS = ("gpt-oss", "qwen3-moe")
VOCABULARY = 20_000
_BLOCK = 32  # numbers of a block of MXFP4
_SCALES = (118, 121)  # exponents plus 127 of blocks, about 1 / sqrt(inputs) times the usual code
_BYTES = 256  # tokens of the tokenizer: text is not what is measured
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The sizes of a model."""

    layers: int = 10
    hidden: int = 768
    inner: int = 768  # columns of an expert
    heads: int = 12
    kv_heads: int = 4
    head_dim: int = 64
    experts: int = 32
    per_token: int = 4

    @property
    def active(self) -> int:
        """Parameters that a token passes, the lookup of its own embedding apart."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        experts = 3 * self.per_token * self.hidden * self.inner + self.experts * self.hidden
        return self.layers * (attention + experts) + VOCABULARY * self.hidden


WHOLE = Size()
BARE = Size(hidden=64, inner=64, heads=1, kv_heads=1)  # as many operations, and hardly any weights


def write_model(folder: Path, kind: str, size: Size = WHOLE) -> Path:
    """Write a model and return its directory; one that is there already is left as it is."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        tensors = dict(_gpt_oss(random, size) if kind == "gpt-oss" else _qwen3_moe(random, size))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _write(folder / "tokenizer.json", _tokenizer())
        _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        _write(folder / "config.json", _config(kind, size))
    return folder


def _config(kind: str, size: Size) -> dict[str, Any]:
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "head_dim": size.head_dim,
        "num_experts_per_tok": size.per_token, "max_position_embeddings": 131_072, "tie_word_embeddings": False,
        "rope_theta": 150_000.0, "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    if kind == "gpt-oss":
        kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(size.layers)]
        not_packed = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return config | {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "intermediate_size": size.inner,
            "num_local_experts": size.experts, "attention_bias": True, "sliding_window": 128, "layer_types": kinds,
            "rope_scaling": _YARN, "swiglu_limit": 7.0, "rms_norm_eps": 1e-5,
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": not_packed},
        }  # fmt: skip
    return config | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "intermediate_size": 4 * size.inner,
        "moe_intermediate_size": size.inner, "num_experts": size.experts, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6,
    }  # fmt: skip


def _gpt_oss(random: np.random.Generator, size: Size) -> Iterator[tuple[str, np.ndarray]]:
    yield from _outside(random, size)
    for layer in range(size.layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        yield from _attention(random, size, layer)
        queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
        for name, length in (("q", queries), ("k", keys), ("v", keys), ("o", size.hidden)):
            yield f"{attention}.{name}_proj.bias", _bias(random, length)
        yield f"{attention}.sinks", _floats(random, size.heads)
        yield f"{mlp}.router.weight", _matrix(random, size.experts, size.hidden)
        yield f"{mlp}.router.bias", _bias(random, size.experts)
        for name, outputs, inputs in (
            ("gate_up_proj", 2 * size.inner, size.hidden),
            ("down_proj", size.hidden, size.inner),
        ):
            blocks = size.experts, outputs, inputs // _BLOCK
            yield f"{mlp}.experts.{name}_blocks", random.integers(0, 256, (*blocks, _BLOCK // 2), np.uint8)
            yield f"{mlp}.experts.{name}_scales", random.integers(*_SCALES, blocks, np.uint8)
            yield f"{mlp}.experts.{name}_bias", _bias(random, size.experts, outputs)


def _qwen3_moe(random: np.random.Generator, size: Size) -> Iterator[tuple[str, np.ndarray]]:
    yield from _outside(random, size)
    for layer in range(size.layers):
        mlp, ones = f"model.layers.{layer}.mlp", np.ones(size.head_dim, ml_dtypes.bfloat16)
        yield from _attention(random, size, layer)
        yield from ((f"model.layers.{layer}.self_attn.{name}_norm.weight", ones) for name in "qk")
        yield f"{mlp}.gate.weight", _matrix(random, size.experts, size.hidden)
        for expert in range(size.experts):
            yield f"{mlp}.experts.{expert}.gate_proj.weight", _matrix(random, size.inner, size.hidden)
            yield f"{mlp}.experts.{expert}.up_proj.weight", _matrix(random, size.inner, size.hidden)
            yield f"{mlp}.experts.{expert}.down_proj.weight", _matrix(random, size.hidden, size.inner)


def _outside(random: np.random.Generator, size: Size) -> Iterator[tuple[str, np.ndarray]]:
    yield "model.embed_tokens.weight", _floats(random, VOCABULARY, size.hidden)
    yield "lm_head.weight", _matrix(random, VOCABULARY, size.hidden)
    yield "model.norm.weight", np.ones(size.hidden, ml_dtypes.bfloat16)


def _attention(random: np.random.Generator, size: Size, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    attention, queries, keys = f"model.layers.{layer}.self_attn", size.heads, size.kv_heads
    for name, heads in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{attention}.{name}_proj.weight", _matrix(random, heads * size.head_dim, size.hidden)
    yield f"{attention}.o_proj.weight", _matrix(random, size.hidden, queries * size.head_dim)
    for name in ("input", "post_attention"):
        yield f"model.layers.{layer}.{name}_layernorm.weight", np.ones(size.hidden, ml_dtypes.bfloat16)


def _matrix(random: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    return _floats(random, outputs, inputs, scale=inputs**-0.5)


def _bias(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw small ones: large ones would send all tokens to the same experts."""
    return _floats(random, *shape, scale=0.02)


def _floats(random: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    drawn: np.ndarray = (random.standard_normal(shape, np.float32) * np.float32(scale)).astype(ml_dtypes.bfloat16)
    return drawn


def _tokenizer() -> Mapping[str, Any]:
    """Make a tokenizer.json of single bytes, with a name for every other row of the embedding."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = {byte: 256 + index for index, byte in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = {chr(others.get(byte, byte)): byte for byte in range(_BYTES)}
    vocabulary |= {f"<{token}>": token for token in range(_BYTES, VOCABULARY)}  # which no text has
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": [],
        },
    }  # fmt: skip


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value) + "\n")
