"""Reads `quantization_config` of a Hugging Face config.json: which method packed the weights, and what is refused.

How tensors lie follows from the tensors themselves (`checkpoints/packed_matrix.py`), so lists of modules that were left
alone (`ignore`, `modules_to_not_convert`, `dynamic`) decide nothing here, as mixtures of formats need no list. What is
read here is what tensors do not tell: the method, and settings under which the same tensors would mean other numbers;
and what they do tell but may contradict, where one statement holds for all of them, so that scales or zero points that
were lost or cut off are found. Activations stay as they are, also where a method would quantise them. Plans read the
same, and in which formats weights are besides (`declared_formats.py`). No JAX.
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
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale; None: tensors alone say it
    has_zeros: bool = False  # whether every packed weight has zero points


def packing_of(settings: Settings) -> Packing | None:
    """Read the packing; None: the weights are floats.

    Raises:
        CheckpointError: a method or a setting that is not implemented, by name.
    """
    section = settings.section(KEY)
    if section is None:
        return None
    method = section.get("quant_method")
    read = METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise section.refusal("quant_method", f"{', '.join(METHODS)} are")
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
    return Packing("fp8", rounds_activations=True, block=_block(section, "weight_block_size"))


def _gptq(section: Settings) -> Packing:
    """Read GPTQ's settings: files of the first format hold zero points less by one, those of `gptq_v2` as they are."""
    if section.get("bits") not in (4, 8):
        raise section.refusal("bits", "4 and 8 are")
    section.refuse("checkpoint_format", "gptq", "gptq_v2")
    group = None if section.get("dynamic") else _group(section, "group_size")
    return Packing("gptq", adds_one=section.get("checkpoint_format") != "gptq_v2", block=group)


def _awq(section: Settings) -> Packing:
    if section.get("bits", section.get("w_bit")) != 4:
        raise section.refusal("bits", "4 is")
    version = section.get("version")
    if version is not None and str(version).lower() != "gemm":
        raise section.refusal("version", "gemm is")
    return Packing("awq", block=_group(section, "group_size" if "group_size" in section else "q_group_size"))


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
    names = () if groups is None else tuple(groups)
    block, has_zeros = None, False
    for name in names:
        group = groups.section(name) if groups is not None else None
        if group is not None:
            group.refuse("format", *_FORMATS)
            rounds |= "input_activations" in group
            weights = group.section("weights")
            if weights is not None and len(names) == 1:
                block, has_zeros = _compressed_block(weights), weights.get("symmetric") is False
    return Packing("compressed-tensors", rounds_activations=rounds, block=block, has_zeros=has_zeros)


def _compressed_block(weights: Settings) -> tuple[int, int] | None:
    strategy = weights.get("strategy")
    if strategy == "block":
        return _block(weights, "block_structure")
    return _group(weights, "group_size") if strategy == "group" else None


def _block(section: Settings, key: str) -> tuple[int, int] | None:
    """Read how many outputs and inputs share a scale; None: it is not said."""
    found = section.get(key)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(one) is int and one > 0 for one in found):
        raise section.refusal(key, "two positive integers are expected")
    return found[0], found[1]


def _group(section: Settings, key: str) -> tuple[int, int] | None:
    """Read how many inputs of one output share a scale; None: all do, or it is not said."""
    return None if section.get(key) in (None, -1) else (1, section.integer(key))


METHODS: Mapping[str, Callable[[Settings], Packing]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": lambda section: Packing("fbgemm_fp8", rounds_activations=True),
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": lambda section: Packing("mxfp4"),
}
