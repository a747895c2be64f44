"""JAX's settings as Twinmesh needs them, whatever the process that it runs in has chosen for itself.

A program's settings are part of what is traced: some change the numbers drawn or the precision of products, others
refuse what Twinmesh writes or every compilation. They are the user's for the user's own programs, so they are not
changed but overridden, on one thread and for as long as Twinmesh traces, compiles, loads or dispatches.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax
import numpy as np
from jax.sharding import Mesh


@contextmanager
def own_settings() -> Iterator[None]:
    """Override, on this thread, each setting that would change a token or stop an engine. May be entered again."""
    with ExitStack() as entered:
        for setting in (
            # What is drawn for a seed.
            jax.threefry_partitionable(True),
            jax.default_prng_impl("threefry2x32"),
            # What is computed.
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.default_matmul_precision(None),
            # What is refused.
            jax.numpy_rank_promotion("allow"),
            jax.debug_nans(False),  # KV that nobody has written may be NaN
            jax.debug_infs(False),
            jax.disable_jit(False),
            jax.no_tracing(False),
            jax.transfer_guard("allow"),
        ):
            entered.enter_context(setting)
        # Where it is computed: a mesh that the process has set would have to be each of the engine's meshes. One that
        # names a kind of device that is not here stays: for that one programs are compiled in its absence.
        named = jax.sharding.get_abstract_mesh().abstract_device
        if named is None or named.platform == jax.devices()[0].platform:
            entered.enter_context(jax.set_mesh(Mesh(np.empty((), object), ())))
        yield
