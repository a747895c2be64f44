#!/usr/bin/env bash
# gguf 0.19.0: most values of Q4_0, Q4_1, Q5_0 and Q8_0 do not fit bfloat16, although they have 4 to 8 bits: they are multiplied by
# a scale in float16, with 11 bits of its own, and bfloat16 has 8. MXFP4's scales are powers of two, and nothing is lost.
#
# Seen on 2026-11-29:
#   as found: Q4_0: 80% of the dequantised values change in bfloat16
#   as found: Q4_1: 78% of the dequantised values change in bfloat16
#   as found: Q5_0: 87% of the dequantised values change in bfloat16
#   as found: Q8_0: 97% of the dequantised values change in bfloat16
#   as found: MXFP4: 0% of the dequantised values change in bfloat16
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare gguf==0.19.0 numpy==2.5.5 ml_dtypes==0.6.0 -- "$@"
run_python <<'PY'
import gguf
import ml_dtypes
import numpy as np
from finding import expect

weights = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "MXFP4"):
    kind = gguf.GGMLQuantizationType[name]
    values = gguf.dequantize(gguf.quantize(weights, kind), kind)
    moved = float((values != values.astype(ml_dtypes.bfloat16).astype(np.float32)).mean())
    holds = moved == 0 if name == "MXFP4" else moved > 0.5
    expect(holds, f"{name}: {moved:.0%} of the dequantised values change in bfloat16")
PY
