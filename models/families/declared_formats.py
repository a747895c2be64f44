"""In which formats a checkpoint's weights are, as far as config.json alone tells: its `quantization_config`.

For plans that have no weight file: which of the decoder's parameters are packed, and in what. Only projections are, of
attention and of the MLP or experts; embedding, head, router, norms and biases stay floats. Formats have the names that
an engine keeps them under: GGUF's, or KIND-GROUP-DTYPE of values, inputs that share a scale, and scales. Files say the
type of the scales and config.json does not: it is taken for what the method's own tools write. What no engine reads is
refused as it is there (`packing.py`); no tensor is looked at.
"""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..config import ModelConfig
from .packing import KEY, packing_of
from .raw_config import Settings
from .tensor_source import Places, each

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class Declared(NamedTuple):
    """What the files hold packed."""

    method: str  # as config.json calls it
    format: str  # of every packed weight
    floats: tuple[str, ...] = ()  # modules that are not packed: names, parts of names, or patterns
    is_experts_only: bool = False


def declared_packing(settings: Settings) -> Declared | None:
    """Read how the weights are packed; None: they are floats.

    Raises:
        CheckpointError: a method or a setting that is not implemented, by name.
    """
    packing, section = packing_of(settings), settings.section(KEY)
    if packing is None or section is None:
        return None
    method = packing.method
    floats = tuple(
        name for key in ("modules_to_not_convert", "ignored_layers", "ignore") for name in _names(section, key)
    )
    if method == "mxfp4":
        return Declared(method, "MXFP4", floats, is_experts_only=True)
    if method == "fp8":
        return Declared(method, _fp8(section), floats)
    if method == "fbgemm_fp8":
        return Declared(method, "FP8-128-float32", floats)
    if method == "awq":
        return Declared(method, _words(section, "bits", "w_bit", "group_size", "q_group_size"), floats)
    if method == "gptq":
        return Declared(method, _words(section, "bits", "bits", "group_size", "group_size"), floats)
    assert method == "compressed-tensors"
    return Declared(method, _compressed(section, _scales(settings)), floats)


def declared_formats(packing: Declared | None, model: ModelConfig, sources: Mapping[str, Places]) -> dict[str, str]:
    """Find the parameters that are packed: path -> format.

    Args:
        packing: as `declared_packing` has read it.
        model: what config.json describes.
        sources: each parameter's place in files of floats (`Format.sources`), whose names say what is excluded.
    """
    if packing is None:
        return {}
    names = _MLP if packing.is_experts_only else (*_ATTENTION, *_MLP)
    if packing.is_experts_only and model.experts is None:
        return {}
    return {
        path: packing.format
        for path, places in sources.items()
        if path.rpartition(".")[2] in names and not _is_float(each(places)[0].tensor, packing.floats)
    }


def _is_float(tensor: str, patterns: tuple[str, ...]) -> bool:
    name = tensor.removesuffix(".weight")
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return True
        elif fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") or f".{pattern}." in f".{name}.":
            return True
    return False


def _names(section: Settings, key: str) -> tuple[str, ...]:
    found = section.get(key)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(name, str) and _is_pattern(name) for name in found):
        raise section.refusal(key, "a list of names is expected, behind 're:' of regular expressions")
    return tuple(found)


def _is_pattern(name: str) -> bool:
    try:
        re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
    except re.error:
        return False
    return True


def _fp8(section: Settings) -> str:
    block = section.get("weight_block_size")
    if block not in (None, [128, 128]):
        raise section.refusal("weight_block_size", "[128, 128] or none is expected")
    return "FP8-128-float32"


def _scales(settings: Settings) -> str:
    """Return the type of scales that are saved in the model's own."""
    found = settings.get("dtype", settings.get("torch_dtype"))
    return found if found in ("float16", "float32") else "bfloat16"


def _words(section: Settings, bits: str, old_bits: str, group: str, old_group: str) -> str:
    """Name the format of AWQ or GPTQ: words of 32 bits, and zero points in any case."""
    count = section.integer(bits if bits in section else old_bits)
    return _grouped(section, group if group in section else old_group, f"UINT{count}", "float16")


def _compressed(section: Settings, scales: str) -> str:
    groups = section.section("config_groups")
    names = () if groups is None else tuple(groups)
    weights = None
    if groups is not None and len(names) == 1 and (group := groups.section(names[0])) is not None:
        weights = group.section("weights")
    if weights is None:
        raise section.refusal("config_groups", "one group with its weights is expected")
    kind, bits, strategy = weights.get("type", "int"), weights.integer("num_bits"), weights.get("strategy")
    if (kind, bits, section.get("format")) == ("float", 4, "mxfp4-pack-quantized"):
        return "MXFP4"
    if (kind, bits) == ("float", 8) and strategy in ("tensor", "channel"):
        return f"FP8-128-{scales}"
    if (kind, bits, strategy) == ("float", 8, "block"):
        structure = weights.get("block_structure")
        if structure != [128, 128]:
            raise weights.refusal("block_structure", "[128, 128] is expected")
        return f"FP8-128-{scales}"
    if kind == "int" and bits in (4, 8) and strategy in ("group", "channel", "tensor"):
        sign = "" if weights.flag("symmetric", True) else "U"
        return _grouped(weights, "group_size", f"{sign}INT{bits}", scales)
    raise weights.refusal("num_bits", "floats of 8 bits, or integers of 4 or 8 by channel or group, are expected")


def _grouped(section: Settings, key: str, kind: str, scales: str) -> str:
    group = section.get(key)
    if group not in (32, 64, 128, -1, None):
        raise section.refusal(key, "32, 64, 128 or -1 is expected")
    return f"{kind}-{128 if group in (-1, None) else group}-{scales}"
