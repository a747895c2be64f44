"""Says which parameters of a model `twinmesh convert --quantize` rounds, and to which format each."""

from typing import Literal

import numpy as np

from ...kernels_pallas.block_tiles import BLOCK
from ...kernels_pallas.formats.layouts import layout_name, repeated_group
from ...kernels_pallas.quantized import QuantizedArray
from ..config import ModelConfig
from ..decoder import abstract_params

type Rounding = Literal["int8", "fp8", "mxfp4"]


def rounded_formats(config: ModelConfig, rounding: Rounding) -> dict[str, str]:
    """Find the parameters that are rounded, by path, and the format of each.

    These are the projections, experts' included, whose inputs are whole blocks; embedding, head and router are left.
    """
    names = abstract_params(config, np.float32).specs
    probes = abstract_params(config, np.float32, dict.fromkeys(names, "MXFP4")).specs
    matrices = {path: spec.value for path, spec in probes.items() if isinstance(spec.value, QuantizedArray)}
    return {
        path: _format(rounding, matrix.matrix[1])
        for path, matrix in matrices.items()
        if matrix.inputs and matrix.matrix[1] % BLOCK == 0
    }


def _format(rounding: Rounding, inputs: int) -> str:
    if rounding == "mxfp4":
        return "MXFP4"
    group = repeated_group(inputs, bits=8, scale_bits=32)
    assert group is not None  # inputs are whole blocks
    return layout_name("FP8" if rounding == "fp8" else "INT8", group, "float32")
