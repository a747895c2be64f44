"""Reads `quantization_config` of a Hugging Face config.json: how which weights are packed, and what is refused.

It is read once, here, for engines and for plans alike, so that neither takes what the other refuses. How tensors lie
follows from the tensors themselves (`checkpoints/packed_matrix.py`); engines need of this what tensors do not tell: the
method, and settings under which the same tensors would mean other numbers; and what they do tell but may contradict,
where one statement holds for all of them, so that scales or zero points that were lost or cut off are found. Plans have
no tensors, and take the `Scheme` of each module (`declared_formats.py`). Activations stay as they are, also where a
method would quantise them. No JAX.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from ...kernels_pallas.formats.layouts import WITH_ZEROS, Kind
from .raw_config import Settings

KEY = "quantization_config"
_REGEX = "re:"
_CLASS = "Linear"  # of the modules that methods pack, as targets name it

# How many outputs and inputs share a scale; None in either place: all of them.
type Block = tuple[int | None, int | None]
_OF_OUTPUTS: Block = (1, None)  # a scale for each output


class Scheme(NamedTuple):
    """How the weights of some modules are packed."""

    kind: Kind | None  # of the values; None: MXFP4
    group: int | None = None  # inputs that share a scale; None: all of an output do
    scale_dtype: str = "float32"  # config.json does not say: what the method's own tools write
    is_ordered: bool = True  # inputs lie in the order of their groups
    targets: tuple[str, ...] = (_CLASS,)  # modules: names, a class, or behind "re:" regular expressions


class Packing(NamedTuple):
    """How a checkpoint's weights are packed."""

    method: str  # as config.json and vLLM name it
    schemes: tuple[Scheme, ...]
    floats: tuple[str, ...] = ()  # modules that are not packed: names, parts of names, or patterns
    adds_one: bool = False  # GPTQ: whether zero points are stored less by one
    rounds_activations: bool = False  # whether the method would quantise activations, too
    block: Block | None = None  # of every packed weight; None: tensors alone say it
    has_zeros: bool = False  # whether every packed weight has zero points
    packs_head: bool = False  # whether the head is one of the modules that may be packed

    def scheme_of(self, module: str) -> Scheme | None:
        """Return how a module that the method may pack is packed; None: it is floats.

        A scheme that names the module, or a pattern of its name, comes before one that names its class.
        """
        if any(_is_part(module, pattern) for pattern in self.floats):
            return None
        named = (one for one in self.schemes if any(_is_named(module, target) for target in one.targets))
        return next(named, None) or next((one for one in self.schemes if _CLASS in one.targets), None)


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
    keys = ("modules_to_not_convert", "ignored_layers", "ignore")
    floats = tuple(name for key in keys for name in _names(section, key))
    packing = read(section, _model_dtype(settings))
    return packing._replace(floats=(*packing.floats, *floats))


def of_family(settings: Settings, packing: Packing | None, *, has_own: bool) -> Settings:
    """Return the settings that a family is to read: without the packing, unless its packed tensors are its own.

    MXFP4 is refused by families without, because no other family's files are known to hold it that way.
    """
    if packing is None or packing.method == "mxfp4" or has_own:
        return settings
    return settings.without(KEY)


def _is_named(module: str, target: str) -> bool:
    is_pattern = target.startswith(_REGEX)
    return re.match(target[len(_REGEX) :], module) is not None if is_pattern else target == module


def _is_part(module: str, pattern: str) -> bool:
    """Return whether a module is what a list of exceptions names, or lies within it."""
    if pattern.startswith(_REGEX):
        return _is_named(module, pattern)
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*") or f".{pattern}." in f".{module}."


def _names(section: Settings, key: str) -> tuple[str, ...]:
    found = section.get(key)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(name, str) and _is_pattern(name) for name in found):
        raise section.refusal(key, "a list of names is expected, behind 're:' of regular expressions")
    return tuple(found)


def _is_pattern(name: str) -> bool:
    try:
        re.compile(name.removeprefix(_REGEX) if name.startswith(_REGEX) else "")
    except re.error:
        return False
    return True


def _model_dtype(settings: Settings) -> str:
    """Return the type of scales that are saved in the model's own."""
    found = settings.get("dtype", settings.get("torch_dtype"))
    return found if found in ("float16", "float32") else "bfloat16"


def _mxfp4(section: Settings, dtype: str) -> Packing:
    return Packing("mxfp4", (Scheme(None),))


def _fp8(section: Settings, dtype: str) -> Packing:
    section.refuse("fmt", "e4m3")
    block = _block(section, "weight_block_size")
    scheme = Scheme("FP8", None if block is None else block[1])
    return Packing("fp8", (scheme,), rounds_activations=True, block=block)


def _fbgemm(section: Settings, dtype: str) -> Packing:
    return Packing("fbgemm_fp8", (Scheme("FP8"),), rounds_activations=True, block=_OF_OUTPUTS)


def _gptq(section: Settings, dtype: str) -> Packing:
    """Read GPTQ's settings: files of the first format hold zero points less by one, those of `gptq_v2` as they are."""
    section.refuse("checkpoint_format", "gptq", "gptq_v2")
    schemes, dynamic = [_gptq_scheme(section, section)], section.section("dynamic")
    floats = list[str]()
    for name in dynamic or ():
        assert dynamic is not None
        pattern = _REGEX + name.removeprefix("+:").removeprefix("-:")
        if not _is_pattern(pattern):
            raise dynamic.refusal(name, "its name is no regular expression")
        if name.startswith("-:"):
            floats.append(pattern)
        else:
            scheme = _gptq_scheme(dynamic.section(name) or section, section)
            schemes.append(scheme._replace(targets=(pattern,)))
    return Packing(
        "gptq", tuple(schemes), tuple(floats), adds_one=section.get("checkpoint_format") != "gptq_v2",
        block=None if dynamic else _rows(section, "group_size"), packs_head=section.get("lm_head") is True,
    )  # fmt: skip


def _gptq_scheme(own: Settings, common: Settings) -> Scheme:
    """Read the scheme of some modules; what `own` does not say `common` does."""
    bits, group, ordering = (own if key in own else common for key in ("bits", "group_size", "desc_act"))
    if bits.get("bits") not in (4, 8):
        raise bits.refusal("bits", "4 and 8 are")
    size = _group(group, "group_size")
    is_ordered = size is None or ordering.get("desc_act") is not True
    return Scheme("UINT4" if bits.get("bits") == 4 else "UINT8", size, "float16", is_ordered)


def _awq(section: Settings, dtype: str) -> Packing:
    bits = "w_bit" if "w_bit" in section and "bits" not in section else "bits"
    key = "q_group_size" if "q_group_size" in section and "group_size" not in section else "group_size"
    if section.get(bits) != 4:
        raise section.refusal(bits, "4 is")
    version = section.get("version")
    if version is not None and str(version).lower() != "gemm":
        raise section.refusal("version", "gemm is")
    return Packing("awq", (Scheme("UINT4", _group(section, key), "float16"),), block=_rows(section, key))


# What a group of modules may be packed as. nvfp4 divides by a second scale; those with 24 leave weights out.
_FORMATS = ("dense", "float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "mxfp4-pack-quantized")


def _compressed_tensors(section: Settings, dtype: str) -> Packing:
    section.refuse("format", *_FORMATS, "mixed-precision")
    section.refuse("quantization_status", "compressed", "frozen")
    transforms, sparsity = section.section("transform_config"), section.section("sparsity_config")
    if transforms is not None:
        transforms.refuse("config_groups", {})
    if sparsity is not None:
        sparsity.refuse("format", "dense")
    groups = list(_groups(section))
    if not groups:
        raise section.refusal("config_groups", "at least one group with its weights is expected")
    schemes, blocks = zip(*(_compressed_scheme(group, weights, dtype) for group, weights in groups), strict=True)
    is_one = len(groups) == 1
    return Packing(
        "compressed-tensors", schemes, rounds_activations=any("input_activations" in group for group, _ in groups),
        block=blocks[0] if is_one else None, has_zeros=is_one and schemes[0].kind in WITH_ZEROS.values(),
        packs_head=True,
    )  # fmt: skip


def _groups(section: Settings) -> Iterator[tuple[Settings, Settings]]:
    """Iterate over the groups of modules whose weights are packed, each with its settings of weights."""
    groups = section.section("config_groups")
    for name in groups or ():
        assert groups is not None
        group = groups.section(name)
        weights = None if group is None else group.section("weights")
        if group is not None and weights is not None:
            group.refuse("format", *_FORMATS)
            yield group, weights


def _compressed_scheme(group: Settings, weights: Settings, dtype: str) -> tuple[Scheme, Block | None]:
    """Read a group's scheme, and the block that shares a scale.

    What is not said is as compressed-tensors 0.20.1 has it (`QuantizationArgs`).
    """
    kind, bits = weights.get("type", "int"), weights.integer("num_bits", 8)
    block, targets = _compressed_block(weights), _names(group, "targets") or (_CLASS,)
    size, is_ordered = None if block is None else block[1], weights.get("actorder") not in ("group", "dynamic", True)
    if (kind, bits, size) == ("float", 4, 32):
        return Scheme(None, targets=targets), block
    if (kind, bits) == ("float", 8):
        return Scheme("FP8", size, dtype, targets=targets), block
    if kind != "int" or bits not in (4, 8):
        raise weights.refusal("num_bits", "floats of 8 bits, integers of 4 or 8, or MXFP4's floats in groups of 32 are")
    plain: Kind = "INT4" if bits == 4 else "INT8"
    values = plain if weights.flag("symmetric", True) else WITH_ZEROS[plain]
    return Scheme(values, size, dtype, is_ordered, targets), block


def _compressed_block(weights: Settings) -> Block | None:
    """Read how many outputs and inputs share a scale; None: it is not said."""
    strategy = weights.get("strategy")
    if strategy == "block":
        return _block(weights, "block_structure")
    if strategy in ("group", None):
        return _rows(weights, "group_size")
    if strategy not in ("tensor", "channel"):
        raise weights.refusal("strategy", "tensor, channel, group and block are")
    return _OF_OUTPUTS if strategy == "channel" else (None, None)


def _block(section: Settings, key: str) -> Block | None:
    """Read how many outputs and inputs share a scale; None: it is not said."""
    found = section.get(key)
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(map(_is_size, found)):
        raise section.refusal(key, "two powers of two are expected")
    return found[0], found[1]


def _group(section: Settings, key: str) -> int | None:
    """Read how many inputs of one output share a scale; None: all do, or it is not said."""
    found = section.get(key)
    if found in (None, -1):
        return None
    if not _is_size(found):
        raise section.refusal(key, "a power of two, or -1 for all inputs, is expected")
    return int(found)


def _is_size(number: object) -> bool:
    """Return whether so many outputs or inputs may share a scale: how many do is told from shapes."""
    return type(number) is int and number > 0 and number.bit_count() == 1


def _rows(section: Settings, key: str) -> Block | None:
    """Read the block of one output that shares a scale; None: it is not said."""
    return (1, _group(section, key)) if key in section else None


METHODS: Mapping[str, Callable[[Settings, str], Packing]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
