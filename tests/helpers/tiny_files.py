"""The tiny models of `tiny_families.py` as files: a Hugging Face directory, and a GGUF file.

    write_tiny_directory(tmp_path / "qwen3", "qwen3")
    write_tiny_gguf_of(tmp_path / "qwen3.gguf", "qwen3")

The GGUF files are laid out as llama.cpp's converter does it (convert_hf_to_gguf.py, its classes LlamaModel, Qwen2Model,
Qwen3Model, Qwen3MoeModel, Gemma3Model, Phi3MiniModel and GptOssModel, with the tensor names of
`gguf.get_tensor_name_map`): rotary rows of llama as neighbours, Gemma's norms with the 1 added, all experts of a layer
in one tensor. Both have the same small byte-level BPE tokenizer.
"""

import json
import math
import re
from pathlib import Path

import gguf
import numpy as np
from helpers.mxfp4 import hugging_face
from helpers.packed import FORMATS, PACKED, packed
from helpers.tiny_families import TINY, TOKEN_TYPES, TOKENS
from helpers.tiny_gguf import CHAT_TEMPLATE, MERGES, SPECIAL, TOKENIZER, USER_DEFINED, interleave_rotary, write_gguf
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent.parent / "fixtures" / "families"


def tiny_config(name, *, from_hub=False):
    """Read the config.json of a tiny model, as transformers writes it now or as files on the hub still have it."""
    return json.loads((FIXTURES / f"{name}{'.hub' if from_hub else ''}.json").read_text())


def expected(name):
    """Load what transformers computed: `ids` and their `logits`, `prompt_ids` and the `greedy_ids` that follow."""
    return np.load(FIXTURES / f"{name}.npz")


def write_tiny_directory(path, name, *, config=None, shards=1, weights=None):
    """Write a tiny model as a Hugging Face directory and return it.

    `config` replaces config.json as transformers writes it, and `weights` the model's. `shards` > 1 divides the weights
    between files with an index.
    """
    path.mkdir(parents=True, exist_ok=True)
    _write(path / "config.json", config or tiny_config(name))
    _write(path / "tokenizer.json", _tokenizer())
    special = dict(bos_token=SPECIAL[1], eos_token=SPECIAL[2], chat_template=CHAT_TEMPLATE)
    _write(path / "tokenizer_config.json", special | {"tokenizer_class": "PreTrainedTokenizerFast"})
    weights = (TINY | PACKED)[name].weights() if weights is None else weights
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path
    files = {weight: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, weight in enumerate(weights)}
    for file in set(files.values()):
        save_file({weight: weights[weight] for weight in weights if files[weight] == file}, path / file)
    total = sum(array.nbytes for array in weights.values())
    _write(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    return path


def write_packed_directory(path, *, change=lambda weights: None, **options):
    """Write the tiny GPT-OSS as its publisher does, the experts' weights in MXFP4, and return it.

    `change` takes the weights by name, to change some of them.
    """
    weights = {}
    for name, weight in TINY["gpt_oss"].weights().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = hugging_face(weight.swapaxes(1, 2))
            weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            weights[name] = weight
    change(weights)
    packing = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = tiny_config("gpt_oss", from_hub=True) | {"quantization_config": packing}
    return write_tiny_directory(path, "gpt_oss", config=config, weights=weights, **options)


def write_packed(path, format_, *, name="packed", change=lambda weights: None, settings=None, **options):
    """Write a model of `helpers/packed.py` with its projections in one of its formats, and return the directory.

    `change` takes the tensors by name, to change some of them; `settings` are added to `quantization_config`.
    """
    weights = packed(format_, PACKED[name].weights())
    change(weights)
    packing = FORMATS[format_][1] | (settings or {})
    config = tiny_config(name) | {"quantization_config": packing}
    return write_tiny_directory(path, name, config=config, weights=weights, **options)


def _write(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def _tokenizer():
    """Make a tokenizer.json of byte-level BPE."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [(token, True) for token in SPECIAL] + [(token, False) for token in USER_DEFINED]
    switches = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None)
    model |= dict(fuse_unk=False, byte_fallback=False, ignore_merges=False, merges=[m.split(" ") for m in MERGES])
    return dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None, decoder=byte_level,
        added_tokens=[dict(id=TOKENS.index(t), content=t, special=special) | switches for t, special in added],
        pre_tokenizer=byte_level, model=model | {"vocab": {token: i for i, token in enumerate(TOKENS)}},
    )  # fmt: skip


def write_tiny_gguf_of(path, name, *, metadata=None, pack=lambda tensor, array: array):
    """Write a tiny model, which must have a GGUF architecture, as a GGUF file and return it.

    `metadata` overrides by key; None leaves an entry out. `pack` makes of a tensor's name and array what is written.
    """
    model = TINY[name]
    names = gguf.get_tensor_name_map(_ARCHITECTURES[model.gguf], model.settings["num_hidden_layers"])
    tensors = {}
    for weight, array in _stacked(model.weights()).items():
        tensor = _EXPERTS.sub(_expert_name, weight)
        if tensor == weight:
            tensor = names.get_name(weight, try_suffixes=(".weight", ".bias"))
        if tensor.endswith("attn_sinks"):  # alone without a suffix in Hugging Face's files
            tensor += ".weight"
        tensors[tensor] = pack(tensor, _converted(model, weight, array))
    if model.settings["rope_parameters"].get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(model.settings["rope_parameters"], model.head_dim)
    tokenizer = TOKENIZER | {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": TOKEN_TYPES}
    return write_gguf(path, model.gguf, _metadata(model) | tokenizer | (metadata or {}), tensors)


_EXPERTS = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\w+)\.(weight|bias)")
_EXPERT_NAMES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def _expert_name(match):
    return f"blk.{match[1]}.ffn_{_EXPERT_NAMES[match[2]]}_exps.{match[3]}"


def _stacked(weights):
    """Put the experts' matrices of a layer into one array [experts, out, in] for each projection."""
    out, stacks = {}, {}
    for name, weight in weights.items():
        prefix, _, last = name.rpartition(".")
        if match := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name):
            stacks.setdefault(f"{match[1]}.{match[2]}.weight", []).append(weight)
        elif last.startswith("gate_up_proj"):
            end = "bias" if last.endswith("bias") else "weight"
            for turn, part in enumerate(("gate", "up")):
                out[f"{prefix}.{part}_proj.{end}"] = _turned(weight[..., turn::2])
        elif prefix.endswith("experts"):
            out[f"{prefix}.down_proj.{'bias' if last.endswith('bias') else 'weight'}"] = _turned(weight)
        else:
            out[name] = weight
    return out | {name: np.stack(matrices) for name, matrices in stacks.items()}


def _turned(weight):
    return np.ascontiguousarray(weight.swapaxes(1, 2) if weight.ndim == 3 else weight)


_ARCHITECTURES = {architecture: kind for kind, architecture in gguf.MODEL_ARCH_NAMES.items()}


def _converted(model, name, array):
    heads = {"q_proj": model.settings["num_attention_heads"], "k_proj": model.kv_heads}.get(name.split(".")[-2])
    if model.gguf == "llama" and heads:
        return interleave_rotary(array, heads)
    return array + np.float32(1) if model.is_gemma and name.endswith("norm.weight") else array


def _llama3_factors(rope, head_dim):
    """Compute what each frequency is divided by, [head_dim / 2] (the Llama 3.1 release, `apply_scaling`)."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)  # 1: short waves, which are left alone; 0: long ones, which are divided by `factor`
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _metadata(model):
    """Make the metadata by key, as the converter's classes write it."""
    s, dim = model.settings, model.head_dim
    rope = s["rope_parameters"].get("full_attention", s["rope_parameters"])
    keys = {
        "block_count": s["num_hidden_layers"],
        "context_length": s["max_position_embeddings"],
        "embedding_length": s["hidden_size"],
        "feed_forward_length": s["intermediate_size"],
        "attention.head_count": s["num_attention_heads"],
        "attention.head_count_kv": model.kv_heads,
        "attention.layer_norm_rms_epsilon": s.get("rms_norm_eps", 1e-6),
        "rope.freq_base": rope["rope_theta"],
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys |= {f"rope.scaling.yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow")}
    if model.experts:
        keys |= {"expert_count": model.experts, "expert_used_count": s["num_experts_per_tok"]}
    if model.gguf in ("qwen3moe", "gpt-oss"):
        keys["expert_feed_forward_length"] = s.get("moe_intermediate_size", s["intermediate_size"])
    if model.gguf == "llama":
        keys |= {"vocab_size": s["vocab_size"], "rope.dimension_count": dim}
    if model.gguf == "phi3":  # 0: no window, which tells Phi-4 from the others
        keys |= {"rope.dimension_count": dim, "attention.sliding_window": s["sliding_window"] or 0}
        keys["rope.scaling.original_context_length"] = 4096
    if model.is_gemma or model.is_gpt_oss:
        keys["attention.sliding_window"] = s["sliding_window"]
    # The configurations of Qwen2 and Phi-3 have no head_dim.
    if model.gguf not in ("qwen2", "phi3"):
        keys |= {"attention.key_length": dim, "attention.value_length": dim}
    general = {"general.architecture": model.gguf, "general.name": model.name, "general.file_type": 0}
    return general | {f"{model.gguf}.{key}": value for key, value in keys.items()}
