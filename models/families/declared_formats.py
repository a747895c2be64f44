"""Which parameters a checkpoint holds packed, and what an engine would keep them as, by config.json alone.

For plans that have no weight file. Only projections are packed, of attention and of the MLP or experts, and where the
method packs it the head; embedding, router, norms and biases stay floats. Formats have the names that an engine keeps
them under (`kernels_pallas/formats/layouts.py`). What no engine reads is refused as it is there (`packing.py`); no
tensor is looked at.
"""

from collections.abc import Mapping

from ...kernels_pallas.formats.layouts import BLOCK, kept_layout
from .packing import Packing, Scheme
from .tensor_source import Places, Source, each

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_HEAD = "head.weight"


def declared_formats(packing: Packing | None, sources: Mapping[str, Places]) -> dict[str, str]:
    """Find the parameters that are packed and can stay so: path -> format.

    Args:
        packing: as `packing_of` has read it.
        sources: each parameter's place in the files, whose names say what is excluded.
    """
    if packing is None:
        return {}
    names = _MLP if packing.method == "mxfp4" else (*_ATTENTION, *_MLP)
    kept = {}
    for path, places in sources.items():
        if path.rpartition(".")[2] in names or (path == _HEAD and packing.packs_head):
            found = {_kept(packing.scheme_of(module_of(one)), one.shape[-1]) for one in each(places)}
            name = found.pop()
            if name is not None and not found:
                kept[path] = name
    return kept


def module_of(source: Source) -> str:
    """Return the name of the module whose weight is there, as `quantization_config` has it."""
    return source.tensor.removesuffix(".weight")


def _kept(scheme: Scheme | None, inputs: int) -> str | None:
    """Return the layout of a matrix with so many inputs; None: it becomes floats."""
    if scheme is None or not scheme.is_ordered:
        return None
    if scheme.kind is None:
        return None if inputs % BLOCK else "MXFP4"
    return kept_layout(scheme.kind, scheme.group or inputs, inputs, scheme.scale_dtype)
