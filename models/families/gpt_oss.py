"""GPT-OSS: experts with clamped gates, biases everywhere, a sink per query head, a window in every other layer, YaRN.

Hugging Face's files hold all experts of a layer in one tensor, the columns of gate and up in turn. As floats it is
[experts, in, out]; packed as MXFP4 [experts, out, in], as `checkpoints/mxfp4.py` presents it. YaRN's bounds are not
rounded, as in the model's own code; llama.cpp rounds them also for this model.
"""

from dataclasses import replace
from functools import partial

from ..config import ClampedGate, Experts, ModelConfig
from . import from_gguf, from_hugging_face
from .family import Family, Format
from .from_gguf import GGUFHeader
from .from_hugging_face import FULL, SLIDING
from .raw_config import Settings
from .tensor_names import ExpertNames, router_of, sources_of
from .tensor_source import Places, Source, stacked

_WINDOW, _ALPHA, _LIMIT = 128, 1.702, 7.0
# What transformers' configuration of the family takes where the file says nothing about rotation.
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_ROUTER = ExpertNames("mlp.router", "", "", "")
_NAMES = replace(from_hugging_face.NAMES, sinks="self_attn.sinks")
_READ = ("num_local_experts", "num_experts", "attention_bias", "quantization_config")


def _of_hugging_face(settings: Settings) -> ModelConfig:
    packing = settings.section("quantization_config")
    if packing is not None and packing.get("quant_method") != "mxfp4":
        raise packing.refusal("quant_method", "mxfp4 is expected")
    if settings.section("rope_parameters") is None and settings.section("rope_scaling") is None:
        settings = settings.including("rope_scaling", _YARN)
    config = from_hugging_face.config_of(
        settings, "gpt_oss", kinds=_kinds, head_dim=64, theta=150_000.0, window=_WINDOW, reads=_READ
    )
    key = "num_local_experts" if "num_local_experts" in settings else "num_experts"
    clamped = ClampedGate(settings.number("swiglu_alpha", _ALPHA), settings.number("swiglu_limit", _LIMIT))
    has_bias = settings.flag("attention_bias", True)
    config = replace(config, qkv_bias=has_bias, output_bias=has_bias)
    return _as_gpt_oss(config, Experts(settings.integer(key), settings.integer("num_experts_per_tok", 4)), clamped)


def _kinds(settings: Settings, layers: int) -> list[str]:
    return [FULL if index % 2 else SLIDING for index in range(layers)]


def _of_gguf(header: GGUFHeader) -> ModelConfig:
    config = from_gguf.config_of(header, "gpt_oss", has_window=True, has_experts=True, rounds_yarn=False)
    window = header.settings.integer("attention.sliding_window")
    layers = tuple(spec if index % 2 else replace(spec, window=window) for index, spec in enumerate(config.layers))
    config = replace(config, layers=layers, qkv_bias=True, output_bias=True)
    if config.experts is None:
        raise header.settings.refusal("expert_count", "a number of experts is expected")
    return _as_gpt_oss(config, config.experts, ClampedGate(_ALPHA, _LIMIT))


def _as_gpt_oss(config: ModelConfig, experts: Experts, clamped: ClampedGate) -> ModelConfig:
    experts = replace(experts, has_bias=True, clamped=clamped)
    return replace(config, has_sinks=True, fits_float16=False, experts=experts)


def _sources(config: ModelConfig, *, is_packed: bool) -> dict[str, Places]:
    """Map parameters to Hugging Face's tensors: those of experts are this family's own."""
    assert config.experts is not None
    count, hidden, inner = config.experts.count, config.hidden_size, config.intermediate_size
    layer = router_of(config, _ROUTER)
    for turn, name in enumerate(("gate", "up")):
        bias = Source("mlp.experts.gate_up_proj_bias", (count, 2 * inner), first_column=turn, column_step=2)
        layer[f"mlp.{name}_bias"] = bias
        layer[f"mlp.{name}_proj"] = (_packed if is_packed else _columns)(count, hidden, inner, turn)
    layer["mlp.down_bias"] = Source("mlp.experts.down_proj_bias", (count, hidden))
    if is_packed:
        layer["mlp.down_proj"] = stacked("mlp.experts.down_proj_blocks", count, hidden, inner)
    else:
        layer["mlp.down_proj"] = Source("mlp.experts.down_proj", (count, inner, hidden))
    return sources_of(config, _NAMES, mlp=layer)


def _columns(count: int, hidden: int, inner: int, turn: int) -> Places:
    """Find every other column of each expert's [in, out]."""
    whole = Source(
        "mlp.experts.gate_up_proj", (count, hidden, 2 * inner), rows=hidden, first_column=turn, column_step=2
    )
    return tuple(replace(whole, first_row=index * hidden) for index in range(count))


def _packed(count: int, hidden: int, inner: int, turn: int) -> Places:
    """Find every other row of each expert's [out, in]."""
    whole = Source(
        "mlp.experts.gate_up_proj_blocks", (count, 2 * inner, hidden), transposed=True, rows=inner, row_step=2
    )
    return tuple(replace(whole, first_row=2 * inner * index + turn) for index in range(count))


FAMILY = Family(
    Format(
        ("gpt_oss",),
        _of_hugging_face,
        partial(_sources, is_packed=False),
        partial(_sources, is_packed=True),
    ),
    Format(("gpt-oss",), _of_gguf, partial(sources_of, names=replace(from_gguf.NAMES, mlp_norm="post_attention_norm"))),
)
