#!/usr/bin/env bash
# ml_dtypes 0.6.0 (and JAX's casts, which agree with it) and torch 2.13.0 give the same 8-bit types other numbers at their ends. What is too
# large for float8_e4m3fn is NaN here and 448 there, infinity too, while float8_e5m2 overflows to infinity in both; and 0 as float8_e8m0fnu,
# the scale of a block of zeros, is NaN here and 2^-127 there.
#
# Seen on 2026-11-30:
#   as found: float8_e4m3fn of 465, 1e9, inf: ml_dtypes nan nan nan
#   as found: torch 448.0 448.0 448.0
#   as found: float8_e5m2 of 1e9: inf in both
#   as found: float8_e8m0fnu of 0: ml_dtypes nan, torch 5.877471754111438e-39
#   as found: a block of zeros over a scale from that: ml_dtypes nan, torch 0.0
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare ml_dtypes==0.6.0 torch==2.13.0 numpy==2.5.5 -- "$@"
run_python <<'PY'
import warnings

warnings.simplefilter("ignore")  # ml_dtypes warns of nothing here; numpy does when NaN is compared
import ml_dtypes
import numpy as np
import torch
from finding import expect


def by_ml_dtypes(values, name):
    return np.array(values, np.float32).astype(getattr(ml_dtypes, name)).astype(np.float32)


def by_torch(values, name):
    return torch.tensor(values, dtype=torch.float32).to(getattr(torch, name)).float().numpy()


def words(values):
    return " ".join(str(float(value)) for value in values)


large = [465.0, 1e9, float("inf")]
ours, theirs = by_ml_dtypes(large, "float8_e4m3fn"), by_torch(large, "float8_e4m3fn")
expect(np.isnan(ours).all(), f"float8_e4m3fn of 465, 1e9, inf: ml_dtypes {words(ours)}")
expect((theirs == 448).all(), f"torch {words(theirs)}")
wide = [f([1e9], "float8_e5m2")[0] for f in (by_ml_dtypes, by_torch)]
expect(np.isinf(wide).all(), f"float8_e5m2 of 1e9: {wide[0]} in both")
nothing = [float(f([0.0], "float8_e8m0fnu")[0]) for f in (by_ml_dtypes, by_torch)]
expect(np.isnan(nothing[0]) and nothing[1] == 2.0**-127, f"float8_e8m0fnu of 0: ml_dtypes {nothing[0]}, torch {nothing[1]}")
blocks = [0.0 / scale for scale in nothing]
expect(
    np.isnan(blocks[0]) and blocks[1] == 0,
    f"a block of zeros over a scale from that: ml_dtypes {blocks[0]}, torch {blocks[1]}",
)
PY
