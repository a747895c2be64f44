"""Which GPUs are Hopper, and which formats of weights have a kernel on them (`kernels_pallas/grouped_matmul.py`)."""

import re

HOPPER_FORMATS = ("MXFP4", "Q8_0", "Q4_0", "Q4_1")
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


def is_hopper(kind: str) -> bool:
    """Return whether a kind of GPU, as JAX names it or short as in "h100", is Hopper."""
    return _HOPPER.search(kind.upper()) is not None
