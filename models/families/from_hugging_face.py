"""Reads what the families share from a Hugging Face directory: the configuration in config.json, and tensors' names.

A family calls `config_of` with its own defaults and replaces what differs. Settings that would change the result but
are not implemented are refused here by name.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..config import Activation, AttentionSpec, ModelConfig, Rope
from .raw_config import Settings
from .rope import kind_of, rope_of, stretched
from .tensor_names import TensorNames

NAMES = TensorNames(
    embedding="model.embed_tokens",
    norm="model.norm",
    head="lm_head",
    layer="model.layers.{}.",
    attention_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
_MOST_LAYERS = 1000
FULL, SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# Keys that change what a model computes, with the values that mean "not used". Null always means that.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "vision_config": (),
    "audio_config": (),
    "num_local_experts": (0, 1),
    "num_experts": (0, 1),
    "partial_rotary_factor": (1.0,),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "attention_chunk_size": (),
}

# Says which layers have a sliding window if config.json has no `layer_types`: (settings, layers) -> a kind for each.
type Kinds = Callable[[Settings, int], list[str]]


def all_full(settings: Settings, layers: int) -> list[str]:
    """Give no layer a window."""
    return [FULL] * layers


def all_sliding(settings: Settings, layers: int) -> list[str]:
    """Give every layer the sliding window, if the settings have one."""
    return [FULL if settings.get("sliding_window") is None else SLIDING] * layers


def sliding_from(settings: Settings, layers: int) -> list[str]:
    """Give layers from `max_window_layers` on the sliding window, if `use_sliding_window` is set (Qwen)."""
    if not settings.flag("use_sliding_window", False):
        return [FULL] * layers
    first = settings.get("max_window_layers")
    if not isinstance(first, int):
        raise settings.refusal("max_window_layers", "a number of layers is expected")
    return [FULL if index < first else SLIDING for index in range(layers)]


def config_of(
    settings: Settings,
    family: str,
    *,
    kinds: Kinds = all_full,
    tied: bool = False,
    head_dim: int | None = None,
    theta: float = 10000.0,
    local_theta: float | None = None,
    window: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    reads: Collection[str] = (),
) -> ModelConfig:
    """Read the configuration from config.json.

    Args:
        settings: the whole of config.json.
        family: name for messages and metrics.
        kinds: chooses the layers with a sliding window if the file does not list them.
        tied: default for whether the head is the embedding.
        head_dim: default for the size of a head; None: hidden_size / num_attention_heads.
        theta: default for the rotary base.
        local_theta: default for the rotary base of layers with a sliding window, which is then never scaled; None:
            they have the base and the scaling of the others.
        window: default for the size of the sliding window in tokens; None: the file has to give it.
        activation: the key that names the MLP's activation, and the default name.
        reads: keys that change what a model computes and that the family reads itself, so that they are not refused.

    Raises:
        CheckpointError: a missing or absurd value, or a feature that is not implemented.
    """
    for key, unused in _REFUSED.items():
        if key not in reads:
            settings.refuse(key, *unused)
    hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    dim = settings.integer("head_dim", head_dim or max(1, hidden // heads))
    ropes = _ropes(settings, dim, theta, local_theta)
    return ModelConfig(
        family=family,
        vocab_size=settings.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=settings.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=settings.integer("num_key_value_heads", heads),
        head_dim=dim,
        rms_norm_eps=settings.number("rms_norm_eps"),
        tie_embeddings=settings.flag("tie_word_embeddings", tied),
        max_position=_context(settings, ropes[FULL]),
        layers=_layers(settings, kinds, ropes, window),
        activation=_activation(settings, *activation),
    )


def _context(settings: Settings, rope: Rope) -> int:
    """Read the context, which scaled frequencies may stretch: as in vLLM, by YaRN to the factor times the original."""
    trained = settings.integer("max_position_embeddings")
    for section in (settings.section("rope_parameters"), settings.section("rope_scaling")):
        if section is not None and kind_of(section) == "yarn":
            return int(section.number("original_max_position_embeddings") * section.number("factor"))
    return stretched(trained, rope)


def _activation(settings: Settings, key: str, default: str) -> Activation:
    name = settings.get(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise settings.refusal(key, f"known activations are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _layers(
    settings: Settings, kinds: Kinds, ropes: Mapping[str, Rope], default_window: int | None
) -> tuple[AttentionSpec, ...]:
    count = settings.integer("num_hidden_layers")
    if count > _MOST_LAYERS:
        raise settings.refusal("num_hidden_layers", f"at most {_MOST_LAYERS} are expected")
    found = settings.get("layer_types")
    listed = kinds(settings, count) if found is None else found
    if not isinstance(listed, list) or len(listed) != count or any(kind not in (FULL, SLIDING) for kind in listed):
        raise settings.refusal("layer_types", f"{count} times {FULL!r} or {SLIDING!r} are expected")
    window = settings.integer("sliding_window", default_window) if SLIDING in listed else None
    specs = {FULL: AttentionSpec(ropes[FULL]), SLIDING: AttentionSpec(ropes[SLIDING], window)}
    return tuple(specs[kind] for kind in listed)


def _ropes(settings: Settings, head_dim: int, theta: float, local_theta: float | None) -> dict[str, Rope]:
    """Read the rotary embedding of each kind of layer.

    Newer files have `rope_parameters`, flat or by kind; older ones have `rope_theta` and `rope_scaling`. Users add
    `rope_scaling` to newer files, as model cards advised, so a contradiction is refused rather than ignored.
    """
    theta = settings.number("rope_theta", theta)
    local = theta if local_theta is None else settings.number("rope_local_base_freq", local_theta)
    parameters, scaling = settings.section("rope_parameters"), settings.section("rope_scaling")
    if parameters is None:
        full = rope_of(scaling or Settings({}), theta, head_dim)
        return {FULL: full, SLIDING: full if local_theta is None else Rope(local)}
    bases = {FULL: theta, SLIDING: local}
    by_kind = {kind: parameters.section(kind) for kind in bases}
    if any(by_kind.values()):
        ropes = {kind: rope_of(by_kind[kind] or Settings({}), base, head_dim) for kind, base in bases.items()}
    else:
        full = rope_of(parameters, theta, head_dim)
        ropes = {FULL: full, SLIDING: full if local_theta is None else Rope(local)}
    if scaling is not None and rope_of(scaling, ropes[FULL].theta, head_dim) != ropes[FULL]:
        raise settings.refusal("rope_scaling", "rope_parameters says otherwise, remove one of the two")
    return ropes
