"""A tiny llama as a real GGUF file: seeded weights, a small byte-level BPE vocabulary, a ChatML template.

    path = write_tiny_gguf(tmp_path / "tiny.gguf")

`TinyLlama` holds the sizes (6 query heads over 2 KV heads of 16, hidden 72, so that no two sizes can be mixed up
unnoticed). Weights come from `numpy.random.RandomState`, whose streams never change, so a fixture of logits made
elsewhere stays valid. Also run by Python 3.11 in `tests/make_fixtures.py`: no import of twinmesh here.
"""

from dataclasses import dataclass

import gguf
import numpy as np

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "e r", "Ġ a", "o n", "r e", "Ġ Ġ", "Ġ o", "Ġo f", "a n", "n d", "Ġa nd", "l l"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_characters():
    """Map each byte to GPT-2's printable stand-in for it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    out, spare = {}, 256
    for byte in range(256):
        out[byte] = chr(byte) if byte in printable else chr(spare)
        spare += byte not in printable
    return out


TOKENS = [*SPECIAL, *byte_characters().values(), *(merge.replace(" ", "") for merge in MERGES), *USER_DEFINED]
TOKEN_TYPES = [3] * len(SPECIAL) + [1] * (256 + len(MERGES)) + [4] * len(USER_DEFINED)


@dataclass(frozen=True)
class TinyLlama:
    """Sizes of the tiny model. Token ids: 0 to 2 special, then 256 bytes, the merges, and "<think>"."""

    layers: int = 2
    hidden: int = 72
    inner: int = 80
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    context: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = True
    seed: int = 0

    @property
    def vocab(self):
        return len(TOKENS)

    def weights(self):
        """Draw a float32 array [out, in] for each of Hugging Face's names, in Hugging Face's row order."""
        random = np.random.RandomState(self.seed)

        def dense(rows, columns):
            return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

        def norm():
            return (1 + 0.1 * random.standard_normal(self.hidden)).astype(np.float32)

        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        out = {"model.embed_tokens.weight": 4 * dense(self.vocab, self.hidden), "model.norm.weight": norm()}
        for i in range(self.layers):
            prefix = f"model.layers.{i}."
            out[prefix + "input_layernorm.weight"] = norm()
            out[prefix + "self_attn.q_proj.weight"] = 2 * dense(q_rows, self.hidden)
            out[prefix + "self_attn.k_proj.weight"] = 2 * dense(kv_rows, self.hidden)
            out[prefix + "self_attn.v_proj.weight"] = dense(kv_rows, self.hidden)
            out[prefix + "self_attn.o_proj.weight"] = dense(self.hidden, q_rows)
            out[prefix + "post_attention_layernorm.weight"] = norm()
            out[prefix + "mlp.gate_proj.weight"] = dense(self.inner, self.hidden)
            out[prefix + "mlp.up_proj.weight"] = dense(self.inner, self.hidden)
            out[prefix + "mlp.down_proj.weight"] = dense(self.hidden, self.inner)
        if not self.tied:
            out["lm_head.weight"] = 4 * dense(self.vocab, self.hidden)
        return out

    def metadata(self):
        """Make the GGUF metadata by key, without the tokenizer's."""
        return {
            "general.architecture": "llama",
            "general.name": "Tiny Llama",
            "llama.block_count": self.layers,
            "llama.context_length": self.context,
            "llama.embedding_length": self.hidden,
            "llama.feed_forward_length": self.inner,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.attention.key_length": self.head_dim,
            "llama.attention.value_length": self.head_dim,
            "llama.attention.layer_norm_rms_epsilon": self.eps,
            "llama.rope.freq_base": self.rope_theta,
            "llama.rope.dimension_count": self.head_dim,
            "llama.vocab_size": self.vocab,
        }


TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TOKEN_TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": CHAT_TEMPLATE,
}

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """Convert Hugging Face's name of a weight to GGUF's."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, index, rest = stem.split(".", 3)
        return f"blk.{index}.{_GGUF_NAMES[rest]}.weight"
    return f"{_GGUF_NAMES[stem]}.weight"


def interleave_rotary(weight, heads):
    """Reorder rows of a Q or K projection from rotary halves (Hugging Face) to neighbouring pairs (llama.cpp)."""
    rows = np.arange(weight.shape[0]).reshape(heads, 2, -1)  # [H, half, D / 2]
    return weight[rows.transpose(0, 2, 1).reshape(-1)]


def write_tiny_gguf(path, model=None, *, metadata=None, tensors=None):
    """Write `model` (default `TinyLlama()`) to `path` and return it.

    `metadata` and `tensors` override by key and by GGUF name; None leaves an entry out. For files that must be refused.
    """
    model = model or TinyLlama()
    arrays = {}
    for name, weight in model.weights().items():
        heads = {"q_proj": model.heads, "k_proj": model.kv_heads}.get(name.split(".")[-2])
        arrays[gguf_name(name)] = interleave_rotary(weight, heads) if heads else weight
    tensors = {name: array for name, array in (arrays | (tensors or {})).items() if array is not None}
    return write_gguf(path, "llama", model.metadata() | TOKENIZER | (metadata or {}), tensors)


def write_aligned_gguf(path, model=None, *, beyond=0, tensors=None):
    """Write `model` so that its embedding begins `beyond` bytes (0 or 32) after a multiple of 64; return the path."""
    for length in range(64):
        write_tiny_gguf(path, model, metadata={"general.name": "x" * (1 + length)}, tensors=tensors)
        reader = gguf.GGUFReader(path)
        (offset,) = (tensor.data_offset for tensor in reader.tensors if tensor.name == "token_embd.weight")
        if offset % 64 == beyond:
            return path
    raise AssertionError(f"no name puts the embedding there: {beyond}")


def write_gguf(path, architecture, metadata, tensors):
    """Write a GGUF file and return its path; keys of `metadata` whose value is None are left out.

    A tensor is an array, or the bytes of its rows and the type that they are of.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, array in tensors.items():
        raw, kind = array if isinstance(array, tuple) else (array, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    if key == "general.architecture":  # the writer has put it there already
        writer.kv_data[0][key].value = value
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
