"""The configurations of published models by name, for those who ask what a model would do before they have its files.

Values are those of each model's own config.json, of which only the keys that differ from their family's defaults or
are needed are here. A name is the model's own in lower case without the words for how it was tuned, which change no
size: "meta-llama/Meta-Llama-3.1-8B-Instruct" and "llama-3.1-8b" are the same.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ..config import ModelConfig
from ..errors import CheckpointError
from .described import Described, described
from .raw_config import Settings

_TUNED = re.compile(r"-(instruct|it|chat|base|pt|hf|2501|2507)(?=-|$)")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _llama3(*sizes: int, factor: float = 8.0, **more: Any) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072, "rope_scaling": scaling, **more,
    }  # fmt: skip


def _qwen2(*sizes: int, **more: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "model_type": "qwen2", "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 32768, **more,
    }  # fmt: skip


def _qwen3(*sizes: int, **more: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "model_type": "qwen3", "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "head_dim": 128,
        "max_position_embeddings": 40960, **more,
    }  # fmt: skip


def _gemma3(*sizes: int, window: int = 1024, **more: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {
        "model_type": "gemma3_text", "vocab_size": 262208, "rms_norm_eps": 1e-6, "head_dim": 256,
        "sliding_window": window, "max_position_embeddings": 131072, **more,
    }  # fmt: skip


def _llama(*sizes: int, **more: Any) -> dict[str, Any]:
    return dict(zip(_SIZES, sizes, strict=True)) | {"model_type": "llama", "rms_norm_eps": 1e-5, **more}


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    scaling = {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    return dict(zip(_SIZES, (2880, 2880, layers, 64, 8), strict=True)) | {
        "model_type": "gpt_oss", "vocab_size": 201088, "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64,
        "max_position_embeddings": 131072, "sliding_window": 128, "num_local_experts": experts,
        "num_experts_per_tok": 4, "rope_scaling": scaling, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip


_SMOLLM2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
_LINEAR_8: Mapping[str, Any] = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 8),
    "llama-3.1-405b": _llama3(16384, 53248, 126, 128, 8),
    "llama-3.3-70b": _llama3(8192, 28672, 80, 64, 8),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 8, factor=32.0, tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 8, factor=32.0, tie_word_embeddings=True),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tie_word_embeddings=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, window=512, vocab_size=262144, max_position_embeddings=32768),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, window=512, vocab_size=262144, max_position_embeddings=32768),
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, **_LINEAR_8),
    "gemma-3-12b": _gemma3(3840, 15360, 48, 16, 8, **_LINEAR_8),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168, **_LINEAR_8),
    "mistral-7b-v0.3": _llama(4096, 14336, 32, 32, 8, model_type="mistral", vocab_size=32768, rope_theta=1e6,
                              max_position_embeddings=32768, sliding_window=None),
    "mistral-small-24b": _llama(5120, 32768, 40, 32, 8, model_type="mistral", vocab_size=131072, rope_theta=1e8,
                                head_dim=128, max_position_embeddings=32768, sliding_window=None),
    "phi-4": _llama(5120, 17920, 40, 40, 10, model_type="phi3", vocab_size=100352, rope_theta=250000.0,
                    max_position_embeddings=16384),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "qwen3-30b-a3b": _qwen3(2048, 6144, 48, 32, 4, model_type="qwen3_moe", moe_intermediate_size=768, num_experts=128,
                            num_experts_per_tok=8, norm_topk_prob=True),
    "mixtral-8x7b-v0.1": _llama(4096, 14336, 32, 32, 8, model_type="mixtral", vocab_size=32000, rope_theta=1e6,
                                max_position_embeddings=32768, sliding_window=None, num_local_experts=8,
                                num_experts_per_tok=2),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, rope_theta=100000.0, **_SMOLLM2),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, rope_theta=100000.0, **_SMOLLM2),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, rope_theta=130000.0, **_SMOLLM2),
}  # fmt: skip
# As `twinmesh fetch` and others call them.
_ALIASES = {"smollm2": "smollm2-135m", "gemma3-270m": "gemma-3-270m", "mixtral-8x7b": "mixtral-8x7b-v0.1"}


def known_name(name: str) -> str | None:
    """Return what a model is called here, given how the hub or anybody else spells it; None: it is not known."""
    plain = name.strip().rpartition("/")[2].lower().replace("_", "-").removeprefix("meta-")
    while (shorter := _TUNED.sub("", plain)) != plain:
        plain = shorter
    plain = _ALIASES.get(plain, plain)
    return plain if plain in _SETTINGS else None


def known_config(name: str) -> ModelConfig:
    """Return the configuration of a model; raises as `known_model`."""
    return known_model(name).config


def known_model(name: str) -> Described:
    """Return what is known of a model by its name here or on the hub, whatever its case and tuning.

    Raises:
        CheckpointError: no such model is known; names the nearest.
    """
    found = known_name(name)
    if found is None:
        near = get_close_matches(name.rpartition("/")[2].lower(), _SETTINGS, n=1, cutoff=0.0)[0]
        raise CheckpointError(
            f"No model named {name!r} is known, and there is no such file: the nearest is {near!r}; of any "
            "other model name a directory with its config.json, or its GGUF file."
        )
    return described(Settings(_SETTINGS[found]))


def known_names() -> tuple[str, ...]:
    """Return the names of all models that are known."""
    return tuple(_SETTINGS)
