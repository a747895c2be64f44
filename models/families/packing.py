"""Reads `quantization_config` of a Hugging Face config.json: which method packed the weights, and what is refused.

How tensors lie follows from the tensors themselves (`checkpoints/packed_matrix.py`), so lists of modules that were left
alone (`ignore`, `modules_to_not_convert`, `dynamic`) decide nothing here, as mixtures of formats need no list. What is
read here is what tensors do not tell: the method, and settings under which the same tensors would mean other numbers.
Activations stay as they are, also where a method would quantise them. Plans read the same, and in which formats weights
are besides (`declared_formats.py`). No JAX.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from .raw_config import Settings

KEY = "quantization_config"


class Packing(NamedTuple):
    """How a checkpoint's weights are packed."""

    method: str  # as config.json and vLLM name it
    adds_one: bool = False  # GPTQ: whether zero points are stored less by one
    rounds_activations: bool = False  # whether the method would quantise activations, too


def packing_of(settings: Settings) -> Packing | None:
    """Read the packing; None: the weights are floats.

    Raises:
        CheckpointError: a method or a setting that is not implemented, by name.
    """
    section = settings.section(KEY)
    if section is None:
        return None
    method = section.get("quant_method")
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise section.refusal("quant_method", f"{', '.join(_METHODS)} are")
    return read(section)


def of_family(settings: Settings, packing: Packing | None, *, has_own: bool) -> Settings:
    """Return the settings that a family is to read: without the packing, unless its packed tensors are its own.

    MXFP4 is refused by families without, because no other family's files are known to hold it that way.
    """
    if packing is None or packing.method == "mxfp4" or has_own:
        return settings
    return settings.without(KEY)


def _fp8(section: Settings) -> Packing:
    section.refuse("fmt", "e4m3")
    return Packing("fp8", rounds_activations=True)


def _gptq(section: Settings) -> Packing:
    """Read GPTQ's settings: files of the first format hold zero points less by one, those of `gptq_v2` as they are."""
    if section.get("bits") not in (4, 8):
        raise section.refusal("bits", "4 and 8 are")
    section.refuse("checkpoint_format", "gptq", "gptq_v2")
    return Packing("gptq", adds_one=section.get("checkpoint_format") != "gptq_v2")


def _awq(section: Settings) -> Packing:
    if section.get("bits", section.get("w_bit")) != 4:
        raise section.refusal("bits", "4 is")
    version = section.get("version")
    if version is not None and str(version).lower() != "gemm":
        raise section.refusal("version", "gemm is")
    return Packing("awq")


# What a group of modules may be packed as. nvfp4 divides by a second scale; those with 24 leave weights out.
_FORMATS = ("dense", "float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "mxfp4-pack-quantized")


def _compressed_tensors(section: Settings) -> Packing:
    section.refuse("format", *_FORMATS, "mixed-precision")
    section.refuse("quantization_status", "compressed", "frozen")
    transforms, sparsity = section.section("transform_config"), section.section("sparsity_config")
    if transforms is not None:
        transforms.refuse("config_groups", {})
    if sparsity is not None:
        sparsity.refuse("format", "dense")
    groups, rounds = section.section("config_groups"), False
    for name in section.get("config_groups") or {} if groups is not None else ():
        group = groups.section(name) if groups is not None else None
        if group is not None:
            group.refuse("format", *_FORMATS)
            rounds |= "input_activations" in group
    return Packing("compressed-tensors", rounds_activations=rounds)


_METHODS: Mapping[str, Callable[[Settings], Packing]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": lambda section: Packing("fbgemm_fp8", rounds_activations=True),
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": lambda section: Packing("mxfp4"),
}
