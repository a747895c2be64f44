#!/usr/bin/env bash
# compressed-tensors 0.20.1: symmetric int4 keeps no group's largest weight. The scale is the largest magnitude over 7.5, and the quotient is rounded
# to 7: 1.0 comes back as 0.933 and -1.0 as -0.933, 6.7 % off, where a scale over 7 would keep both. The code -8, for which the half is
# added, is not reached by either. int8 is 0.4 % off by the same rule.
#
# Seen on 2026-11-30:
#   as found: int4 of a row whose largest magnitude is 1: 1.0 -> 0.9333, -1.0 -> -0.9333
#   as found: its lowest code is -7
#   as found: int8: 1.0 -> 0.9961, -1.0 -> -0.9961
#   as found: float8 keeps both: 1.0 -> 1.0000, -1.0 -> -1.0000
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare compressed-tensors==0.20.1 torch==2.13.0 transformers==5.24.0 -- "$@"
run_python <<'PY'
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from finding import expect


def there_and_back(largest, bits, kind):
    """Round the largest of a row whose values lie between -1 and 1: its code, and the weight that it stands for."""
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=True, strategy="channel")
    scale, zero = calculate_qparams(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), args)
    code = quantize(torch.tensor([[largest]]), scale, zero, args)
    return float(code), float(dequantize(code, scale, zero, args))


def both(bits, kind):
    (_, up), (lowest, down) = (there_and_back(largest, bits, kind) for largest in (1.0, -1.0))
    return up, down, lowest, f"1.0 -> {up:.4f}, -1.0 -> {down:.4f}"


up, down, lowest, text = both(4, "int")
expect(abs(up - 14 / 15) < 1e-4 and abs(down + 14 / 15) < 1e-4, f"int4 of a row whose largest magnitude is 1: {text}")
expect(lowest == -7, f"its lowest code is {lowest:.0f}")
up, down, _, text = both(8, "int")
expect(up < 0.997 and down > -0.997, f"int8: {text}")
up, down, _, text = both(8, "float")
expect(abs(up - 1) < 1e-6 and abs(down + 1) < 1e-6, f"float8 keeps both: {text}")
PY
