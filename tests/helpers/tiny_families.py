"""Tiny models of every family: Hugging Face settings, and seeded weights under Hugging Face's names and shapes.

    model = TINY["qwen3"]
    model.settings        # keyword arguments of transformers' configuration class `model.config_class`
    model.weights()       # name -> float32 array [out, in]

Between them they cover tied and untied heads; as many KV heads as query heads, fewer, and one; head sizes that are not
hidden / heads; windows shorter than the prompts of `tests/make_family_fixtures.py`; and sizes that differ wherever a
mix-up could hide. Query heads and `inner` divide by 4, for tensor parallelism. Weights of GPT-OSS' experts are numbers
that MXFP4 holds, so that its files of floats and of packed weights are the same model. `helpers/tiny_files.py` writes
these models as files. Also run by Python 3.11: no import of twinmesh or torch here.
"""

from dataclasses import dataclass

import numpy as np
from helpers.mxfp4 import rounded
from helpers.tiny_gguf import MERGES, SPECIAL, USER_DEFINED, byte_characters

# Small, so that logits of every position make small fixtures: ASCII bytes, the merges and the added tokens.
TOKENS = [*SPECIAL, *list(byte_characters().values())[:128], *(merge.replace(" ", "") for merge in MERGES)]
TOKENS += USER_DEFINED
TOKEN_TYPES = [3] * len(SPECIAL) + [1] * (128 + len(MERGES)) + [4] * len(USER_DEFINED)


@dataclass(frozen=True)
class TinyFamily:
    """One tiny model."""

    name: str
    config_class: str  # transformers' name of it
    model_class: str  # transformers' name of it
    seed: int
    settings: dict
    gguf: str | None  # architecture in llama.cpp's converter; None: a GGUF file cannot say all that the model computes
    on_hub: dict | None = None  # what config.json on the hub has besides today's; None: older ones are not tried
    not_on_hub: tuple = ()  # keys that config.json on the hub lacks

    @property
    def is_gemma(self):
        return self.config_class == "Gemma3TextConfig"

    @property
    def head_dim(self):
        s = self.settings
        return s.get("head_dim", s["hidden_size"] // s["num_attention_heads"])

    @property
    def is_gpt_oss(self):
        return self.config_class == "GptOssConfig"

    @property
    def experts(self):
        """How many experts a layer has; 0: it has an MLP."""
        return self.settings.get("num_local_experts", self.settings.get("num_experts", 0))

    @property
    def kv_heads(self):
        return self.settings.get("num_key_value_heads", self.settings["num_attention_heads"])

    def weights(self):
        """Draw a float32 array for each of Hugging Face's names, in Hugging Face's row order.

        They are scaled so that attention decides what comes next, and so that greedy tokens do not repeat.
        """
        random, s = np.random.RandomState(self.seed), self.settings
        hidden, layers = s["hidden_size"], s["num_hidden_layers"]
        vocab = (len(TOKENS), hidden)
        out = {"model.embed_tokens.weight": (1.0 if self.is_gemma else 2.0) * _dense(random, *vocab)}
        for i in range(layers):
            layer = self._attention(random)
            layer |= self._experts(random) if self.experts else self._mlp(random)
            layer |= self._norms(random)
            out |= {f"model.layers.{i}.{name}": array for name, array in layer.items()}
        out["model.norm.weight"] = self._norm(random, hidden)
        if not s["tie_word_embeddings"]:
            out["lm_head.weight"] = 4 * _dense(random, *vocab)
        return {name: array.astype(np.float32) for name, array in out.items()}

    def _attention(self, random):
        s, dim = self.settings, self.head_dim
        hidden, q_rows, kv_rows = s["hidden_size"], s["num_attention_heads"] * dim, self.kv_heads * dim
        q, k = 2 * _dense(random, q_rows, hidden), 2 * _dense(random, kv_rows, hidden)
        v, out = _dense(random, kv_rows, hidden), {"self_attn.o_proj.weight": 3 * _dense(random, hidden, q_rows)}
        if self.config_class == "Phi3Config":
            return out | {"self_attn.qkv_proj.weight": np.concatenate([q, k, v])}
        for name, weight in dict(q=q, k=k, v=v).items():
            out[f"self_attn.{name}_proj.weight"] = weight
            if self.config_class == "Qwen2Config" or self.is_gpt_oss:
                out[f"self_attn.{name}_proj.bias"] = 0.3 * random.standard_normal(len(weight))
        if self.is_gpt_oss:
            out["self_attn.o_proj.bias"] = 0.3 * random.standard_normal(hidden)
            out["self_attn.sinks"] = 1 + random.standard_normal(s["num_attention_heads"])
        if self.config_class in ("Qwen3Config", "Qwen3MoeConfig", "Gemma3TextConfig"):
            # As in trained models, larger than what norms start from: normalised queries alone attend to everything.
            out["self_attn.q_norm.weight"] = 1.5 + self._norm(random, dim)
            out["self_attn.k_norm.weight"] = 0.5 + self._norm(random, dim)
        return out

    def _mlp(self, random):
        hidden, inner = self.settings["hidden_size"], self.settings["intermediate_size"]
        gate, up = _dense(random, inner, hidden), _dense(random, inner, hidden)
        out = {"mlp.down_proj.weight": 2 * _dense(random, hidden, inner)}
        if self.config_class == "Phi3Config":
            return out | {"mlp.gate_up_proj.weight": np.concatenate([gate, up])}
        return out | {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up}

    def _experts(self, random):
        s, count = self.settings, self.experts
        hidden, inner = s["hidden_size"], s.get("moe_intermediate_size", s["intermediate_size"])
        shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
        gate, up, down = (np.stack([_dense(random, *shape) for _ in range(count)]) for shape in shapes)
        router, down = 4 * _dense(random, count, hidden), 3 * down
        if self.is_gpt_oss:
            # Large enough for some gates to be beyond the limit; gate and up in turn.
            gate_up = np.stack([4 * gate, 3 * up], axis=2).reshape(count, 2 * inner, hidden)
            return {
                "mlp.router.weight": router,
                "mlp.router.bias": random.standard_normal(count),
                "mlp.experts.gate_up_proj": rounded(gate_up).swapaxes(1, 2).copy(),
                "mlp.experts.gate_up_proj_bias": 0.5 * random.standard_normal((count, 2 * inner)),
                "mlp.experts.down_proj": rounded(down).swapaxes(1, 2).copy(),
                "mlp.experts.down_proj_bias": 0.5 * random.standard_normal((count, hidden)),
            }
        is_mixtral = self.config_class == "MixtralConfig"
        names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        block = "block_sparse_moe" if is_mixtral else "mlp"
        out = {f"{block}.gate.weight": router}
        for name, weight in zip(names, (gate, up, down), strict=True):
            out |= {f"{block}.experts.{i}.{name}.weight": weight[i] for i in range(count)}
        return out

    def _norms(self, random):
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.is_gemma:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        norms = {f"{name}.weight": self._norm(random, self.settings["hidden_size"]) for name in names}
        # A tied head would otherwise find the embedding again that went in, and repeat the token.
        return {name: norm + (self.is_gemma and name.startswith("post")) for name, norm in norms.items()}

    def _norm(self, random, size):
        """Draw a norm's weight w: Gemma multiplies by 1 + w, the others by w."""
        return (0 if self.is_gemma else 1) + 0.2 * random.standard_normal(size)


def _dense(random, rows, columns):
    return random.standard_normal((rows, columns)) / np.sqrt(columns)


def described(layers, hidden, inner, heads, kv_heads, *, tied, rope, **others):
    if not all(isinstance(value, dict) for value in rope.values()):
        rope = {"rope_type": "default"} | rope
    return dict(
        vocab_size=len(TOKENS), hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_parameters=rope,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ) | others  # fmt: skip


LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip


def _gemma_settings(*sizes, local=1e4, **others):
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6} | others.pop("rope", {}),
    }
    return described(*sizes, tied=True, rope=rope, rms_norm_eps=1e-6, bos_token_id=2, eos_token_id=[1, 3], **others)


def _family(family):
    def make(name, seed, *rest):
        kind = f"Qwen{name[4]}" if family == "Qwen" else family
        config = "Gemma3TextConfig" if family == "Gemma3" else f"{kind}Config"
        return TinyFamily(name, config, f"{kind}ForCausalLM", seed, *rest)

    return make


_llama, _qwen, _mistral, _gemma, _phi = map(_family, ("Llama", "Qwen", "Mistral", "Gemma3", "Phi3"))
_mixtral, _qwen_moe, _gpt_oss = (
    lambda name, seed, *rest, kind=kind: TinyFamily(name, f"{kind}Config", f"{kind}ForCausalLM", seed, *rest)
    for kind in ("Mixtral", "Qwen3Moe", "GptOss")
)
YARN = dict(rope_type="yarn", factor=4.0, beta_fast=6.0, beta_slow=1.0, original_max_position_embeddings=32)


_MODELS = (
    _llama(
        "llama2", 7, described(2, 48, 80, 4, 4, tied=False, rope={"rope_theta": 1e4}, rms_norm_eps=1e-5), "llama",
        # The first configurations of Llama 2 named none of these.
        {"pretraining_tp": 1}, ("rope_theta", "head_dim", "num_key_value_heads", "tie_word_embeddings", "mlp_bias"),
    ),
    _llama(
        "llama3", 4, described(2, 40, 84, 8, 2, tied=False, rope=LLAMA3_ROPE, head_dim=16, eos_token_id=[2, 3]),
        "llama", {"pretraining_tp": 1},
    ),
    _llama(
        "llama_linear", 6,
        described(2, 36, 60, 4, 1, tied=True, rope=dict(rope_type="linear", factor=4.0, rope_theta=1e4), head_dim=10),
        "llama", {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    _llama(
        "smollm2", 2, described(3, 56, 76, 8, 4, tied=True, rope={"rope_theta": 1e5}, head_dim=8, rms_norm_eps=1e-5),
        "llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
    ),
    _qwen(
        "qwen2", 2, described(2, 56, 92, 4, 2, tied=True, rope={"rope_theta": 1e6}, rms_norm_eps=1e-6), "qwen2",
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1, "use_mrope": False},
    ),
    _qwen(
        "qwen2_window", 10,
        described(
            4, 64, 44, 8, 8, tied=False, rope={"rope_theta": 1e4}, rms_norm_eps=1e-6, use_sliding_window=True,
            sliding_window=12, max_window_layers=2,
        ), None, {},
    ),
    _qwen(
        "qwen3", 0,
        described(3, 40, 68, 8, 4, tied=True, rope={"rope_theta": 1e6}, rms_norm_eps=1e-6, head_dim=12), "qwen3",
        {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 3},
    ),
    _mistral(
        "mistral", 3,
        described(3, 48, 100, 8, 2, tied=False, rope={"rope_theta": 1e4}, head_dim=10, sliding_window=10), None, {},
    ),
    _mistral(
        "mistral_nemo", 3,
        described(2, 32, 52, 8, 4, tied=False, rope={"rope_theta": 1e6}, head_dim=12, sliding_window=None), "llama",
    ),
    _gemma(
        "gemma3", 2,
        _gemma_settings(
            7, 44, 60, 4, 1, local=500.0, head_dim=16, query_pre_attn_scalar=24, sliding_window=9,
            sliding_window_pattern=3,
        ),
        None, {"sliding_window_pattern": 3, "cache_implementation": "hybrid"}, ("layer_types", "tie_word_embeddings"),
    ),
    _gemma(
        "gemma3_linear", 5,
        _gemma_settings(
            8, 40, 56, 8, 2, rope=dict(rope_type="linear", factor=8.0), head_dim=12, query_pre_attn_scalar=12,
            sliding_window=11, sliding_window_pattern=6,
        ), "gemma3", {"_sliding_window_pattern": 6}, ("sliding_window_pattern",),
    ),
    _phi(
        "phi3", 5,
        described(2, 64, 52, 8, 2, tied=False, rope={"rope_theta": 1e4}, rms_norm_eps=1e-5, sliding_window=13), "phi3",
        {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
    ),
    _phi(
        "phi4", 5,
        described(2, 48, 84, 4, 4, tied=True, rope={"rope_theta": 25e4}, rms_norm_eps=1e-5, sliding_window=None),
        "phi3",
    ),
    _mixtral(
        "mixtral", 3,
        described(
            2, 40, 28, 8, 2, tied=False, rope={"rope_theta": 1e6}, rms_norm_eps=1e-5, head_dim=10,
            num_local_experts=8, num_experts_per_tok=2, sliding_window=None,
        ), "llama", {},
    ),
    _qwen_moe(
        "qwen3_moe", 0,
        described(
            2, 36, 60, 8, 4, tied=False, rope=YARN | {"rope_theta": 1e4}, rms_norm_eps=1e-6, head_dim=12,
            moe_intermediate_size=20, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True,
        ), "qwen3moe", {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2},
    ),
    _gpt_oss(
        "gpt_oss", 0,
        described(
            3, 64, 32, 8, 2, tied=False, rope=YARN | {"rope_theta": 1500.0, "truncate": False}, rms_norm_eps=1e-5,
            head_dim=16, num_local_experts=7, num_experts_per_tok=3, sliding_window=9,
        ), "gpt-oss", {"experts_per_token": 3, "initial_context_length": 32},
    ),
)  # fmt: skip
TINY = {model.name: model for model in _MODELS}
