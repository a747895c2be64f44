"""The tiny llama of `tiny_gguf.py` as a Hugging Face directory: the same weights, in Hugging Face's order.

path = write_tiny_llama_directory(tmp_path / "tiny")
"""

import json

from helpers.tiny_gguf import CHAT_TEMPLATE, TOKENIZER, TinyLlama
from safetensors.numpy import save_file
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.tokenizer_files import save_tokenizer
from twinmesh.models.text.tokenizer_gguf import tokenizer_from_gguf


def settings_of(model):
    """Make the config.json of a `TinyLlama`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": model.context,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
    }


def write_tiny_llama_directory(path, model=None, *, shards=1, dtype="float32", config=None, tensors=None):
    """Write `model` (default `TinyLlama()`) into the new directory `path` and return it.

    `config` and `tensors` override by key and by name; None leaves an entry out. For directories that must be refused.
    """
    model = model or TinyLlama()
    path.mkdir()
    settings = settings_of(model) | (config or {})
    (path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    arrays = {name: array.astype(dtype) for name, array in model.weights().items()} | (tensors or {})
    write_shards(path, {name: array for name, array in arrays.items() if array is not None}, shards)
    tokenizer = tokenizer_from_gguf(TOKENIZER)
    save_tokenizer(tokenizer, ChatTemplate(CHAT_TEMPLATE, tokenizer, name="tiny"), path)
    return path


def write_shards(path, arrays, shards):
    """Write the weights into one file, or into several with an index."""
    if shards == 1:
        save_file(arrays, path / "model.safetensors")
        return
    weight_map, names = {}, list(arrays)
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(names[index::shards], file)
        save_file({name: arrays[name] for name in names[index::shards]}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
