#!/usr/bin/env bash
# ray 2.60.0: `ray.get` of a float32 or uint16 array is a view of the object store, the same one each time. A bfloat16 array is
# copied at every get, since its dtype has no buffer for pickle to hand over; Viewed as uint16 it is shared.
#
# Seen on 2026-11-29:
#   as found: float32: two gets see the same memory
#   as found: the bfloat16 viewed as uint16: so do they
#   as found: bfloat16: each get is a copy
#   as found: memoryview of bfloat16 is refused: cannot include dtype 'E' in a buffer
# shellcheck source-path=SCRIPTDIR source=lib.bash
. "$(dirname "$0")/lib.bash"
prepare ray==2.60.0 numpy==2.5.5 ml_dtypes==0.6.0 -- "$@"
run_python <<'PY'
import logging
import os

import ml_dtypes
import numpy as np
import ray
from finding import expect

ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, logging_level=logging.ERROR,
         _temp_dir=os.environ["TMPDIR"])  # short: socket names have a limit  # fmt: skip


def is_shared(array):
    """Do two gets see the same memory?"""
    reference = ray.put(array)
    one, two = ray.get(reference), ray.get(reference)
    return one.ctypes.data == two.ctypes.data


values = np.ones(1 << 20, ml_dtypes.bfloat16)
expect(is_shared(values.astype(np.float32)), "float32: two gets see the same memory")
expect(is_shared(values.view(np.uint16)), "the bfloat16 viewed as uint16: so do they")
expect(not is_shared(values), "bfloat16: each get is a copy")
try:
    memoryview(values)
except (ValueError, BufferError) as error:
    expect(True, f"memoryview of bfloat16 is refused: {error}")
else:
    expect(False, "memoryview of bfloat16 is refused")
ray.shutdown()
PY
